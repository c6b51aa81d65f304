"""Tars of plain headers are listed as tarfile lists them, and every other tar is left to tarfile."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from random import Random

import pytest

from grappa.images.paths import ImageTableError
from grappa.images.sources import tar_shards
from grappa.images.sources.tar_headers import NotPlainError, PlainTar

LONG = f"{'folder/' * 12}{'a' * 40}.jpg"  # in two fields of a header of ustar
WORKS: dict[str, bytes] = {
    "./d0/./1.jpg": b"1" * 700,
    "d0/1.cls": b"cat",
    "d0//2.PNG": b"",
    "d0/.hidden/3.jpg": b"3",
    "d0/4.json": b'{"domain": "x"}',
    "d0/4.jpg": b"4" * 512,
    "d0/notes.txt": b"text",
    "d0/ü\udce4.jpg": b"5",
}


def written(form: int, files: dict[str, bytes], *, mtime: float = 0) -> bytes:
    """Return a tar with a folder and these files."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as archive:
        folder = tarfile.TarInfo("d0")
        folder.type, folder.mode = tarfile.DIRTYPE, 0o755
        archive.addfile(folder)
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), mtime  # type: ignore[assignment]
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def listed(read: Callable[[io.BytesIO, str], object], data: bytes) -> object:
    """Return what a reader lists of a tar, its error in words, or None where it leaves the tar to the other."""
    try:
        return read(io.BytesIO(data), "0.tar")
    except ImageTableError as error:
        return str(error)


TARS = {
    "gnu": written(tarfile.GNU_FORMAT, WORKS),
    "ustar": written(tarfile.USTAR_FORMAT, WORKS | {LONG: b"6"}),
    "pax": written(tarfile.PAX_FORMAT, {name: data for name, data in WORKS.items() if name.isascii()}),
    "webdataset": written(tarfile.PAX_FORMAT, {"a.jpg": b"1" * 900, "a.cls": b"3", "b.jpg": b"2"}, mtime=1700000000.25),
}


NOTED, TIME = TARS["webdataset"], b"23 mtime=1700000000.25\n"


@pytest.mark.parametrize("name", TARS)
def test_common_tars_are_plain_and_listed_as_tarfile_lists_them(name: str) -> None:
    plain = listed(tar_shards._plain_members, TARS[name])
    assert plain is not None
    assert plain == listed(tar_shards._members, TARS[name])


@pytest.mark.parametrize(
    "data",
    [
        written(tarfile.GNU_FORMAT, {f"{'b' * 120}.jpg": b"1"}),
        written(tarfile.PAX_FORMAT, {f"{'b' * 120}.jpg": b"1"}),
        written(tarfile.PAX_FORMAT, {"é.jpg": b"1"}),
        TARS["gnu"][:1024],
        TARS["gnu"][:2000],
        TARS["webdataset"][:1536] + bytes(4096),  # notes, and no member that they are on
        NOTED[: 1024 + len(TIME)]
        + b"14 path=c.jpg\n"
        + NOTED[1024 + len(TIME) + 14 :],  # tarfile reads on in the padding
        b"",
        b"no tar",
    ],
)
def test_other_tars_are_not_plain(data: bytes) -> None:
    with pytest.raises(NotPlainError):
        list(PlainTar(io.BytesIO(data)))


def test_the_place_of_a_file_is_told() -> None:
    plain = PlainTar(io.BytesIO(NOTED))
    files = list(plain)
    assert [each.name for each in files] == ["a.jpg", "a.cls", "b.jpg"]
    assert [NOTED[each.offset : each.offset + each.size] for each in files] == [b"1" * 900, b"3", b"2"]
    assert NOTED[plain.end :].strip(b"\0") == b""


@pytest.mark.parametrize("name", TARS)
def test_damaged_tars_are_judged_as_tarfile_judges_them(name: str) -> None:
    random, plain = Random(0), 0
    for _ in range(400):
        data = damaged(TARS[name], random)
        found = listed(tar_shards._plain_members, data)
        plain += found is not None
        assert found is None or found == listed(tar_shards._members, data)
    assert plain > 20, "some damage lies in an image, or says something else in a right header"


def damaged(data: bytes, random: Random) -> bytes:
    """Return a tar that is cut off, lost a block, or has another byte in a header, perhaps with its right checksum."""
    blocks = [bytearray(data[at : at + 512]) for at in range(0, len(data), 512)]
    used = next(at for at, block in enumerate(blocks) if not block.strip(b"\0"))
    block = random.choice(blocks[: used + 2])
    how = random.randrange(5)
    if how == 0:
        return data[: random.randrange(len(data))]
    if how == 1:
        blocks[random.randrange(used)], blocks[random.randrange(used)] = block, bytearray(512)
    else:
        at = random.choice([0, 99, 100, 107, 124, 130, 135, 136, 148, 154, 155, 156, 157, 257, 329, 345, 499, 511])
        block[at] = random.choice(b"\0 01578/.x\xff\x80gLKS")
        if how > 2:
            block[148:156] = b"%06o\0 " % (sum(block[:148]) + 256 + sum(block[156:]))
    return b"".join(blocks)
