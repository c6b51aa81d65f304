"""Notes of unfinished work: JSON that says what was written before it, with digests of itself and of these files.

The data is flushed to the disk before its note is written, and the note appears whole or not at all. Whoever goes on
with the work reads the note first: what has other bytes than were noted is never used (``UntrustedError``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from grappa.core.atomic import write_whole

Claim = dict[str, Any]  # {"bytes", "sha256"} of a file


class UntrustedError(ValueError):
    """Unfinished work is not what its note says, or the note is damaged; the message begins with the file's name."""


def parse_json(data: bytes | str) -> Any:
    """Return the value of a JSON text; ValueError for anything else, also for brackets that are nested too deeply."""
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("the brackets are nested too deeply") from None


class Summed:
    """A file that is written: its size and digest are known without reading it again."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._digest, self._bytes = file, hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        """Write all bytes of a buffer."""
        self._digest.update(data)
        written = self._file.write(data)
        self._bytes += written
        return written

    def claim(self) -> Claim:
        """Return size and digest of what was written so far."""
        return {"bytes": self._bytes, "sha256": self._digest.hexdigest()}


def write_claimed(path: Path, write: Callable[[Summed], object]) -> Claim:
    """Write a file by ``grappa.core.atomic.write_whole``; return its size and digest, summed while it is written."""
    found: Claim = {}

    def summed(file: BinaryIO) -> None:
        counted = Summed(file)
        write(counted)
        found.update(counted.claim())

    write_whole(path, summed)
    return found


def claim(file: Path) -> Claim:
    """Return size and digest of a file that lies on the disk, for its note."""
    with file.open("rb", buffering=0) as opened:
        digest = hashlib.file_digest(opened, "sha256")
        return {"bytes": opened.tell(), "sha256": digest.hexdigest()}


def check_claim(file: Path, claimed: object, *, size_only: bool = False) -> None:
    """Raise UntrustedError where a file is not the one that ``claim`` has seen; ``size_only``: as far as its size."""
    try:
        found = {**claimed, "bytes": file.stat().st_size} if size_only and isinstance(claimed, dict) else claim(file)
    except OSError as error:
        raise UntrustedError(f"{file.name}: {error.strerror}") from None
    if found != claimed:
        raise UntrustedError(f"{file.name} has other bytes than its note says")


def write_note(path: Path, content: Mapping[str, Any]) -> None:
    """Write a note whole or not at all; the data that it is about must have been flushed before."""
    note = {"content": content, "sha256": _digest(content)}
    write_whole(path, lambda file: file.write(json.dumps(note, separators=(",", ":")).encode()))


def read_note(path: Path) -> dict[str, Any] | None:
    """Return the content of a note, or None when there is no note; UntrustedError where it is damaged."""
    try:
        note = parse_json(path.read_bytes())
        content = note["content"]
        whole = isinstance(content, dict) and note["sha256"] == _digest(content)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError):
        whole = False
    if not whole:
        raise UntrustedError(f"{path.name} is damaged")
    found: dict[str, Any] = content
    return found


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
