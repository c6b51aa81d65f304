"""The members of tars whose headers are of the common form, read in a fifth of the time that tarfile takes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from tarfile import BLOCKSIZE
from typing import IO, NamedTuple

# Mode, owner and group; size, time, checksum and kind (a file, a folder, notes on the next member); the device.
_HEADER = re.compile(
    rb"(.{100})(?:[0-7]{6}[0-7 ]\0){3}([0-7]{11})[\0 ][0-7]{11}[\0 ]([0-7]{6})\0 ([05x]).{172}"
    rb"(?:[0-7]{6}[0-7 ]\0|\0{8}){2}(.{155}).{12}",
    re.DOTALL,
)
_TIMES = re.compile(rb"(\d{1,3}) [amc]time=[0-9.]{1,40}\n")
_MOST_NOTES = 1024  # bytes of notes on a member


class File(NamedTuple):
    """A regular file of a tar: its name, its bytes, and where they begin."""

    name: str
    size: int
    offset: int


class NotPlainError(Exception):
    """A header is of another form, or the tar is cut off; tarfile tells what there is to tell."""


class PlainTar:
    """The regular files of a tar, as tarfile finds them; after the last one ``end`` is the byte of the empty block.

    Iterating raises NotPlainError at the first header that has no right checksum, is not of the form that tarfile,
    webdataset, tar and bsdtar write for files and folders with names of their own length, or is not there. Of notes
    (pax) only times are passed over, which webdataset writes.
    """

    def __init__(self, opened: IO[bytes]) -> None:
        self._opened = opened
        self.end = 0

    def __iter__(self) -> Iterator[File]:
        at, noted = 0, False
        while True:
            self._opened.seek(at)
            block = self._opened.read(BLOCKSIZE)
            found = _HEADER.fullmatch(block)
            if found is None:
                if noted or len(block) < BLOCKSIZE or block.strip(b"\0"):
                    raise NotPlainError
                self.end = at
                return
            name, size, checksum, kind, prefix = found.groups()
            if sum(block[:148]) + 256 + sum(block[156:]) != int(checksum, 8):  # its own 8 bytes count as blanks
                raise NotPlainError
            at, noted, length = at + BLOCKSIZE, kind == b"x", int(size, 8)
            if kind == b"0":
                yield File(f"{_text(prefix)}/{_text(name)}" if prefix[0] else _text(name), length, at)
            elif noted:
                _pass_over_times(self._opened, length)
            if kind != b"5":  # whatever size it has, nothing of a folder follows
                at += -(-length // BLOCKSIZE) * BLOCKSIZE


def _text(field: bytes) -> str:
    return os.fsdecode(field.partition(b"\0")[0])


def _pass_over_times(opened: IO[bytes], length: int) -> None:
    """Read the notes on the next member; NotPlainError where they are more than times."""
    notes = opened.read(-(-length // BLOCKSIZE) * BLOCKSIZE) if length <= _MOST_NOTES else b"more"
    times = notes[:length]
    while found := _TIMES.match(times):
        if int(found[1]) != found.end():
            raise NotPlainError
        times = times[found.end() :]
    if times or notes[length:].strip(b"\0"):
        raise NotPlainError
