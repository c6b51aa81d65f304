"""Files that are never half written: a draft is flushed to the disk, then renamed to its place."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

PATH_MAX, NAME_MAX = 4096, 255  # bytes, on Linux; a path's last byte is its end


def write_whole(path: Path, write: Callable[[BinaryIO], object], *, draft: Path | None = None) -> None:
    """Write a file by ``write(file)``; on any error or crash the former file stays as it was.

    draft: the file beside ``path`` that is written first; a crash can leave it there, the next call replaces it. None:
    ``path`` with ".tmp" at its end, which suits a file that has one writer only.
    """
    draft = draft or path.with_name(path.name + ".tmp")
    try:
        with draft.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def too_long(path: object) -> str:
    """Return in words by how much a path is too long for the file system, for an error of the kind ENAMETOOLONG."""
    text = os.fsencode(path) if isinstance(path, str | bytes) else b""
    longest = max(map(len, text.split(b"/")))
    found = f"the path has {len(text)} bytes and a name in it {longest}"
    return f"{found}; a file system has {PATH_MAX} and {NAME_MAX} at most"


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable, where the file system can sync a folder (others answer EINVAL)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)
