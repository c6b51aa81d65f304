"""Text of others (names of files, domains and labels, values in files) as one line that a terminal only prints."""

from __future__ import annotations

import re
import reprlib

# What moves the cursor, ends a line, changes colors or the direction of writing: controls (C0, DEL, C1), line and
# paragraph separators, marks of direction, the byte-order mark, and halves of surrogate pairs.
_ACTIVE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


def printable(text: str, *, kept: str = "") -> str:
    """Return ``text`` with every character that a terminal acts upon written out, such as ``\\n`` or ``\\x1b``.

    kept: characters that stay as they are.
    """
    return _ACTIVE.sub(lambda found: found[0] if found[0] in kept else _written_out(found[0]), text)


def _written_out(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def sentence(text: object, *, limit: int = 400) -> str:
    """Return a text as one printable line of at most ``limit`` characters; runs of blanks and newlines become one."""
    line = printable(" ".join(str(text).split()))
    return line if len(line) <= limit else f"{line[: limit - 4]} ..."


def shown(value: object, *, limit: int = 80) -> str:
    """Return a value's ``repr`` for an error, printable and at most ``limit`` characters long.

    Containers are cut before they are written out: a YAML file of a few lines can stand for terabytes.
    """
    try:
        text = printable(_BRIEF.repr(value))
    except ValueError:  # Python writes no number of more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = _BRIEF.maxlong = 200
_BRIEF.maxlevel, _BRIEF.maxlist, _BRIEF.maxtuple, _BRIEF.maxdict = 4, 10, 10, 10
