"""The run folder on disk: the place of each artifact, and the content of its manifest.

Nothing heavy is imported here, so that `grappa status` answers at once.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, TypedDict

from grappa.pipeline.graph.node import Node
from grappa.pipeline.graph.stages import STAGES
from grappa.pipeline.store.digests import known_digest
from grappa.pipeline.store.storage import (
    StorageError,
    atomic_write_json,
    is_scratch,
    remove_dead_drafts,
    storage_errors,
    storage_sentence,
)

FORMAT = 1
RUN_FILE, CONFIG_FILE = "run.json", "config.yaml"
MANIFEST_FILE, FINGERPRINT_FILE, LOG_FILE = "manifest.json", "recipe.json", "log.jsonl"
RESOLVED_FILE = "resolved.json"  # in a partial folder: the values that settings `auto` stand for
CHECKPOINT_FILES = ("checkpoint.safetensors", "checkpoint.json", RESOLVED_FILE)
SCRATCH_FOLDER = "scratch"  # in a partial folder: files with which a stage resumes after a crash; never published

Fingerprint = Mapping[str, Any]


def quoted(path: Path) -> str:
    """Return the path quoted for a shell, for the commands that messages name."""
    return shlex.quote(str(path))


class RunFolderError(ValueError):
    """The folder is not a run folder that this version can use; the message says what to do."""


class CorruptManifest(ValueError):
    """A manifest is missing, unreadable, of a newer format or has wrong fields; the message begins with the file."""


class DamagedError(ValueError):
    """An artifact is not what its manifest says; the message names the artifact, the file and the command."""


class FileDigest(TypedDict):
    """Size and content of one output file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The manifest of an artifact: fingerprint and outputs identify it, the provenance says where it came from."""

    fingerprint: Fingerprint
    outputs: Mapping[str, FileDigest]
    provenance: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return the manifest as it is written to disk, with its format version."""
        parts = {"recipe": self.fingerprint, "outputs": self.outputs, "provenance": self.provenance}
        return {"format": FORMAT, **{name: dict(part) for name, part in parts.items()}}

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Return the manifest in the file `path`; CorruptManifest says what is wrong with the file."""
        try:
            with open(path, "rb") as file:
                return _parsed(file.read())
        except FileNotFoundError:
            raise CorruptManifest(f"{path.name}: missing") from None
        except CorruptManifest as error:
            raise CorruptManifest(f"{path.name}: {error}") from None


@lru_cache(maxsize=1024)
def _parsed(raw: bytes) -> Manifest:
    """Return the manifest in the bytes of a file, which are parsed once however many stages read the artifact."""
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise CorruptManifest(f"not JSON ({error})") from None
    problem = _manifest_problem(content)
    if problem:
        raise CorruptManifest(problem)
    return Manifest(content["recipe"], content["outputs"], content["provenance"])


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _manifest_problem(content: object) -> str | None:
    """Return the first fault of a parsed manifest, or None."""
    if not isinstance(content, dict):
        return f"expected an object, found {type(content).__name__}"
    version = content.get("format")
    if not isinstance(version, int):
        return f"field format is {version!r}, expected a number"
    if version > FORMAT:
        return f"format {version} is newer than {FORMAT}, the newest this version reads; update grappa"
    expected = {"format", "recipe", "outputs", "provenance"}
    if set(content) != expected:
        return f"fields are {sorted(content)}, expected {sorted(expected)}"
    for field in ("recipe", "outputs", "provenance"):
        if not isinstance(content[field], dict):
            return f"field {field} is not an object"
    return _fingerprint_problem(content["recipe"]) or _outputs_problem(content["outputs"])


def _fingerprint_problem(fingerprint: dict[str, Any]) -> str | None:
    expected = {"stage", "instance", "version", "config", "inputs"}
    if set(fingerprint) != expected:
        return f"fields of recipe are {sorted(fingerprint)}, expected {sorted(expected)}"
    right = (
        isinstance(fingerprint["stage"], str)
        and isinstance(fingerprint["instance"], str | None)
        and _is_count(fingerprint["version"])
        and isinstance(fingerprint["config"], dict)
        and isinstance(fingerprint["inputs"], dict)
        and all(isinstance(files, dict) for files in fingerprint["inputs"].values())
    )
    return None if right else "a field of recipe has the wrong type"


def _outputs_problem(outputs: dict[str, Any]) -> str | None:
    if not outputs:
        return "it names no output"
    for name, entry in outputs.items():
        path = PurePosixPath(name)
        if not name or path.is_absolute() or ".." in path.parts:
            return f"output {name!r} is not a path inside the artifact"
        right = isinstance(entry, dict) and set(entry) == {"bytes", "sha256"} and _is_count(entry["bytes"])
        if not right or not re.fullmatch("[0-9a-f]{64}", str(entry["sha256"])):
            return f"output {name} needs bytes and sha256, found {entry!r}"
    return None


@dataclass(frozen=True)
class Artifact:
    """The folder of one artifact in a run, and the folders beside it while the artifact is being made."""

    root: Path
    node: Node

    @property
    def name(self) -> str:
        """The artifact's name for people and fingerprints: `features`, `clusters/k00256`."""
        return self.node.name

    @property
    def path(self) -> Path:
        """The published folder."""
        return self.root / self.name

    @property
    def partial(self) -> Path:
        """The folder of unfinished work while nobody works on it."""
        return self._beside(".partial")

    def partial_of(self, token: str) -> Path:
        """Return the folder in which the holder of a lock works; the next holder renames it: no two share it."""
        return self._beside(f".partial.{token}")

    def unfinished(self) -> list[Path]:
        """Return the folders of unfinished work that are there, also those that killed processes left."""
        found = self.path.parent.glob(f"{self.partial.name}*") if self.path.parent.exists() else ()
        return sorted(path for path in found if path.name.removeprefix(self.partial.name)[:1] in ("", "."))

    @property
    def old(self) -> Path:
        """The folder of the former result, between the two renames of a publication."""
        return self._beside(".old")

    @property
    def lock(self) -> Path:
        """The lock file: beside the folders, so that it survives emptying and renaming them."""
        return self._beside(".lock")

    def _beside(self, suffix: str) -> Path:
        return self.path.with_name(self.path.name + suffix)

    @property
    def home(self) -> Path:
        """The folder that holds the result now: `path`, or `old` between the two renames of a publication."""
        path = self.path
        if os.path.exists(path):
            return path
        return self.old if (self.old / MANIFEST_FILE).exists() else path

    def manifest(self) -> Manifest | None:
        """Return the manifest, or None when nothing was published; CorruptManifest when it cannot be used."""
        home = self.home
        return Manifest.read(home / MANIFEST_FILE) if os.path.exists(home) else None

    def check(self, verify: bool = False, read: Sequence[str] = (), manifest: Manifest | None = None) -> list[str]:
        """Return problems such as `features.npy: 10 bytes, manifest says 20`.

        The sizes of all files are compared, and the digests of the files that are to be `read`: names, or folders that
        end in `/`. `verify`: the digests of all files. `manifest`: what `manifest()` returned, where it was just read.
        """
        return folder_problems(self.home, verify=verify, read=read, manifest=manifest)


def folder_problems(
    folder: Path, *, verify: bool, read: Sequence[str] = (), manifest: Manifest | None = None
) -> list[str]:
    """Return a line for each file in which a folder and its manifest differ; the arguments are `Artifact.check`'s."""
    try:
        outputs = (manifest or Manifest.read(folder / MANIFEST_FILE)).outputs
    except CorruptManifest as error:
        return [str(error)]
    unknown = [name for name in read if not any(_is_in(each, name) for each in outputs)]
    hashed = {each for each in outputs if verify or any(_is_in(each, name) for name in read)}
    found = ((name, _file_problem(folder / name, outputs[name], name in hashed)) for name in sorted(outputs))
    return [
        *(f"{name}: the manifest does not name it" for name in unknown),
        *(f"{name}: {problem}" for name, problem in found if problem),
    ]


def _is_in(file: str, name: str) -> bool:
    return file.startswith(name) if name.endswith("/") else file == name


def _file_problem(path: Path, entry: FileDigest, verify: bool) -> str | None:
    if not os.path.isfile(path):
        return "missing"
    size = os.stat(path).st_size
    if size != entry["bytes"]:
        return f"{size} bytes, manifest says {entry['bytes']}"
    return "sha256 differs" if verify and known_digest(path) != entry["sha256"] else None


@dataclass(frozen=True)
class RunFolder:
    """A run on disk. `create` makes a run folder, `open` opens one; both check it."""

    root: Path

    @property
    def config_path(self) -> Path:
        """The resolved configuration."""
        return self.root / CONFIG_FILE

    def artifact(self, node: Node | str) -> Artifact:
        """Return the artifact of a node or of a name (`clusters/k00256`), whether it exists on disk or not."""
        return Artifact(self.root, Node.parse(node) if isinstance(node, str) else node)

    @classmethod
    def create(cls, root: Path) -> RunFolder:
        """Make an empty run folder, or open the existing one; RunFolderError for a folder with other content."""
        if (root / RUN_FILE).exists():
            return cls.open(root, writable=True)
        if root.exists() and not root.is_dir():
            raise RunFolderError(f"{root} is a file; give the name of a folder for the run.")
        with storage_errors(root):
            root.mkdir(parents=True, exist_ok=True)
            if any(not is_scratch(entry.name) for entry in root.iterdir()):
                raise RunFolderError(f"{root} holds other files and is not a run folder; choose a new or empty folder.")
            remove_dead_drafts(root)
        atomic_write_json(root / RUN_FILE, {"format": FORMAT})
        return cls(root)

    @classmethod
    def open(cls, root: Path, *, writable: bool = False) -> RunFolder:
        """Open an existing run folder; StorageError where `writable` is asked for and this user cannot write to it."""
        advice = f"make one with `grappa init {quoted(root)} --images ...`"
        if not root.is_dir():
            raise RunFolderError(f"There is no run folder {root}; {advice}.")
        if not (root / RUN_FILE).exists():
            raise RunFolderError(f"{root} is not a run folder (it has no {RUN_FILE}); {advice}.")
        _check_run_format(root / RUN_FILE)
        if writable and not os.access(root, os.W_OK | os.X_OK):
            cause = PermissionError(errno.EACCES, "no write permission", str(root))
            raise StorageError(errno.EACCES, storage_sentence(cause, root))
        if writable:
            remove_dead_drafts(root)
        return cls(root)


def _check_run_format(path: Path) -> None:
    try:
        content = json.loads(path.read_bytes())
    except ValueError:
        content = None
    version = content.get("format") if isinstance(content, dict) else None
    if not isinstance(version, int):
        raise RunFolderError(f'{path} is damaged; it should read {{"format": {FORMAT}}}.')
    if version > FORMAT:
        advice = f"this version reads up to {FORMAT}; update grappa"
        raise RunFolderError(f"{path.parent} has run format {version}, {advice}.")


def published(folder: RunFolder, node: Node | str, *files: str) -> Path:
    """Return the folder of a published artifact whose ``files`` (default: all) are what the manifest says.

    The sizes of all files are checked, and the digests of ``files`` (names, or folders that end in ``/``), once for
    each file and time stamp. Where the artifact is missing, a ValueError names the command that makes it; where it is
    damaged, a DamagedError names file and command.
    """
    artifact = folder.artifact(node)
    if not artifact.home.exists():
        command = f"grappa run {quoted(folder.root)} --until {artifact.node.stage}"
        raise ValueError(f"{artifact.name} is missing in {folder.root}; run `{command}`")
    problems = artifact.check(verify=not files, read=files)
    if problems:
        raise DamagedError(damage_sentence(folder, artifact.name, problems))
    return artifact.home


def damage_sentence(folder: RunFolder, name: str, problems: Sequence[str]) -> str:
    """Return the sentence that names a damaged artifact, its first problem and the command that repairs it."""
    more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
    return f"{name} in {folder.root} is damaged ({problems[0]}{more}); repair it by `{repair_command(folder, name)}`"


def repair_command(folder: RunFolder, name: str) -> str:
    """Return the command that makes a damaged artifact again."""
    if name.startswith("additions/"):
        again, number = f"grappa add {quoted(folder.root)}", name.removeprefix("additions/")
        if number == "removed":
            return f"rm -r {quoted(folder.root)}/{name}` and `grappa remove {quoted(folder.root)} ..."
        decoded = number.isdecimal()  # its images must be decoded again, from files that only the user knows
        return f"rm -r {quoted(folder.root)}/additions/{number}*` and `{again} --images ..." if decoded else again
    return f"grappa init {quoted(folder.root)}" if name == "sources" else f"grappa run {quoted(folder.root)} --verify"


def readable_manifest(folder: RunFolder, node: Node | str) -> Manifest | None:
    """Return the manifest of an artifact, or None when nothing was published; DamagedError when it cannot be used."""
    artifact = folder.artifact(node)
    try:
        return artifact.manifest()
    except CorruptManifest as error:
        raise DamagedError(damage_sentence(folder, artifact.name, [str(error)])) from None


def check_same_origin(folder: RunFolder, *names: str) -> None:
    """Refuse artifacts that were made from different inputs: the digests of an input that two of them share must agree.

    ``names`` are artifact names such as ``model`` or ``clusters/k00256``. Where one of these artifacts is an input of
    another one, the digests must agree too. The ValueError names the most upstream artifact that differs and the
    command that makes all of them agree.
    """
    seen: dict[tuple[str, str], str] = {}
    differing: set[str] = set()
    for name in names:
        manifest = readable_manifest(folder, name)
        for place, digest in _digests(name, manifest).items() if manifest else ():
            if seen.setdefault(place, digest) != digest:
                differing.add(place[0])
    if differing:
        raise ValueError(
            f"{', '.join(names)} in {folder.root} do not belong together: {min(differing, key=_place_in_graph)} was "
            f"made again in between; run `grappa run {quoted(folder.root)}`"
        )


def _place_in_graph(name: str) -> tuple[int, str]:
    """Return a key that sorts artifacts from upstream to downstream; inputs that no stage makes come first."""
    stages = [stage.name for stage in STAGES]
    stage = name.partition("/")[0]
    return stages.index(stage) if stage in stages else -1, name


def _digests(name: str, manifest: Manifest) -> dict[tuple[str, str], str]:
    inputs = {
        (each, file): digest for each, files in manifest.fingerprint["inputs"].items() for file, digest in files.items()
    }
    return inputs | {(name, file): str(entry["sha256"]) for file, entry in manifest.outputs.items()}
