"""Folders of images: which of their files are listed, and what the names of the folders mean.

A *layout* names what the folders above a file are, from the outside to the inside: ``domain/class``, ``class`` (one
domain, as torchvision's ImageFolder), ``flat`` (one domain, no labels), and the same with ``split``.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pyarrow as pa

from grappa.images.paths import MISSING, ImageTableError, size_of, tell
from grappa.images.sources.columns import BLOCK, TEXT, escaped
from grappa.images.sources.urls import Remote

LAYOUTS = ("domain/class", "class", "flat", "split/domain/class", "split/class", "split/flat", "domain/split/class")
MOST_DOMAINS = 5  # more folders than these, with nothing but files in them, are taken for classes
_SPLIT = re.compile(r"(?i)(train|training|val|valid|validation|dev|test|testing|eval|evaluation)([-_ ]?\d+)?")
# Endings of files that lie beside images and are none. What could be an image, HEIC and raw formats too, is listed.
_NO_IMAGES = frozenset(
    "7z aae avi bak bin bz2 c cfg cpp css csv db doc docx gz h h5 hdf5 htm html ini ipynb js json jsonl lnk lock log "
    "m4a mat md md5 mkv mov mp3 mp4 npy npz parquet part pdf pickle pkl pt pth py r rar rst rtf safetensors sh sha1 "
    "sha256 sqlite sqlite3 tar tex tgz tmp toml tsv txt url wav webm xls xlsx xml xmp xz yaml yml zip".split()
)
_NO_IMAGE_NAMES = frozenset(
    "authors changelog changes citation copying license licence makefile manifest notice readme".split()
)
# Folders in which systems and storage devices keep thumbnails and deleted files.
_SYSTEM_FOLDERS = frozenset(
    [
        *("@eadir", "@recycle", "@recently-snapshot", "@sharebin", "@tmp", "#recycle", "#snapshot", "$recycle.bin"),
        *("recycler", "system volume information", "lost+found", "__macosx", "network trash folder", "temporary items"),
    ]
)
SHARDS = (".tar", ".parquet")  # files that may hold many images each
_LINKS = ("link to a folder that is listed already", "links to folders that are listed already")
_RUN, _MODEL, _REPORT = "run.json", {"model.json", "weights.safetensors"}, {"index.html", "results.md"}


@dataclass
class Found:
    """What lies in a folder: its files, its shards, and how much of what was passed over.

    ``shards``: the tars and Parquet files, which are passed over too, as paths relative to it (``os.fsdecode`` form).
    """

    passed_files: Counter[str] = field(default_factory=Counter)
    passed_folders: Counter[str] = field(default_factory=Counter)
    passed_links: Counter[str] = field(default_factory=Counter)
    shards: list[str] = field(default_factory=list)
    _tables: list[pa.Table] = field(default_factory=list)
    _waiting: dict[str, list[Any]] = field(default_factory=lambda: {"path": [], "size": [], "version": []})

    def add(self, path: str, size: int, version: str = "") -> None:
        """Add a file, by its path relative to the folder, or pass it over because it is evidently no image."""
        ending = evidently_no_image(os.path.basename(path))
        if ending:
            self.passed_files[ending] += 1
            if ending in SHARDS:
                self.shards.append(path)
            return
        for column, value in zip(self._waiting.values(), (path, size, version), strict=True):
            column.append(value)
        if len(self._waiting["path"]) == BLOCK:
            self._flush()

    def add_remote(self, remote: Remote) -> None:
        """Add an object below a URL: as a file of a folder would be, or passed over, or not visible."""
        folders = remote.path.split("/")[:-1]
        hidden = any(part.startswith(".") for part in remote.path.split("/"))
        system = next((name for name in folders if is_system_folder(name)), None)
        if system is not None:
            self.passed_folders[system] += 1
        elif not hidden and remote.path:
            self.add(remote.path, remote.size, remote.version)

    @property
    def files(self) -> pa.Table:
        """The files: ``path`` relative to the folder (escaped), ``size`` in bytes, ``version``."""
        self._flush()
        kinds = pa.schema([("path", TEXT), ("size", pa.int64()), ("version", TEXT)])
        return pa.concat_tables([kinds.empty_table(), *self._tables])

    def _flush(self) -> None:
        paths, sizes, versions = self._waiting.values()
        if paths:
            columns = {"path": escaped(paths), "size": pa.array(sizes, pa.int64()), "version": pa.array(versions, TEXT)}
            self._tables.append(pa.table(columns))
        self._waiting = {name: [] for name in self._waiting}


class Place(NamedTuple):
    """What a layout says of a file."""

    domain: str
    label: str | None
    split: str | None


def find_files(root: str) -> Found:
    """Find every visible file of a folder, through links too; each folder is listed once, however many ways lead to it.

    Links are followed after all else, in the order in which they are found, so that a folder is listed where it truly
    lies if that is in ``root``. Passed over, and counted by ending or name: files that are evidently no images, folders
    of the operating system or the storage device, folders that hold a run, a model or a report of Grappa, and links to
    folders that are listed already. An entry that cannot be followed (a dangling link, a link to itself) is a file of
    the size ``MISSING``.
    """
    found, seen = Found(), set[tuple[int, int]]()
    waiting, links = [(root, "")], deque[str]()
    linked = False  # whether the folders that wait were reached by a link, so that they may be known
    while waiting or links:
        if not waiting:
            path, linked = links.popleft(), True
            waiting.append((os.path.join(root, path), path))
        place, folder = waiting.pop()
        identity = _identity(place)
        if linked and identity in seen:
            found.passed_links[folder] += 1
            continue
        seen.add(identity)
        for entry in _entries_to_list(place, folder, found):
            path = os.path.join(folder, entry.name)
            if entry.is_symlink():
                links.append(path)
            else:
                waiting.append((entry.path, path))
    return found


def _entries_to_list(place: str, folder: str, found: Found) -> Iterator[os.DirEntry[str]]:
    """Add the files of a folder to ``found``, and yield the folders in it."""
    entries = _entries(place)
    if _made_by_grappa(place, {entry.name for entry in entries}):
        found.passed_folders[folder or "."] += 1
        return
    for entry in entries:
        if _is_folder(entry):
            if is_system_folder(entry.name):
                found.passed_folders[entry.name] += 1
            else:
                yield entry
        elif evidently_no_image(entry.name):
            found.add(os.path.join(folder, entry.name), MISSING)
        elif entry.is_symlink() or entry.is_file():
            found.add(os.path.join(folder, entry.name), size_of(entry.path))


def is_system_folder(name: str) -> bool:
    """Tell whether systems and storage devices call a folder so in which they keep thumbnails or deleted files."""
    return name.lower() in _SYSTEM_FOLDERS


def is_split(name: str) -> bool:
    """Tell whether a folder's name is that of a split, such as ``train`` or ``val2017``."""
    return _SPLIT.fullmatch(name) is not None


def split_of(name: str) -> str:
    """Return ``train`` or ``test`` for a split's name; images of a validation split are tested, never learned from."""
    return "train" if name.lower().startswith("train") else "test"


def recognize(paths: Sequence[str]) -> str:
    """Return the layout that the paths of a folder's files most likely have."""
    above = [path.split("/")[:-1] for path in paths]
    depths = {len(folders) for folders in above}
    if depths == {0}:
        return "flat"
    if _are_splits([folders[0] for folders in above if folders]) and 0 not in depths:
        return {1: "split/flat", 2: "split/class"}.get(max(depths), "split/domain/class")
    if min(depths) > 1 and _are_splits([folders[1] for folders in above]):
        return "domain/split/class"
    if depths == {1} and len({folders[0] for folders in above}) > MOST_DOMAINS:
        return "class"
    return "domain/class"


def place(layout: str, root: str, path: str, domain: str | None = None) -> Place:
    """Return domain, label and split of a file by a layout.

    domain: the domain of files for which the layout names none; None: the name of the folder ``root``.

    Raises:
        ImageTableError: the file lies directly in ``root`` where a domain or a split is expected, or in a folder that
            is no split.
    """
    roles = [] if layout == "flat" else layout.removesuffix("/flat").split("/")
    names = dict(zip(roles, path.split("/")[:-1], strict=False))
    if "split" in roles and not is_split(names.get("split", "")):
        raise ImageTableError(
            f"{tell(path)} in {tell(root)} lies in no split: by the layout {layout} expected folders called train, val "
            "or test; give another --layout, or a table"
        )
    if "domain" in roles and "domain" not in names and domain is None:
        raise ImageTableError(
            f"{tell(path)} lies directly in {tell(root)}: expected DOMAIN/image; move it into a folder named after its "
            "domain, say --layout flat (all images are one domain), or give a table"
        )
    given = os.path.basename(root) or "images" if domain is None else domain
    return Place(names.get("domain", given), names.get("class"), split_of(names["split"]) if "split" in roles else None)


def _are_splits(names: Sequence[str]) -> bool:
    return all(map(is_split, names)) and any(split_of(name) == "train" for name in names)


def _identity(folder: str) -> tuple[int, int]:
    """Return what tells a folder from all others, by whatever path it is reached."""
    try:
        status = os.stat(folder)
    except OSError as error:
        raise _unreadable(folder, error) from error
    return status.st_dev, status.st_ino


def _entries(folder: str) -> list[os.DirEntry[str]]:
    """Return a folder's visible entries by name."""
    try:
        with os.scandir(folder) as entries:
            return sorted((each for each in entries if not each.name.startswith(".")), key=lambda each: each.name)
    except OSError as error:
        raise _unreadable(folder, error) from error


def _unreadable(folder: str, error: OSError) -> ImageTableError:
    return ImageTableError(f"cannot read the folder {tell(folder)}: {error.strerror}; make it readable")


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def evidently_no_image(name: str) -> str:
    """Return the ending (or the name) of a file that is evidently no image, else an empty text."""
    stem, ending = os.path.splitext(name)
    if ending:
        return ending.lower() if ending[1:].lower() in _NO_IMAGES else ""
    return stem if stem.lower() in _NO_IMAGE_NAMES else ""


def _made_by_grappa(folder: str, names: set[str]) -> bool:
    return names >= _MODEL or names >= _REPORT or (_RUN in names and _is_run_file(os.path.join(folder, _RUN)))


def _is_run_file(file: str) -> bool:
    """Tell whether a file is the marker of a run folder, which holds the number of its format and nothing else."""
    if size_of(file) == MISSING:
        return False
    try:
        with open(file, "rb") as opened:
            content = json.loads(opened.read(4096))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and set(content) == {"format"}


def passed_over(found: Sequence[Found]) -> Iterator[str]:
    """Yield what was passed over, in words: ``8 files (.db 8)``, ``2 folders (@eaDir 2)``."""
    files = sum((each.passed_files for each in found), Counter[str]())
    folders = sum((each.passed_folders for each in found), Counter[str]())
    links = sum((each.passed_links for each in found), Counter[str]())
    kinds = (("file", "files", files), ("folder", "folders", folders), (*_LINKS, links))
    yield from (_counted(one, several, counts) for one, several, counts in kinds if counts)


def _counted(one: str, several: str, counts: Counter[str]) -> str:
    ordered = sorted(counts.items(), key=lambda each: (-each[1], each[0]))
    names = [f"{tell(name)} {count}" for name, count in ordered[:3]]
    more = f" and {len(ordered) - 3} more" if len(ordered) > 3 else ""
    return f"{counts.total()} {several if counts.total() > 1 else one} ({', '.join(names)}{more})"
