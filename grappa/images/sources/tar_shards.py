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
from typing import IO, Any

import numpy as np
import pyarrow as pa

from grappa.images.files import ImagesChangedError, changed
from grappa.images.folders import is_split, is_system_folder, split_of
from grappa.images.paths import ImageTableError, tell
from grappa.images.sources.columns import TEXT, escaped

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
    found = _Members()
    try:
        with tarfile.open(fileobj=opened, mode="r:", errorlevel=1) as archive:
            for member in archive:
                vars(archive)["members"] = []  # else it keeps them all
                _take(archive, member, found, name)
            _check_end(opened, archive, name, found)
    except (tarfile.TarError, EOFError, OverflowError) as error:
        after = f" after {tell(found.names[-1])}" if found.names else ""
        raise ImageTableError(f"the tar {tell(name)} cannot be read{after}: {error}; {_advice(opened)}") from error
    return _table(found, name), found.passed


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


def _take(archive: tarfile.TarFile, member: tarfile.TarInfo, found: _Members, name: str) -> None:
    path = _tidy(member.name)
    base = path.rpartition("/")[2]
    ending = os.path.splitext(base)[1].lower()
    if _is_hidden(path):
        return
    if member.issym() or member.islnk():
        if ending in _IMAGES or ending in _SAYING:
            found.passed["links"] += 1
    elif not member.isreg():
        return
    elif member.issparse():
        raise ImageTableError(f"the tar {tell(name)} holds {tell(path)} as a sparse file: pack it without --sparse")
    elif ending in _SAYING:
        _note(archive, member, found.said.setdefault(_key(path), {}), f"{name}{SEPARATOR}{path}")
    elif ending not in _IMAGES:
        found.passed[ending or base] += 1
    else:
        found.names.append(path)
        found.sizes.append(member.size)
        found.offsets.append(member.offset_data)


def _key(path: str) -> str:
    """Return what the members that belong together have in common."""
    folder, _, base = path.rpartition("/")
    return f"{folder}/{base.partition('.')[0]}"


def _note(archive: tarfile.TarFile, member: tarfile.TarInfo, said: Said, name: str) -> None:
    """Add what a member says of its image."""
    content = archive.extractfile(member)
    assert content is not None, "it is a regular file"
    data = content.read(_LARGEST_NOTE)
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


def _check_end(opened: IO[bytes], archive: tarfile.TarFile, name: str, found: _Members) -> None:
    """Refuse a tar that has no end, or goes on after it: the rest would be lost in silence."""
    at = archive.offset
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
        "folder": escaped([_folder(above, each) for each in found.names]).dictionary_encode(),
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


def _folder(above: str, member: str) -> str:
    return os.path.join(above, os.path.dirname(member)).rstrip("/")


def _splits(texts: list[str | None], name: str) -> Iterator[str | None]:
    for text in texts:
        if text is not None and not is_split(text):
            raise ImageTableError(f"a JSON member of {tell(name)} has the split {text!r}: expected train, val or test")
        yield None if text is None else split_of(text)


def _tidy(path: str) -> str:
    """Return a member's name without what leads nowhere: ``./a//b`` is ``a/b``."""
    return "/".join(part for part in path.split("/") if part not in ("", "."))


def _is_hidden(path: str) -> bool:
    *folders, base = path.split("/")
    return base.startswith(".") or any(part.startswith(".") or is_system_folder(part) for part in folders)


def _advice(opened: IO[bytes]) -> str:
    opened.seek(0)
    start = opened.read(6)
    if start[:2] == b"\x1f\x8b" or start[:3] == b"BZh" or start == b"\xfd7zXZ\0" or start[:4] == b"\x28\xb5\x2f\xfd":
        return "it is compressed: unpack it, or pack it without compression"
    return "get it whole, or leave it out"
