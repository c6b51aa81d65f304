"""Digests of files, read once for each file and time stamp: a process reads a file again only after it has changed."""

from __future__ import annotations

import os
from pathlib import Path

from grappa.pipeline.store.storage import file_digest

Stamp = tuple[int, int, int, int]

_known: dict[Stamp, str] = {}


def read_digest(path: Path) -> tuple[int, str]:
    """Return (bytes, sha256 in hex) of a file, which is read now; this process remembers the digest."""
    stamp, found = file_stamp(path), file_digest(path)
    if stamp == file_stamp(path):  # else the file was written meanwhile
        _known[stamp] = found[1]
    return found


def note_digest(path: Path, sha256: str) -> None:
    """Let this process know the digest of a file that it need not read."""
    _known[file_stamp(path)] = sha256


def known_digest(path: Path) -> str:
    """Return the sha256 of a file in hex; a file that this process has read is read again if its time stamp changed."""
    return _known.get(file_stamp(path)) or read_digest(path)[1]


def forget_digests() -> None:
    """Let every file be read again: damage by a disk changes no time stamp."""
    _known.clear()


def file_stamp(path: Path) -> Stamp:
    """Return what changes when a file is written: device, inode, bytes and time."""
    found = os.stat(path)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
