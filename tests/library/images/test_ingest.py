"""One pass from files to table and cache: rows, rejects, copies, boxes, and going on after a crash."""

from __future__ import annotations

import errno
import hashlib
import io
import multiprocessing
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from grappa.images import files as image_files
from grappa.images.ingest import ImagesChangedError, decode_all
from grappa.images.pixels import PixelCache, shard_file
from grappa.images.table import BOX_COLUMNS, list_images

SETTINGS: dict[str, Any] = {"cache_size": 16, "max_pixels": 10_000, "shard_size": 3, "num_workers": 2}
Tables = tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]


def png(seed: int, size: tuple[int, int] = (24, 32)) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def put(root: Path, **files: bytes) -> Path:
    for name, data in files.items():
        file = root / name.replace("__", "/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    return root


def ingest(source: Path, folder: Path, **changes: Any) -> Tables:
    listing = list_images([source])
    return decode_all(listing, listing.attrs["roots"], folder, **{**SETTINGS, **changes})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def cached(folder: Path) -> list[bytes]:
    cache = PixelCache.open(folder)
    return [cache.image(row).tobytes() for row in range(len(cache))]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return put(tmp_path / "source", **{f"d{i % 2}__class{i % 3}__{i}.png": png(i) for i in range(11)})


def test_tables_and_cache_agree_row_by_row(source: Path, tmp_path: Path) -> None:
    images, labels, rejected = ingest(source, tmp_path / "pixels")
    cache = PixelCache.open(tmp_path / "pixels")
    assert len(images) == len(labels) == len(cache) == 11
    assert len(rejected) == 0
    assert images["image_id"].is_monotonic_increasing
    assert labels["image_id"].equals(images["image_id"])
    for row, image in images.iterrows():
        data = (source / image["path"]).read_bytes()
        expected = Image.open(io.BytesIO(data)).resize((21, 16), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(cache.image(row), np.asarray(expected))
        assert image["sha256"] == hashlib.sha256(data).hexdigest()
        assert image["image_id"] == image["sha256"][:16]
        assert labels["label"][row] == image["path"].split("/")[1]
    assert list(images.columns) == [
        *("image_id", "path", "root", "domain", "split", "height", "width"),
        *(*BOX_COLUMNS, "sha256", "duplicate_of"),
    ]
    assert images[["height", "width"]].to_numpy().tolist() == [[24, 32]] * 11
    assert set(images["split"]) == set(images["duplicate_of"]) == {""}


def test_files_renamed_and_moved_give_the_same_rows(source: Path, tmp_path: Path) -> None:
    images, _, _ = ingest(source, tmp_path / "first")
    renamed = {f"z{i % 4}__{99 - i}.png": png(i) for i in range(11)}
    moved, _, _ = ingest(put(tmp_path / "renamed", **renamed), tmp_path / "second", shard_size=5)
    assert moved["image_id"].equals(images["image_id"])
    assert cached(tmp_path / "first") == cached(tmp_path / "second")


def test_shuffled_rows_and_workers_change_no_byte(source: Path, tmp_path: Path) -> None:
    names = [path.relative_to(source).as_posix() for path in source.glob("*/*/*.png")]
    tables = []
    for name, order in (("a", names), ("b", names[::-1])):
        pd.DataFrame({"path": order, "domain": "d"}).to_csv(source / f"{name}.csv", index=False)
        tables.append(ingest(source / f"{name}.csv", tmp_path / name, num_workers=1 if name == "a" else 4))
    for first, second in zip(*tables, strict=True):
        pd.testing.assert_frame_equal(first, second)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_bad_files_are_listed_with_a_reason_and_shift_no_row(source: Path, tmp_path: Path) -> None:
    images, _, _ = ingest(source, tmp_path / "clean")
    bad = {"empty": b"", "text": b"no image", "cut": png(90)[:-300], "bomb": png(91, (101, 100)), "note": b"x" * 9000}
    put(source, **{f"d1__class0__0{name}.png": data for name, data in bad.items()})
    (source / "d0/gone.png").symlink_to(source / "nowhere")
    again, _, rejected = ingest(source, tmp_path / "dirty")
    pd.testing.assert_frame_equal(images, again)
    assert cached(tmp_path / "clean") == cached(tmp_path / "dirty")
    reasons = {Path(row.path).stem: row.reason for row in rejected.itertuples()}
    assert reasons.keys() == {"gone", *(f"0{name}" for name in bad)}
    assert reasons["gone"] == "missing"
    assert reasons["0empty"] == "empty file"
    assert reasons["0text"].startswith("not an image in JPEG")
    assert reasons["0cut"].startswith("truncated or broken image")
    assert reasons["0bomb"] == "decompression bomb: 100 x 101 pixels, more than the limit of 10000"
    assert list(rejected.columns) == ["path", "root", "domain", "reason"]


def test_notes_of_decoding_are_counted_and_survive_an_interruption(tmp_path: Path) -> None:
    put(tmp_path / "s", **{f"d__{i}.png": png(i) for i in range(3)})
    dark = Image.fromarray(np.full((8, 8), 4095, dtype=np.uint16))
    for number in range(2):
        dark.putpixel((0, 0), number)
        dark.save(tmp_path / "s" / "d" / f"dark{number}.png")
    images, _, _ = ingest(tmp_path / "s", tmp_path / "pixels")
    again, _, _ = ingest(tmp_path / "s", tmp_path / "pixels")
    expected = {"12 bits or less in 16, scaled by their own range": 2}
    assert images.attrs["notes"] == again.attrs["notes"] == expected


def test_all_files_bad_gives_empty_tables(tmp_path: Path) -> None:
    images, labels, rejected = ingest(put(tmp_path / "s", d__a=b"", d__b=b"x"), tmp_path / "pixels")
    assert (len(images), len(labels), len(rejected)) == (0, 0, 2)
    assert len(PixelCache.open(tmp_path / "pixels")) == 0


def test_a_folder_in_a_table_and_a_file_too_large_for_an_image_are_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, big=png(0), folder__x=b"")
    (tmp_path / "t.csv").write_text("path,domain\nbig,d\nfolder,d\n")
    monkeypatch.setattr(image_files, "METADATA_BYTES", 0)
    _, _, rejected = ingest(tmp_path / "t.csv", tmp_path / "pixels", max_pixels=10)
    assert rejected["reason"].tolist() == [
        f"{len(png(0))} bytes are more than an image of 10 pixels (images.max_pixels) can need",
        "not a regular file",
    ]


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A temporary folder that every user may enter, which pytest's own are not."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o777)
        yield Path(name)


def ingest_unprivileged(source: Path, folder: Path, reply: Any) -> None:
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    reply.send(ingest(source, folder)[2]["reason"].tolist())


def test_an_unreadable_file_is_rejected(open_folder: Path) -> None:
    put(open_folder / "s", d__a=png(0), d__b=png(1))
    (open_folder / "s/d/b").chmod(0)
    receive, send = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(
        target=ingest_unprivileged, args=(open_folder / "s", open_folder / "pixels", send)
    )
    child.start()
    child.join(30)
    assert receive.poll()
    assert receive.recv() == ["unreadable: Permission denied"]


def test_copies_are_numbered_in_path_order_and_point_to_the_first(tmp_path: Path) -> None:
    put(tmp_path / "s", b__x=png(0), a__y=png(0), a__x=png(0), a__z=png(1))
    images, _, _ = ingest(tmp_path / "s", tmp_path / "pixels")
    by_path = images.set_index("path")
    first = by_path["image_id"]["a/x"]
    assert by_path["image_id"][["a/x", "a/y", "b/x"]].tolist() == [first, f"{first}-2", f"{first}-3"]
    assert by_path["duplicate_of"].to_dict() == {"a/x": "", "a/y": first, "b/x": first, "a/z": ""}
    assert images["image_id"].is_unique


def test_table_columns_reach_the_tables_and_boxes_are_clipped(tmp_path: Path) -> None:
    put(tmp_path, **{str(i): png(i) for i in range(4)})
    rows = ["0,d,7,train,-5,2.5,40,99", "1,d,,test,,,,", "2,d,NA,,1,2,3,4", "3,d,x,,32,0,50,9"]
    (tmp_path / "t.csv").write_text("\n".join(["path,domain,label,split,box_x0,box_y0,box_x1,box_y1", *rows]))
    images, labels, rejected = ingest(tmp_path / "t.csv", tmp_path / "pixels")
    by_path = images.assign(label=labels["label"]).set_index("path")
    assert by_path["label"].to_dict() == {"0": "7", "1": None, "2": "NA"}
    assert by_path["split"].to_dict() == {"0": "train", "1": "test", "2": ""}
    boxes = by_path[list(BOX_COLUMNS)]
    assert boxes.loc["0"].tolist() == [0.0, 2.5, 32.0, 24.0]
    assert boxes.loc["1"].isna().all()
    assert boxes.loc["2"].tolist() == [1.0, 2.0, 3.0, 4.0]
    assert rejected["reason"].tolist() == [
        "the box (32.0, 0.0, 50.0, 9.0) lies outside the image of 32 x 24 pixels",
    ]


def test_a_listing_read_back_from_parquet_gives_the_same(source: Path, tmp_path: Path) -> None:
    listing = list_images([source])
    listing.to_parquet(tmp_path / "listing.parquet")
    read = pd.read_parquet(tmp_path / "listing.parquet")
    first = decode_all(listing, listing.attrs["roots"], tmp_path / "a", **SETTINGS)
    second = decode_all(read, listing.attrs["roots"], tmp_path / "b", **SETTINGS)
    for one, other in zip(first, second, strict=True):
        pd.testing.assert_frame_equal(one, other)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_files_that_changed_since_they_were_listed_stop_the_pass(source: Path, tmp_path: Path) -> None:
    listing = list_images([source])
    roots = listing.attrs["roots"]
    grown = source / listing["path"][4]
    grown.write_bytes(grown.read_bytes() + b"0")
    with pytest.raises(ImagesChangedError, match=rf"{listing['path'][4]} had \d+ bytes .* run `grappa init` again"):
        decode_all(listing, roots, tmp_path / "a", **SETTINGS)
    grown.unlink()
    with pytest.raises(ImagesChangedError, match="now it has gone"):
        decode_all(listing, roots, tmp_path / "b", **SETTINGS)
    absent = listing.assign(size=-1)
    with pytest.raises(ImagesChangedError, match="was missing when it was listed, now it has"):
        decode_all(absent, roots, tmp_path / "c", **SETTINGS)


# ---------------------------------------------------------------- going on


def count_decodes(monkeypatch: pytest.MonkeyPatch, stop_at: int | None = None) -> list[int]:
    done: list[int] = []
    original = image_files.decode_image

    def counting(data: bytes, **options: Any) -> np.ndarray:
        done.append(len(data))
        if stop_at is not None and len(done) == stop_at:
            raise KeyboardInterrupt
        return original(data, **options)

    monkeypatch.setattr(image_files, "decode_image", counting)
    return done


def test_an_interrupted_pass_goes_on_at_its_shard_and_ends_with_the_same_bytes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = ingest(source, tmp_path / "whole")
    with monkeypatch.context() as patch:
        count_decodes(patch, stop_at=8)  # in the third shard of four
        with pytest.raises(KeyboardInterrupt):
            ingest(source, tmp_path / "resumed", num_workers=1)
    done, reported = count_decodes(monkeypatch), []
    resumed = ingest(source, tmp_path / "resumed", progress=reported.append)
    assert len(done) == 11 - 2 * 3
    assert sum(reported) == 11
    for first, second in zip(expected, resumed, strict=True):
        pd.testing.assert_frame_equal(first, second)
    assert contents(tmp_path / "whole") == contents(tmp_path / "resumed")


def ingest_until_killed(source: Path, folder: Path, num_writes: int) -> None:
    writes, replace = 0, os.replace

    def fatal(old: Any, new: Any) -> None:
        nonlocal writes
        writes += 1
        if writes > num_writes:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(old, new)

    os.replace = fatal
    ingest(source, folder)


@pytest.mark.parametrize("num_writes", range(9))  # 4 shards and 4 manifests in turn, then the index
def test_killed_before_any_rename_it_goes_on(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_writes: int
) -> None:
    ingest(source, tmp_path / "whole")
    child = multiprocessing.get_context("fork").Process(
        target=ingest_until_killed, args=(source, tmp_path / "resumed", num_writes)
    )
    child.start()
    child.join(30)
    assert child.exitcode == -signal.SIGKILL
    done = count_decodes(monkeypatch)
    ingest(source, tmp_path / "resumed")
    assert len(done) == 11 - min(11, 3 * (num_writes // 2))
    assert contents(tmp_path / "whole") == contents(tmp_path / "resumed")


def flip(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-40] + bytes([content[-40] ^ 1]) + content[-39:])


@pytest.mark.parametrize(
    "damage", ["pixels cut", "pixel flipped", "manifest cut", "manifest flipped", "other settings", "other files"]
)
def test_a_shard_that_is_not_whole_or_not_ours_is_decoded_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    ingest(source, tmp_path / "pixels")
    changes: dict[str, Any] = {}
    if damage == "pixels cut":
        shard_file(tmp_path / "pixels", 1).write_bytes(b"")
    elif damage == "pixel flipped":
        flip(shard_file(tmp_path / "pixels", 1))
    elif damage == "manifest cut":
        (tmp_path / "pixels/00001.json").write_bytes(b"{")
    elif damage == "manifest flipped":
        flip(tmp_path / "pixels/00001.json")
    elif damage == "other settings":
        changes = {"cache_size": 8}
    else:
        put(source, d0__class0__00=png(50))
    done, said = count_decodes(monkeypatch), list[str]()
    ingest(source, tmp_path / "pixels", **changes, dropped=said.append)
    assert len(said) == (0 if damage.startswith("other") else 1)
    assert len(done) == {"other settings": 11, "other files": 12}.get(damage, 3)
    monkeypatch.undo()
    ingest(source, tmp_path / "fresh", **changes)
    assert contents(tmp_path / "fresh") == contents(tmp_path / "pixels")


def test_a_full_disk_surfaces_and_loses_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, fsync, left = tmp_path / "pixels", os.fsync, 6

    def filling(handle: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", filling)
        with pytest.raises(OSError, match="No space left"):
            ingest(source, folder)
    done = count_decodes(monkeypatch)
    ingest(source, folder)
    assert len(done) == 11 - 3
