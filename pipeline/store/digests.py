"""Digests of files, read once for each file and time stamp: a process reads a file again only after it has changed."""

from __future__ import annotations

import os
from pathlib import Path

from grappa.pipeline.store.storage import file_digest

_known: dict[tuple[int, int, int, int], str] = {}


def read_digest(path: Path) -> tuple[int, str]:
    """Return (bytes, sha256 in hex) of a file, which is read now; this process remembers the digest."""
    stamp, found = _stamp(path), file_digest(path)
    if stamp == _stamp(path):  # else the file was written meanwhile
        _known[stamp] = found[1]
    return found


def known_digest(path: Path) -> str:
    """Return the sha256 of a file in hex; a file that this process has read is read again if its time stamp changed."""
    return _known.get(_stamp(path)) or read_digest(path)[1]


def forget_digests() -> None:
    """Let every file be read again: damage by a disk changes no time stamp."""
    _known.clear()


def _stamp(path: Path) -> tuple[int, int, int, int]:
    found = os.stat(path)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
