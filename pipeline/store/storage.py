"""Files written whole or not at all, digests of files, and disk errors in one sentence."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from grappa.core.atomic import write_whole
from grappa.core.notes import parse_json

_DRAFT = re.compile(r"\..+\.(\d+)-\d+\.tmp")  # of an atomic write: its process and thread


class StorageError(OSError):
    """The disk is full or a folder cannot be written; `str()` is one sentence for the user, `errno` the cause."""

    def __str__(self) -> str:
        return str(self.strerror)


def file_digest(path: Path) -> tuple[int, str]:
    """Return (bytes, sha256 in hex) of a file, which is read in pieces."""
    with path.open("rb", buffering=0) as file:
        digest = hashlib.file_digest(file, "sha256")
        return file.tell(), digest.hexdigest()


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Write the whole file; after an error or a crash the former file is there. StorageError where it cannot write."""
    atomic_write_pieces(path, [data])


def atomic_write_pieces(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    """Write a file by `atomic_write_bytes`, piece after piece, so that it need not be in memory as a whole."""
    draft = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    with storage_errors(path):
        write_whole(path, lambda file: file.writelines(pieces), draft=draft)


def atomic_write_text(path: Path, text: str) -> None:
    """Write UTF-8 text by `atomic_write_bytes`; surrogate escapes (of file names) become their original bytes again."""
    atomic_write_bytes(path, text.encode(errors="surrogateescape"))


def atomic_write_json(path: Path, content: object) -> None:
    """Write indented JSON by `atomic_write_bytes`; ValueError for NaN and infinity."""
    atomic_write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the JSON objects in the lines of a file that a crash may have cut off; other lines are passed over."""
    records = []
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        with suppress(ValueError):
            record = parse_json(line)
            if isinstance(record, dict):
                records.append(record)
    return records


def is_scratch(name: str) -> bool:
    """Tell whether a file name is that of an unfinished atomic write."""
    return name.startswith(".") and name.endswith(".tmp")


def remove_dead_drafts(folder: Path) -> None:
    """Remove the drafts of files that killed processes left in a folder; those of living processes stay."""
    for entry in folder.glob(".*.tmp"):
        owner = _DRAFT.fullmatch(entry.name)
        if owner and entry.is_file() and not _is_alive(int(owner[1])):
            with suppress(OSError):
                entry.unlink()


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # somebody else's process
        return True
    return True


def refuse_existing(folder: Path) -> None:
    """Raise ValueError when a file or folder of this name exists, before long work begins in vain."""
    if os.path.lexists(folder):
        raise ValueError(f"{folder} exists already; give a new name")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty draft of ``folder``, which gets its name when the block ends without an error, or is deleted."""
    refuse_existing(folder)
    draft = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    with storage_errors(folder):
        draft.mkdir(parents=True)
        try:
            yield draft
            os.rename(draft, folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn "disk full" and "may not write" into a StorageError that names the place and the fix."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        if is_disk_full(error) or error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise StorageError(error.errno, storage_sentence(error, path)) from error
        raise


def is_disk_full(error: OSError) -> bool:
    """Tell whether the disk (or a quota) was full; numpy's errors of short writes have these words and no errno."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT) or bool(re.search(r"requested and \d+ written", str(error)))


def storage_sentence(error: OSError, path: Path) -> str:
    """Return the sentence that a user reads when the disk at `path` is full or may not be written."""
    if is_disk_full(error):
        return f"The disk is full at {path}; free some space and give the same command again, nothing finished is lost."
    place = Path(os.fsdecode(error.filename or path))
    if place.name.startswith("."):  # a draft: what may not be written is its folder
        place = place.absolute().parent if place.parent == Path() else place.parent
    return f"{place} cannot be written ({error.strerror}); make it writable for this user, or choose another folder."
