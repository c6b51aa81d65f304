"""The forms of the pixel cache: raw, as JPEG, and none; the same images, the same pixels or nearly, or an error."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageFilter

from grappa.images.caching import codec
from grappa.images.caching.codec import Encoded, decode, encode
from grappa.images.caching.uncached import Originals, Uncached, open_images
from grappa.images.files import ImagesChangedError
from grappa.images.ingest import decode_all, decode_shards
from grappa.images.pixels import ImageRows, PixelCache, repeated_rows, shard_file, write_index, write_shard
from grappa.images.table import list_images

FORMS = ("raw", "jpeg", "none")
SETTINGS: dict[str, Any] = {"cache_size": 40, "max_pixels": 100_000, "shard_size": 3, "num_workers": 2}
MEAN, THOUSANDTH, WORST = 2.0, 12, 40  # levels of 255: JPEG's tolerance on images that are like photographs


def photograph(seed: int, size: tuple[int, int] = (72, 96)) -> np.ndarray:
    """An image with soft and hard edges and some noise, as a camera's."""
    draws = np.random.default_rng(seed)
    coarse = Image.fromarray(draws.integers(30, 226, (5, 7, 3), dtype=np.uint8)).resize(size[::-1])
    image = np.array(coarse.filter(ImageFilter.GaussianBlur(1))).astype(np.int64)
    image[size[0] // 3 :, size[1] // 2 :] //= 2
    return np.clip(image + draws.normal(0, 2, image.shape), 0, 255).astype(np.uint8)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    for number in range(8):
        file = tmp_path / "source" / f"d{number % 2}" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photograph(number)).save(file)
    (tmp_path / "source/d0/copy.png").write_bytes((tmp_path / "source/d1/1.png").read_bytes())
    (tmp_path / "source/d0/broken.png").write_bytes(b"no image")
    return tmp_path / "source"


def ingest(source: Path, folder: Path, cache: str, **changes: Any) -> tuple[pd.DataFrame, list[str]]:
    listing = list_images([source])
    roots = list(listing.attrs["roots"])
    images, _, rejected = decode_all(listing, roots, folder, cache=cache, **{**SETTINGS, **changes})
    assert rejected["reason"].str.startswith("not an image").tolist() == [True]
    return images, roots


def pixels(images: ImageRows) -> list[np.ndarray]:
    return [images.image(row) for row in range(len(images))]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def check_tolerance(found: list[np.ndarray], exact: list[np.ndarray]) -> None:
    away = [np.abs(one.astype(np.int64) - other) for one, other in zip(found, exact, strict=True)]
    values = np.concatenate([each.ravel() for each in away])
    assert max(each.mean() for each in away) <= MEAN
    assert np.quantile(values, 0.999) <= THOUSANDTH
    assert values.max() <= WORST


def test_all_forms_have_the_same_images_and_the_pixels_that_they_promise(source: Path, tmp_path: Path) -> None:
    found: dict[str, list[np.ndarray]] = {}
    tables = {}
    for form in FORMS:
        tables[form], roots = ingest(source, tmp_path / form, form)
        found[form] = pixels(open_images(tmp_path / form, roots))
    for form in FORMS[1:]:
        pd.testing.assert_frame_equal(tables[form], tables["raw"])
    for raw, again in zip(found["raw"], found["none"], strict=True):
        np.testing.assert_array_equal(raw, again)
    check_tolerance(found["jpeg"], found["raw"])
    assert any((one != other).any() for one, other in zip(found["jpeg"], found["raw"], strict=True))
    assert sum(each.size for each in found["raw"]) > 3 * shard_bytes(tmp_path / "jpeg")
    assert shard_bytes(tmp_path / "none") == 0


def shard_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("0*.npy"))


def test_an_encoded_image_stands_in_its_shard_as_a_file(source: Path, tmp_path: Path) -> None:
    ingest(source, tmp_path / "jpeg", "jpeg")
    cache = PixelCache.open(tmp_path / "jpeg")
    assert cache.index.shape == (9, 5)
    shard, offset, height, width, length = cache.index[4].tolist()
    data = np.load(shard_file(tmp_path / "jpeg", shard))[offset : offset + length].tobytes()
    (tmp_path / "4.jpg").write_bytes(data)
    with Image.open(tmp_path / "4.jpg") as image:
        assert (image.format, image.size) == ("JPEG", (width, height))
        np.testing.assert_array_equal(np.asarray(image), cache.image(4))


@pytest.mark.parametrize("form", FORMS)
def test_repeated_rows_are_found_without_decoding(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    table, roots = ingest(source, tmp_path / form, form)
    images = open_images(tmp_path / form, roots)
    monkeypatch.setattr(Image, "open", None)
    row = int(np.flatnonzero(table["duplicate_of"] != "")[0])
    assert repeated_rows(images) == [(row, row - 1)]


def test_an_image_too_long_for_jpeg_is_kept_without_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    image = photograph(0, (4, 90))
    monkeypatch.setattr(codec, "LARGEST_SIDE", 89)
    found = encode(image)
    assert found.data[1:4] == b"PNG"
    np.testing.assert_array_equal(decode(*found), image)
    assert encode(image[:, :89]).data[:2] == b"\xff\xd8"


@pytest.mark.parametrize("size", [(1, 1), (1, 700), (9, 16)])
def test_small_images_are_encoded_too(size: tuple[int, int]) -> None:
    image = np.full((*size, 3), (200, 90, 30), dtype=np.uint8)
    assert np.abs(decode(*encode(image)).astype(int) - image).max() <= 2
    assert encode(image) == encode(image.copy())


def test_damaged_bytes_are_named(tmp_path: Path) -> None:
    encoded = encode(photograph(1))
    lines = write_shard(tmp_path, 0, [encoded, Encoded(encoded.data[:-400], 72, 96), Encoded(encoded.data, 72, 95)])
    write_index(tmp_path, lines)
    cache = PixelCache.open(tmp_path)
    assert cache.image(0).shape == (72, 96, 3)
    with pytest.raises(ValueError, match=r"image 1 in .*00000.npy: damaged bytes .*: decode the images again"):
        cache.image(1)
    with pytest.raises(ValueError, match=r"image 2 in .*(limit|72 x 96)"):
        cache.image(2)


# ---------------------------------------------------------------- without a cache


def test_an_original_that_changed_is_an_error_and_never_other_pixels(source: Path, tmp_path: Path) -> None:
    table, roots = ingest(source, tmp_path / "none", "none")
    images = open_images(tmp_path / "none", roots)
    assert isinstance(images, Uncached)
    victim = source / table["path"][3]
    Image.fromarray(photograph(99)).save(victim)
    with pytest.raises(ImagesChangedError, match=rf"{victim.name} has other bytes than were decoded: bring it back"):
        images.image(3)
    victim.unlink()
    with pytest.raises(ImagesChangedError, match=rf"{victim.name} cannot be read now \(No such file .*grappa init RUN"):
        images.image(3)
    assert images.image(2).shape[0] == 40


def test_originals_may_move(source: Path, tmp_path: Path) -> None:
    _, roots = ingest(source, tmp_path / "none", "none")
    before = pixels(open_images(tmp_path / "none", roots))
    source.rename(tmp_path / "moved")
    after = pixels(open_images(tmp_path / "none", [root.replace("source", "moved") for root in roots]))
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one, other)


def test_what_an_image_is_made_from_differs_with_its_size(source: Path, tmp_path: Path) -> None:
    _, roots = ingest(source, tmp_path / "a", "none")
    ingest(source, tmp_path / "b", "none", cache_size=20)
    one, other = (open_images(tmp_path / name, roots) for name in ("a", "b"))
    assert not np.array_equal(one.content(0), other.content(0))


def test_the_originals_are_read_by_threads(source: Path, tmp_path: Path) -> None:
    table, roots = ingest(source, tmp_path / "none", "none")
    originals = Originals.of(table, roots, max_pixels=100_000)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(originals.full, [0, 1, 2, 3] * 3))
    for row, image in enumerate(found):
        np.testing.assert_array_equal(image, found[row % 4])


# ---------------------------------------------------------------- going on


def ingest_until_killed(source: Path, folder: Path, form: str, num_writes: int) -> None:
    writes, replace = 0, os.replace

    def fatal(old: Any, new: Any) -> None:
        nonlocal writes
        writes += 1
        if writes > num_writes:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(old, new)

    os.replace = fatal
    ingest(source, folder, form)


def in_child(target: Callable[..., None], *arguments: Any) -> int | None:
    child = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    child.start()
    child.join(60)
    return child.exitcode


# 4 shards and their manifests in turn, then the index; without a cache 4 manifests, then the two files
@pytest.mark.parametrize(("form", "num_writes"), [*(("jpeg", n) for n in range(9)), *(("none", n) for n in range(6))])
def test_killed_before_any_rename_it_goes_on_to_the_same_bytes(
    source: Path, tmp_path: Path, form: str, num_writes: int
) -> None:
    ingest(source, tmp_path / "whole", form)
    code = in_child(ingest_until_killed, source, tmp_path / "resumed", form, num_writes)
    assert code == -signal.SIGKILL
    ingest(source, tmp_path / "resumed", form)
    assert contents(tmp_path / "whole") == contents(tmp_path / "resumed")


def decode_part(source: Path, folder: Path, form: str, part: slice) -> None:
    listing = list_images([source])
    decode_shards(listing, listing.attrs["roots"], folder, part, cache=form, **SETTINGS)


@pytest.mark.parametrize("form", FORMS)
def test_several_processes_decode_slices_to_the_same_bytes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    ingest(source, tmp_path / "one", form)
    for rank in range(2):
        assert in_child(decode_part, source, tmp_path / "two", form, slice(rank, None, 2)) == 0
    monkeypatch.setattr("grappa.images.ingest.decode_bytes", None)  # nothing is left to decode, or to read again
    monkeypatch.setattr("grappa.core.notes.claim", None)
    ingest(source, tmp_path / "two", form, checked=True)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.parametrize("form", FORMS)
def test_another_form_decodes_again(source: Path, tmp_path: Path, form: str) -> None:
    for earlier in FORMS:
        folder = tmp_path / earlier
        ingest(source, folder / "pixels", earlier, manifests=folder / "notes")
        found, roots = ingest(source, tmp_path / "fresh" / earlier, form, manifests=folder / "notes")
        again = pixels(open_images(tmp_path / "fresh" / earlier, roots))
        assert len(again) == len(found) == 9


def test_digests_are_summed_while_a_shard_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[Path, dict[str, Any]] = {}
    with monkeypatch.context() as patch:
        patch.setattr("grappa.core.notes.claim", None)  # nothing that was written is read
        ingest(source, tmp_path / "first", "jpeg", written=told.__setitem__)
        ingest(source, tmp_path / "first", "jpeg", written=told.__setitem__, checked=True)
    assert sorted(told) == [shard_file(tmp_path / "first", shard) for shard in range(4)]
    for file, claim in told.items():
        data = file.read_bytes()
        assert claim == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    again: dict[Path, dict[str, Any]] = {}
    ingest(source, tmp_path / "first", "jpeg", written=again.__setitem__)
    assert again == told
