"""Configurations of the form in which runs keep them, read without PyYAML, which takes a tenth of `grappa status`."""

from __future__ import annotations

import re
from typing import Any

PLAIN_BYTES = 2**16  # of a text, at most; a run's configuration has a fifth of it
_NUMBER = re.compile(r"(?:0|[1-9][0-9]{0,15})(\.[0-9]+(?:e[-+][0-9]+)?)?")
_WORDS = re.compile("[A-Za-z/](?:[A-Za-z0-9_/.=+ -]|:(?=[A-Za-z0-9/]))*")
_MEANT = {"null": None, "true": True, "false": False}
_RESERVED = {"yes", "no", "on", "off", *_MEANT}  # as whole words, however they are written


class _NotPlain(Exception):
    """The text may be YAML, but not of the plain form."""


def plain_sections(text: str) -> dict[str, Any] | None:
    """Return the sections of a text in the form that `dump_config` writes, as YAML reads them; None for any other text.

    A section is a name and a colon; a field stands two spaces further in, with a number, a word, null, true, false, a
    list or a mapping of these on its line, or with the items of a list in the lines below. Nothing is quoted.
    """
    if len(text) > PLAIN_BYTES or not text.isascii() or not text.replace("\n", "").isprintable():
        return None
    try:
        return _sections(text.split("\n")) or None
    except _NotPlain:
        return None


def _sections(lines: list[str]) -> dict[str, Any]:
    sections: dict[str, Any] = {}
    section, items = "", ""  # the names of the section and of the list that are open
    for line in lines:
        content = line.lstrip(" ")
        if not content or content[0] == "#":
            continue
        depth, content = len(line) - len(content), content.partition(" #")[0].rstrip(" ")
        if depth == 4 and items and content.startswith("- "):
            sections[section][items] = [*(sections[section][items] or []), _scalar(content[2:].lstrip(" "))]
            continue
        name, value = _pair(content)
        if depth == 0 and not value:
            section, items, fields = name, "", sections
        elif depth == 2 and section:
            items, sections[section] = "" if value else name, sections[section] or {}
            fields = sections[section]
        else:
            raise _NotPlain
        if name in fields:
            raise _NotPlain
        fields[name] = _value(value) if value else None
    return sections


def _pair(text: str) -> tuple[str, str]:
    """Return the name and the value of ``name: value``."""
    name, colon, value = text.partition(":")
    if not colon or value[:1] not in ("", " ") or not name.isidentifier() or name.lower() in _RESERVED:
        raise _NotPlain
    return name, value.strip(" ")


def _value(text: str) -> Any:
    inner = text[1:-1]
    if text == "[]" or text == "{}":
        return [] if text == "[]" else {}
    if text[0] == "[" and text[-1] == "]":
        return [_scalar(item) for item in inner.split(", ")]
    if text[0] == "{" and text[-1] == "}":
        pairs = [_pair(item) for item in inner.split(", ")]
        if len({name for name, _ in pairs}) < len(pairs):
            raise _NotPlain
        return {name: _scalar(value) for name, value in pairs}
    return _scalar(text)


def _scalar(text: str) -> Any:
    if text in _MEANT:
        return _MEANT[text]
    number = _NUMBER.fullmatch(text)
    if number:
        return float(text) if number[1] else int(text)
    if text.lower() in _RESERVED or not _WORDS.fullmatch(text) or text[-1] == " ":
        raise _NotPlain
    return text
