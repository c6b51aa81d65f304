"""Making one artifact: work in a folder of one's own, resume it after a crash, publish it by rename.

After a crash at any step either the former result or the new one is whole on disk. `recover` (also the first step of
`open_work`) gives it its name: a partial folder with a whole manifest is published, a lone `.old` is renamed back.

The holder of the lock works in `<artifact>.partial.<token of its lock>`. The next holder renames this folder before it
does anything else. So a process that has lost its lock, wherever it slept, cannot publish: the folder that it would
rename is gone. Unfinished work of nobody rests in `<artifact>.partial`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from grappa.core.atomic import fsync_folder
from grappa.core.notes import Claim, UntrustedError, parse_json, read_note, write_note
from grappa.pipeline.store.artifacts import (
    CHECKPOINT_FILES,
    FINGERPRINT_FILE,
    LOG_FILE,
    MANIFEST_FILE,
    RESOLVED_FILE,
    SCRATCH_FOLDER,
    Artifact,
    FileDigest,
    Fingerprint,
    Manifest,
    folder_problems,
)
from grappa.pipeline.store.digests import Stamp, file_stamp, note_digest, read_digest
from grappa.pipeline.store.locks import Lock, LockedError, acquire, remains
from grappa.pipeline.store.storage import (
    atomic_write_json,
    atomic_write_text,
    is_disk_full,
    is_scratch,
    read_json_lines,
    storage_errors,
)

DROPPED_FILES = (FINGERPRINT_FILE, *CHECKPOINT_FILES)


class OtherBytesError(ValueError):
    """A copied file has other bytes than its manifest says; the message names the file."""


class _OtherWork(Exception):
    """There is no unfinished work with this fingerprint."""


class Work:
    """An artifact that is locked and being made: a context manager; write the outputs below `path`, then `publish`.

    `resumed`: `path` holds unfinished work with the same fingerprint. `dropped`: why unfinished work was damaged and
    thrown away, or "". `finished`: the manifest, where a crash had interrupted the publication of this fingerprint and
    `open_work` has completed it; else None. An exception leaves `path` as it is, for the next try.
    """

    def __init__(
        self, artifact: Artifact, fingerprint: Fingerprint, lock: Lock, *, finished: Manifest | None = None
    ) -> None:
        self.artifact, self.fingerprint, self.path = artifact, fingerprint, artifact.partial_of(lock.token)
        self.finished, self.resumed, self.dropped = finished, False, ""
        self._lock = lock
        self._kept: dict[str, Any] = {}
        self._written: dict[Path, tuple[Stamp, Claim]] = {}

    def prepare(self) -> None:
        """Keep the files of unfinished work with this fingerprint, or begin with an empty folder."""
        try:
            self._kept = _unfinished(self.path, self.fingerprint)
            self.resumed = True
        except UntrustedError as error:
            self.dropped = str(error)
        except _OtherWork:
            pass
        if not self.resumed:
            _remove_folder(self.path)
            self.path.mkdir()
            atomic_write_json(self.path / FINGERPRINT_FILE, self.fingerprint)

    def kept(self, name: str, value: Any) -> Any:
        """Return the value (JSON) of this name with which the work began: ``value``, where it has none yet."""
        if name not in self._kept:
            self._kept[name] = value
            with storage_errors(self.path):
                write_note(self.path / RESOLVED_FILE, self._kept)
        return self._kept[name]

    def written(self, file: Path, claim: Claim) -> None:
        """Note size and digest of a whole output, summed when it was written: `publish` does not read it again."""
        self._written[file] = file_stamp(file), claim

    def log(self, record: Mapping[str, Any]) -> None:
        """Append a line with the time to `log.jsonl`; the file is published but is no part of the identity."""
        line = json.dumps({"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **record})
        with storage_errors(self.path), (self.path / LOG_FILE).open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def publish(self, provenance: Mapping[str, Any], *, copied: Manifest | None = None) -> Manifest:
        """Hash and sync every output, write the manifest last and give the folder its name.

        `copied`: the manifest of the artifact whose files these are; OtherBytesError where a file has other bytes.
        """
        self._lock.check()
        with storage_errors(self.path):
            _remove_drafts(self.path)
            manifest = Manifest(self.fingerprint, _seal_outputs(self.path, self._written), provenance)
            if copied is not None:
                _refuse_other_bytes(manifest.outputs, copied.outputs)
            atomic_write_json(self.path / MANIFEST_FILE, manifest.to_json())
            _swap(self.artifact, self._lock)
        return manifest

    def start_over(self) -> None:
        """Empty the partial folder and mark it, so that no later try resumes from files that are put there now."""
        with storage_errors(self.path):
            _remove_folder(self.path)
            self.path.mkdir()
            atomic_write_json(self.path / FINGERPRINT_FILE, {"resumable": False})

    def close(self) -> None:
        """Let unfinished work rest for the next holder, and release the lock."""
        _rest(self.artifact, self._lock)
        self._lock.release()

    def __enter__(self) -> Work:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        held = self._lock.is_held()
        self.close()
        if isinstance(error, OSError) and not held:  # the next holder has taken the folder of this process away
            raise self._lock.lost() from error
        if isinstance(error, OSError) and is_disk_full(error):
            with storage_errors(self.path):
                raise error


def open_work(artifact: Artifact, fingerprint: Fingerprint, *, job: str | None = None) -> Work:
    """Lock the artifact and prepare its partial folder, whose files stay if their fingerprint is the same.

    Raises LockedError while another process writes the artifact, StorageError when the folder cannot be written.
    """
    wanted = json.loads(json.dumps(fingerprint, allow_nan=False))
    with storage_errors(artifact.root):
        artifact.path.parent.mkdir(parents=True, exist_ok=True)
    lock = acquire(artifact.lock, what=artifact.name, job=job)
    try:
        with storage_errors(artifact.partial):
            _take(artifact, lock, wanted)
            published = _recover(artifact, lock)
            finished = published if published and published.fingerprint == wanted else None
            work = Work(artifact, wanted, lock, finished=finished)
            work.prepare()
    except BaseException:
        _rest(artifact, lock)
        lock.release()
        raise
    return work


def recover(artifact: Artifact, *, job: str | None = None) -> None:
    """Complete or undo a publication that a crash interrupted, and remove the lock of a dead process.

    Nothing happens while a living process writes. The call is cheap when there is nothing to recover.
    """
    finished = any((path / MANIFEST_FILE).exists() for path in artifact.unfinished())
    if not (finished or artifact.old.exists() or remains(artifact.lock)):
        return
    with (
        suppress(LockedError),
        acquire(artifact.lock, what=artifact.name, job=job) as lock,
        storage_errors(artifact.path),
    ):
        _take(artifact, lock, None)
        _recover(artifact, lock)
        _rest(artifact, lock)


def _take(artifact: Artifact, lock: Lock, wanted: Fingerprint | None) -> None:
    """Take over the unfinished work that a former holder left, and keep it from a former holder that still lives.

    Of several folders the one stays that is finished, or else whose fingerprint is `wanted` (None: that has one).
    """

    def use(folder: Path) -> tuple[bool, bool]:
        with suppress(UntrustedError):
            stored = _stored_fingerprint(folder)
            return _is_whole(folder), stored is not None and wanted in (None, stored)
        return _is_whole(folder), False

    found = sorted(artifact.unfinished(), key=use)
    for folder in found[:-1]:
        _remove_folder(folder)
    for folder in found[-1:]:
        os.rename(folder, artifact.partial_of(lock.token))
        fsync_folder(folder.parent)


def _rest(artifact: Artifact, lock: Lock) -> None:
    """Give unfinished work the name under which it rests; nothing where the next holder has taken it already."""
    with suppress(OSError):
        os.rename(artifact.partial_of(lock.token), artifact.partial)


def _recover(artifact: Artifact, lock: Lock) -> Manifest | None:
    """Recover while the lock is held; return the manifest if an interrupted publication was completed."""
    if _is_whole(artifact.partial_of(lock.token), verify=True):
        _swap(artifact, lock)
        return artifact.manifest()
    if artifact.old.exists():
        if _is_whole(artifact.path):
            _remove_folder(artifact.old)
        elif not artifact.path.exists() and _is_whole(artifact.old):
            os.rename(artifact.old, artifact.path)
            fsync_folder(artifact.path.parent)
    return None


def _is_whole(folder: Path, *, verify: bool = False) -> bool:
    return (folder / MANIFEST_FILE).exists() and not folder_problems(folder, verify=verify)


def _unfinished(partial: Path, fingerprint: Fingerprint) -> dict[str, Any]:
    """Make the partial folder ready to go on with, and return the values with which the work began.

    Raises _OtherWork where it holds no work of this fingerprint, UntrustedError where its own files are damaged.
    """
    if _stored_fingerprint(partial) != fingerprint:
        raise _OtherWork
    kept = read_note(partial / RESOLVED_FILE) or {}
    (partial / MANIFEST_FILE).unlink(missing_ok=True)
    _remove_drafts(partial)
    _drop_other_lines(partial / LOG_FILE)
    return kept


def _stored_fingerprint(partial: Path) -> object:
    try:
        return parse_json((partial / FINGERPRINT_FILE).read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        raise UntrustedError(f"{FINGERPRINT_FILE} is damaged") from None


def _drop_other_lines(log: Path) -> None:
    """Remove lines that are no JSON, such as an unfinished last one, so that the next line begins a new one."""
    if log.exists():
        kept = "".join(json.dumps(record) + "\n" for record in read_json_lines(log))
        if kept.encode() != log.read_bytes():
            atomic_write_text(log, kept)


def _remove_drafts(folder: Path) -> None:
    for path in folder.rglob(".*.tmp"):
        if is_scratch(path.name) and path.is_file():
            path.unlink()


def _seal_outputs(folder: Path, written: Mapping[Path, tuple[Stamp, Claim]]) -> dict[str, FileDigest]:
    """Return the digests of all outputs by relative name; every file and folder is synced to the disk.

    A file that is noted as `written`, and has changed in nothing since, is not read.
    """
    outputs: dict[str, FileDigest] = {}
    for parent, _, files in os.walk(folder, topdown=False):
        if Path(parent).relative_to(folder).parts[:1] == (SCRATCH_FOLDER,):
            continue
        for name in files:
            path = Path(parent, name)
            _fsync_file(path)
            relative = path.relative_to(folder).as_posix()
            if relative not in (*DROPPED_FILES, LOG_FILE, MANIFEST_FILE):
                outputs[relative] = _digest(path, written.get(path))
        fsync_folder(Path(parent))
    return dict(sorted(outputs.items()))


def _digest(path: Path, written: tuple[Stamp, Claim] | None) -> FileDigest:
    if written and written[0] == file_stamp(path) and written[1]["bytes"] == written[0][2]:
        note_digest(path, written[1]["sha256"])
        return {"bytes": written[1]["bytes"], "sha256": written[1]["sha256"]}
    size, sha256 = read_digest(path)
    return {"bytes": size, "sha256": sha256}


def _refuse_other_bytes(found: Mapping[str, FileDigest], wanted: Mapping[str, FileDigest]) -> None:
    for name in sorted({*found, *wanted}):
        if found.get(name) != wanted.get(name):
            raise OtherBytesError(f"{name}: {'sha256 differs' if name in found else 'missing'}")


def _fsync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _swap(artifact: Artifact, lock: Lock) -> None:
    """Give the whole partial folder of the lock's holder its name; every step can be repeated after a crash.

    The last rename is the proof that the lock is held: LockLostError where the next holder has taken the folder.
    """
    parent, own = artifact.path.parent, artifact.partial_of(lock.token)
    for name in DROPPED_FILES:
        (own / name).unlink(missing_ok=True)
    shutil.rmtree(own / SCRATCH_FOLDER, ignore_errors=True)
    fsync_folder(own)
    if artifact.path.exists():
        _remove_folder(artifact.old)
        lock.check()
        os.rename(artifact.path, artifact.old)
        fsync_folder(parent)
    try:
        os.rename(own, artifact.path)
    except FileNotFoundError:
        with suppress(OSError):  # it fails where the next holder has published
            os.rename(artifact.old, artifact.path)
        raise lock.lost() from None
    fsync_folder(parent)
    with suppress(OSError):  # the result is published; files that a network file system keeps are deleted the next time
        _remove_folder(artifact.old)


def _remove_folder(folder: Path) -> None:
    """Delete a folder. The files that make it look whole or resumable go first, so that no half of it is ever used."""
    if not folder.exists():
        return
    for name in (MANIFEST_FILE, FINGERPRINT_FILE):
        (folder / name).unlink(missing_ok=True)
    fsync_folder(folder)
    shutil.rmtree(folder)
