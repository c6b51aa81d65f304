"""Paths as texts of a table, and what is there: sizes, and the error of everything that lists images."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

MISSING = -1  # the size of a listed file that is not there, or is not a regular file
UNKNOWN = -2  # the size of an image that is not known before it is read
# The columns of a listing with images that are no local files of their own: where in its file an image begins (-1: it
# is the file), and what tells whether the file is still the listed one ("": nothing).
PLACE_COLUMNS = ("offset", "version")
# What the escape produces: an undecodable byte (80-FF), or the percent sign of a text that looks like an escape.
_ESCAPED = re.compile(r"%(25|[89A-F][0-9A-F])")
_TO_ESCAPE = re.compile(r"%(?=25|[89A-F][0-9A-F])|[\udc80-\udcff]")


class ImageTableError(ValueError):
    """The listed images or the table that lists them break a rule; the message says which rule, and what to do."""


def escape_path(path: str) -> str:
    """Return ``path`` with each undecodable byte as ``%XX``; names that are proper UTF-8 stay as they are.

    Only a percent sign in front of ``25`` or of two digits ``80``-``FF`` becomes ``%25``, so that
    ``unescape_path(escape_path(path)) == path`` for every path of the file system (``os.fsdecode`` form).
    """
    return _TO_ESCAPE.sub(lambda found: f"%{ord(found[0]) & 0xFF:02X}", path)


def unescape_path(text: str) -> str:
    """Return the path (``os.fsdecode`` form, what ``open`` takes) whose escaped text is ``text``."""
    return _ESCAPED.sub(lambda found: _character(int(found[1], 16)), text)


def image_file(root: str, path: str) -> str:
    """Return the file to open for an image table's escaped ``root`` and ``path``."""
    return os.path.join(unescape_path(root), unescape_path(path))


def show(path: str | Path) -> str:
    """Return a path for a sentence."""
    return escape_path(str(path))


def tell(path: str | Path) -> str:
    """Return a path for a sentence; a URL without what may be secret."""
    text = str(path)
    return show(bare(text) if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", text) else text)


def bare(url: str) -> str:
    """Return a URL for a sentence: without user, password and query, which may be secret."""
    scheme, separator, rest = url.partition("://")
    host, slash, path = rest.partition("?")[0].partition("/")
    return f"{scheme}{separator}{host.rpartition('@')[2]}{slash}{path}"


def size_of(file: str) -> int:
    """Return the bytes of a regular file, ``MISSING`` for everything else."""
    try:
        status = os.stat(file)
    except (OSError, ValueError):
        return MISSING
    return status.st_size if stat.S_ISREG(status.st_mode) else MISSING


def _character(byte: int) -> str:
    return "%" if byte == 0x25 else chr(0xDC00 + byte)
