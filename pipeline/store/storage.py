"""Writes that never leave half a file, digests, and disk errors said in a sentence."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from grappa.core.atomic import write_whole


class StorageError(OSError):
    """The disk is full or a folder cannot be written; `str()` is one sentence for the user, `errno` the cause."""

    def __str__(self) -> str:
        return str(self.strerror)


def file_digest(path: Path) -> tuple[int, str]:
    """(bytes, sha256 in hex) of a file, read in pieces."""
    with path.open("rb", buffering=0) as file:
        digest = hashlib.file_digest(file, "sha256")
        return file.tell(), digest.hexdigest()


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Writes the whole file or, on any error or crash, leaves the former one; StorageError when it cannot."""
    draft = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    with storage_errors(path):
        write_whole(path, lambda file: file.write(data), draft=draft)


def atomic_write_text(path: Path, text: str) -> None:
    """`atomic_write_bytes` in UTF-8; the odd bytes of file names (surrogate escapes) go back to what they were."""
    atomic_write_bytes(path, text.encode(errors="surrogateescape"))


def atomic_write_json(path: Path, content: object) -> None:
    """`atomic_write_bytes` of indented JSON; NaN and infinity are refused (ValueError)."""
    atomic_write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def is_scratch(name: str) -> bool:
    """Whether a file name is that of an unfinished atomic write."""
    return name.startswith(".") and name.endswith(".tmp")


def refuse_existing(folder: Path) -> None:
    """ValueError when something has this name already; for work that should not begin in vain."""
    if os.path.lexists(folder):
        raise ValueError(f"{folder} exists already; give a new folder")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yields an empty draft of ``folder``, which appears under its name when the block ends well, or not at all."""
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
    """Turns "disk full" and "may not write" into a StorageError that names the place and the fix."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        if is_disk_full(error) or error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise StorageError(error.errno, storage_sentence(error, path)) from error
        raise


def is_disk_full(error: OSError) -> bool:
    """Whether the disk (or a quota) was full; numpy's short writes carry no errno but these words."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT) or bool(re.search(r"requested and \d+ written", str(error)))


def storage_sentence(error: OSError, path: Path) -> str:
    """What a user reads when the disk at `path` is full or may not be written."""
    if is_disk_full(error):
        return f"The disk is full at {path}; free some space and give the same command again, nothing finished is lost."
    place = error.filename or path
    return f"{place} cannot be written ({error.strerror}); make it writable for this user or use another run folder."
