"""Tars of images, as webdataset writes them: where each image begins, and what the members beside it say of it.

The members whose names are the same up to the first dot of the last part belong together: ``a/0001.jpg`` is an image,
``a/0001.cls`` holds its label, and ``a/0001.json`` may hold ``label``, ``domain`` and ``split``. Other members, such as
captions in ``.txt``, say nothing: text that describes one image is no class.
"""

from __future__ import annotations

import json
import os
import tarfile
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import IO, Any

import numpy as np
import pyarrow as pa

from grappa.images.files import ImagesChangedError, changed
from grappa.images.folders import is_split, is_system_folder, split_of
from grappa.images.paths import ImageTableError, tell
from grappa.images.sources.columns import TEXT, escaped
from grappa.images.sources.tar_headers import NotPlainError, PlainTar

HEADER = tarfile.BLOCKSIZE  # bytes before an image
SEPARATOR = "::"  # between a file and what lies in it
# Endings of the formats that are decoded (``grappa.images.decoding.FORMATS``).
_IMAGES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .apng .webp .bmp .dib .tif .tiff .gif .jp2 .j2k .jpc .jpf .jpx .avif .avifs .heic "
    ".heif .hif".split()
)
_SAYING = (".cls", ".json")  # endings of the members that say something
_LARGEST_NOTE = 2**20  # bytes of a member that says something
_BLOCK = 2**20  # bytes that are read at a time of what lies behind the last member
_FIELDS = ("label", "domain", "split")
_FOLDERS = 4096  # whose names are remembered

Said = dict[str, str]


@dataclass
class _Members:
    """The images of a tar, column by column, and what is said by key."""

    names: list[str] = field(default_factory=list)
    sizes: array[int] = field(default_factory=lambda: array("q"))
    offsets: array[int] = field(default_factory=lambda: array("q"))
    said: dict[str, Said] = field(default_factory=dict)
    passed: Counter[str] = field(default_factory=Counter)


def list_tar(opened: IO[bytes], name: str) -> tuple[pa.Table, Counter[str]]:
    """List the images of a tar.

    Args:
        opened: the tar, from its beginning. name: its path below its root (``os.fsdecode`` form).

    Returns:
        columns ``path`` (``name::member``), ``folder`` (that of the tar, and within it that of the member; a
        dictionary), ``size`` and ``offset``, and those of ``label``, ``domain`` and ``split`` that members say; how
        many members of which ending were passed over, and how many ``links`` where an image or a label was expected.

    Raises:
        ImageTableError: it is no tar, is compressed, is cut off or broken, goes on behind its end, or has a member
            twice.
    """
    found = _plain_members(opened, name) or _members(opened, name)
    return _table(found, name), found.passed


def _plain_members(opened: IO[bytes], name: str) -> _Members | None:
    """Return the images of a tar all of whose headers are plain, else None."""
    found, plain = _Members(), PlainTar(opened)
    try:
        for file in plain:
            path = _visible(file.name)
            if path is not None:
                _take_file(opened, path, file.size, file.offset, found, name)
    except (NotPlainError, tarfile.TarError):
        return None
    _check_end(opened, plain.end, name, found)
    return found


def _members(opened: IO[bytes], name: str) -> _Members:
    """Return the images of a tar, or say what is wrong with it."""
    found = _Members()
    opened.seek(0)
    try:
        with tarfile.open(fileobj=opened, mode="r:", errorlevel=1) as archive:
            for member in archive:
                vars(archive)["members"] = []  # else it keeps them all
                _take(opened, member, found, name)
            _check_end(opened, archive.offset, name, found)
    except (tarfile.TarError, EOFError, OverflowError) as error:
        after = f" after {tell(found.names[-1])}" if found.names else ""
        raise ImageTableError(f"the tar {tell(name)} cannot be read{after}: {error}; {_advice(opened)}") from error
    return found


def check_header(block: bytes, name: str, member: str, size: int) -> None:
    """Raise ImagesChangedError where the header before an image does not announce ``size`` bytes of that name.

    name: the image in sentences, ``tar::member``. member: the member alone, as the tar has it (``os.fsdecode`` form).
    """
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        raise changed(name, size, "its tar holds something else at its place") from None
    if header.size != size or not _may_be(_tidy(header.name), member):
        raise changed(name, size, "its tar holds something else at its place")


def _may_be(told: str, member: str) -> bool:
    """Tell whether a header may be that of a member: of a long name it holds the beginning, or leaves folders out."""
    if not (told.isascii() and member.isascii()) or member.startswith(told):
        return True
    return len(member) > tarfile.LENGTH_NAME and os.path.basename(member).startswith(os.path.basename(told))


def short(name: str, size: int) -> ImagesChangedError:
    """Return the error of an image whose tar ends before it."""
    return changed(name, size, "its tar ends before it")


def _take(opened: IO[bytes], member: tarfile.TarInfo, found: _Members, name: str) -> None:
    path = _visible(member.name)
    if path is None:
        return
    if member.issym() or member.islnk():
        ending = _ending(path)
        if ending in _IMAGES or ending in _SAYING:
            found.passed["links"] += 1
    elif not member.isreg():
        return
    elif member.issparse():
        raise ImageTableError(f"the tar {tell(name)} holds {tell(path)} as a sparse file: pack it without --sparse")
    else:
        _take_file(opened, path, member.size, member.offset_data, found, name)


def _take_file(opened: IO[bytes], path: str, size: int, offset: int, found: _Members, name: str) -> None:
    ending = _ending(path)
    if ending in _IMAGES:
        found.names.append(path)
        found.sizes.append(size)
        found.offsets.append(offset)
    elif ending in _SAYING:
        data = _start(opened, offset, min(size, _LARGEST_NOTE))
        _note(data, found.said.setdefault(_key(path), {}), f"{name}{SEPARATOR}{path}")
    else:
        found.passed[ending or path.rpartition("/")[2]] += 1


def _ending(path: str) -> str:
    _, dot, ending = path.rpartition("/")[2].rpartition(".")
    return f".{ending}".lower() if dot else ""


def _start(opened: IO[bytes], offset: int, length: int) -> bytes:
    opened.seek(offset)
    data = opened.read(length)
    if len(data) < length:
        raise tarfile.ReadError("unexpected end of data")
    return data


def _key(path: str) -> str:
    """Return what the members that belong together have in common."""
    folder, _, base = path.rpartition("/")
    return f"{folder}/{base.partition('.')[0]}"


def _note(data: bytes, said: Said, name: str) -> None:
    """Add what a member says of its image."""
    try:
        if name.endswith(".cls"):
            said["label"] = data.decode().strip()
            return
        given = json.loads(data)
    except (ValueError, RecursionError) as error:
        kind = "text" if name.endswith(".cls") else "JSON"
        raise ImageTableError(f"the member {tell(name)} is no {kind}: {error}") from error
    if isinstance(given, dict):
        for each in _FIELDS:
            value = given.get(each)
            if isinstance(value, str | int) and not isinstance(value, bool) and value != "":
                said.setdefault(each, str(value))


def _check_end(opened: IO[bytes], at: int, name: str, found: _Members) -> None:
    """Refuse a tar that has no end at this byte, or goes on after it: the rest would be lost in silence."""
    last = f" after {tell(found.names[-1])}" if found.names else ""
    opened.seek(at)
    block = opened.read(HEADER)
    if block.strip(b"\0"):
        raise ImageTableError(f"the tar {tell(name)} is broken at byte {at}{last}: get it whole, or leave it out")
    if len(block) < HEADER:
        raise ImageTableError(f"the tar {tell(name)} is cut off at byte {at}{last}: get it whole, or leave it out")
    while block:
        at += len(block)
        block = opened.read(_BLOCK)
        if rest := block.lstrip(b"\0"):
            raise ImageTableError(
                f"the tar {tell(name)} goes on at byte {at + len(block) - len(rest)}, behind its end{last}: where it "
                "is several tars in one file, give each as a file of its own"
            )


def _table(found: _Members, name: str) -> pa.Table:
    if len(set(found.names)) < len(found.names):
        twice = next(each for each, number in Counter(found.names).items() if number > 1)
        raise ImageTableError(f"the tar {tell(name)} has the member {tell(twice)} twice: pack every image once")
    above = os.path.dirname(name)
    columns: dict[str, Any] = {
        "path": escaped([f"{name}{SEPARATOR}{each}" for each in found.names]),
        "folder": escaped([_folder(above, each.rpartition("/")[0]) for each in found.names]).dictionary_encode(),
        "size": pa.array(np.array(found.sizes, np.int64)),
        "offset": pa.array(np.array(found.offsets, np.int64)),
    }
    said = [found.said.get(_key(each), {}) for each in found.names] if found.said else []
    for each in _FIELDS:
        if any(each in one for one in said):
            columns[each] = escaped([one.get(each) for one in said])
    if "split" in columns:
        columns["split"] = pa.array(list(_splits(columns["split"].to_pylist(), name)), TEXT)
    return pa.table(columns)


@lru_cache(_FOLDERS)
def _folder(above: str, within: str) -> str:
    return os.path.join(above, within).rstrip("/")


def _splits(texts: list[str | None], name: str) -> Iterator[str | None]:
    for text in texts:
        if text is not None and not is_split(text):
            raise ImageTableError(f"a JSON member of {tell(name)} has the split {text!r}: expected train, val or test")
        yield None if text is None else split_of(text)


def _tidy(path: str) -> str:
    """Return a member's name without what leads nowhere: ``./a//b`` is ``a/b``."""
    return "/".join(part for part in path.split("/") if part not in ("", "."))


def _visible(name: str) -> str | None:
    """Return a member's tidy name, None where it or a folder above it is hidden."""
    folder, _, base = name.rpartition("/")
    while folder and base in ("", "."):
        folder, _, base = folder.rpartition("/")
    above = _visible_folder(folder)
    if above is None or (base.startswith(".") and base != "."):
        return None
    return f"{above}/{base}" if above else base.removeprefix(".")


@lru_cache(_FOLDERS)
def _visible_folder(folder: str) -> str | None:
    tidy = _tidy(folder)
    hidden = any(part.startswith(".") or is_system_folder(part) for part in tidy.split("/"))
    return None if hidden else tidy


def _advice(opened: IO[bytes]) -> str:
    opened.seek(0)
    start = opened.read(6)
    if start[:2] == b"\x1f\x8b" or start[:3] == b"BZh" or start == b"\xfd7zXZ\0" or start[:4] == b"\x28\xb5\x2f\xfd":
        return "it is compressed: unpack it, or pack it without compression"
    return "get it whole, or leave it out"
