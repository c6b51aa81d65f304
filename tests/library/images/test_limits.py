"""Limits of the libraries beneath are ours: set by our setting, or named in the sentence, and never left changed."""

from __future__ import annotations

import csv
import errno
import io
import os
import resource
import struct
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageFile, PngImagePlugin

from grappa.images import decoding
from grappa.images.caching import mapped
from grappa.images.decoding import ImageDecodeError, decode_image
from grappa.images.files import ListedFile, RejectedFileError, decode_file
from grappa.images.pixels import PixelCache, write_index, write_shard
from grappa.images.sources import path_table
from grappa.images.table import MISSING, ImageTableError, read_table
from grappa.pipeline.errors import sentence_and_code

SIZE = (60, 40)
PIXELS = SIZE[0] * SIZE[1]
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
LIMITS = (
    (Image, "MAX_IMAGE_PIXELS", (100, None, 10**9)),
    (PngImagePlugin, "MAX_TEXT_CHUNK", (10, 2**30)),
    (PngImagePlugin, "MAX_TEXT_MEMORY", (10, 2**30)),
    (ImageFile, "LOAD_TRUNCATED_IMAGES", (True, False)),
)


def _drawn() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (*SIZE[::-1], 3)).astype(np.uint8))


def _encoded(kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    _drawn().save(buffer, kind, **options)
    return buffer.getvalue()


def _with_chunk(png: bytes, name: bytes, body: bytes, *, last: bool = False) -> bytes:
    """Put a chunk after the header of a PNG, or after its pixels."""
    at = png.rindex(b"IEND") - 4 if last else png.index(b"IDAT") - 4
    chunk = struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    return png[:at] + chunk + png[at:]


def _beside() -> Iterator[tuple[str, bytes]]:
    """Yield the PNG with much beside its pixels: text of each kind, a color profile, EXIF; before and after them."""
    text, png = b"x" * 3 * 2**20, _encoded("PNG")
    bodies = {
        b"tEXt": b"Comment\0" + text,
        b"zTXt": b"Comment\0\0" + zlib.compress(text),
        b"iTXt": b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(text),
        b"iCCP": b"ICC\0\0" + zlib.compress(text),
        b"eXIf": b"MM\0*\0\0\0\x08\0\0" + text,
        b"prVt": text,
    }
    for name, body in bodies.items():
        yield name.decode(), _with_chunk(png, name, body)
        if name != b"iCCP":
            yield f"{name.decode()} after the pixels", _with_chunk(png, name, body, last=True)
    many = png
    for number in range(20):
        many = _with_chunk(many, b"tEXt", b"c%d\0" % number + text)
    yield "twenty texts", many


@pytest.mark.parametrize(("what", "data"), [*_beside()], ids=lambda value: value if isinstance(value, str) else "")
def test_what_lies_beside_the_pixels_makes_no_image_broken(what: str, data: bytes) -> None:
    np.testing.assert_array_equal(decode_image(data, max_pixels=PIXELS), np.asarray(_drawn()))


def test_a_jpeg_with_a_large_profile_and_comment_is_good() -> None:
    plain = decode_image(_encoded("JPEG"), max_pixels=PIXELS)
    laden = _encoded("JPEG", icc_profile=b"x" * 2**20, comment=b"c" * 60_000, exif=b"Exif\0\0" + b"x" * 60_000)
    np.testing.assert_array_equal(decode_image(laden, max_pixels=PIXELS), plain)


def test_more_beside_the_pixels_than_our_limit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "METADATA_BYTES", 2**20)
    for what, data in _beside():
        if what.startswith(("zTXt", "iTXt", "iCCP", "tEXt", "twenty")):
            with pytest.raises(ImageDecodeError, match="the texts beside the pixels take more than 1048576 bytes"):
                decode_image(data, max_pixels=PIXELS)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(
    ("module", "name", "values"), LIMITS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_programs_own_limits_change_nothing_and_stay(
    monkeypatch: pytest.MonkeyPatch, kind: str, module: Any, name: str, values: tuple[Any, ...]
) -> None:
    whole = _encoded(kind)
    expected = decode_image(whole, max_pixels=PIXELS)
    for value in values:
        monkeypatch.setattr(module, name, value)
        np.testing.assert_array_equal(decode_image(whole, max_pixels=PIXELS), expected)
        for bad in (whole[: len(whole) // 2], whole[:60]):
            with pytest.raises(ImageDecodeError):
                decode_image(bad, max_pixels=PIXELS)
        with pytest.raises(ImageDecodeError, match=rf"decompression bomb: .*{PIXELS - 1}"):
            decode_image(whole, max_pixels=PIXELS - 1)
        assert getattr(module, name) == value


def test_many_decodings_at_once_leave_the_programs_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 123)
    data, gate = _encoded("PNG"), threading.Barrier(8)

    def decode(number: int) -> tuple[int, ...]:
        gate.wait()
        for _ in range(20):
            shape = decode_image(data, max_pixels=PIXELS * (1 + number % 3)).shape
        return shape

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(decode, range(8))) == {(*SIZE[::-1], 3)}
    assert Image.MAX_IMAGE_PIXELS == 123 and not ImageFile.LOAD_TRUNCATED_IMAGES


def test_a_tile_larger_than_the_limit_is_a_bomb(monkeypatch: pytest.MonkeyPatch) -> None:
    """An image of few pixels whose only tile claims billions: the header's size alone says nothing."""
    fields = {256: 32, 257: 32, 258: 8, 259: 1, 262: 1, 277: 1, 322: 48_000, 323: 48_000, 324: 8, 325: 2**31}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in fields.items())
    tiff = b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(fields)) + entries + b"\0" * 4 + b"\0" * 5000
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ImageDecodeError):
        decode_image(tiff, max_pixels=10_000)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 200 * 1024


# ---------------------------------------------------------------- tables


def test_a_cell_may_be_as_large_as_its_table(tmp_path: Path) -> None:
    table, before = tmp_path / "t.csv", csv.field_size_limit()
    table.write_text(f'path,domain,caption\na.png,birds,"{"x" * 300_000}"\nb.png,cars,\n')
    assert read_table(table)["path"].to_pylist() == ["a.png", "b.png"]
    assert csv.field_size_limit() == before


def test_a_parquet_table_may_have_a_large_header_and_a_row_group_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns = pa.table({"path": [f"{number}.png" for number in range(500)], "domain": ["birds"] * 500})
    pq.write_table(columns, tmp_path / "rows.parquet", row_group_size=1)
    assert len(read_table(tmp_path / "rows.parquet")) == 500
    monkeypatch.setattr(path_table, "LARGEST_HEADER", 8)
    with pytest.raises(ImageTableError, match="size limit"):
        read_table(tmp_path / "rows.parquet")


# ---------------------------------------------------------------- the system


def test_a_path_that_is_too_long_is_named_with_the_limit(tmp_path: Path) -> None:
    for path in ("x" * 300, "/".join(["y" * 200] * 25)):
        listed = ListedFile(path, 0, "birds", (float("nan"),) * 4, MISSING)
        with pytest.raises(
            RejectedFileError, match=rf"the path has {len(str(tmp_path)) + 1 + len(path)} bytes and .* 4096 and 255"
        ):
            decode_file(listed, str(tmp_path), cache_size=32, max_pixels=PIXELS)
        with pytest.raises(OSError) as caught:
            os.stat(tmp_path / path)
        said, _ = sentence_and_code(caught.value)
        assert said and "4096 and 255" in said and len(said) < 300


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_shards_are_opened_on_demand_and_closed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped, "MOST_OPEN", 5)
    images = [np.full((2, 2, 3), shard, np.uint8) for shard in range(40)]
    write_index(tmp_path, np.concatenate([write_shard(tmp_path, shard, [image]) for shard, image in enumerate(images)]))
    before = descriptors()
    cache = PixelCache.open(tmp_path)
    assert descriptors() == before + 2, "the folder, and the index that is mapped"
    kept = cache.image(0)
    for row in [*range(40), *range(39, -1, -1)]:
        np.testing.assert_array_equal(cache.image(row), images[row])
    assert descriptors() <= before + 2 + 5 + 1
    np.testing.assert_array_equal(kept, images[0])  # an array in use stays mapped
    del cache, kept
    assert descriptors() == before


def test_too_few_descriptors_are_raised_or_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = np.zeros((2, 2, 3), np.uint8)
    write_index(tmp_path, np.concatenate([write_shard(tmp_path, shard, [image]) for shard in range(40)]))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors() + 10, hard))
        cache = PixelCache.open(tmp_path)
        assert sum(int(cache.image(row).sum()) for row in range(40)) == 0
        monkeypatch.setattr(mapped, "_allowed", lambda number: 40)
        few = PixelCache.open(tmp_path)
        resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors() + 6, hard))
        assert sum(int(few.image(row).sum()) for row in range(40)) == 0, "it closes others, then goes on"
        few.shards._open.clear()
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        with pytest.raises(ValueError, match="too many open files at .*00000.npy: raise `ulimit -n`"):
            few.image(0)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    said, _ = sentence_and_code(OSError(errno.EMFILE, "Too many open files", "x"))
    assert said and f"this process may have {soft}" in said and "ulimit -n" in said


def test_a_cache_that_was_made_again_is_named_and_never_mixed(tmp_path: Path) -> None:
    def write(folder: Path, value: int) -> PixelCache:
        folder.mkdir()
        lines = [write_shard(folder, shard, [np.full((2, 2, 3), value, np.uint8)]) for shard in range(3)]
        write_index(folder, np.concatenate(lines))
        return PixelCache.open(folder)

    cache = write(tmp_path / "pixels", 1)
    (tmp_path / "pixels").rename(tmp_path / "old")
    write(tmp_path / "pixels", 2)
    assert cache.image(0).max() == 1
    (tmp_path / "old/00001.npy").unlink()
    with pytest.raises(ValueError, match="pixels was made again since it was opened: give the command again"):
        cache.image(1)
