"""The pixel cache: what is written is read, by row; files that disagree are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from grappa.images.pixels import PixelCache, repeated_rows, shard_file, write_index, write_shard


def images(num: int, seed: int = 0) -> list[np.ndarray]:
    draws = np.random.default_rng(seed)
    return [draws.integers(0, 256, (5 + i, 9 - i, 3), dtype=np.uint8) for i in range(num)]


def filled(folder: Path) -> tuple[PixelCache, list[np.ndarray]]:
    written = images(4)
    lines = [write_shard(folder, 0, written[:3]), write_shard(folder, 1, []), write_shard(folder, 2, written[3:])]
    write_index(folder, np.concatenate(lines))
    return PixelCache.open(folder), written


def test_images_come_back_by_row(tmp_path: Path) -> None:
    cache, written = filled(tmp_path)
    assert len(cache) == 4
    for row, image in enumerate(written):
        np.testing.assert_array_equal(cache.image(row), image)
    assert not cache.image(0).flags.writeable
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000.npy", "00001.npy", "00002.npy", "index.npy"]


def test_shards_are_plain_arrays(tmp_path: Path) -> None:
    _, written = filled(tmp_path)
    np.testing.assert_array_equal(
        np.load(tmp_path / "00000.npy", allow_pickle=False), np.concatenate([i.ravel() for i in written[:3]])
    )
    assert np.load(tmp_path / "00001.npy").shape == (0,)


def test_the_index_orders_the_rows(tmp_path: Path) -> None:
    written = images(3)
    write_index(tmp_path, write_shard(tmp_path, 0, written)[[2, 0]])
    cache = PixelCache.open(tmp_path)
    assert len(cache) == 2
    np.testing.assert_array_equal(cache.image(0), written[2])
    np.testing.assert_array_equal(cache.image(1), written[0])


def test_an_empty_cache_opens(tmp_path: Path) -> None:
    write_index(tmp_path, write_shard(tmp_path, 0, []))
    assert len(PixelCache.open(tmp_path)) == 0


@pytest.mark.parametrize("name", ["00000.npy", "index.npy"])
@pytest.mark.parametrize("keep", [0, 40, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, name: str, keep: int) -> None:
    filled(tmp_path)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:keep])
    with pytest.raises(ValueError, match=f"{name} of the pixel cache .*decode the images again"):
        PixelCache.open(tmp_path)


def test_files_that_disagree_are_refused(tmp_path: Path) -> None:
    filled(tmp_path)
    write_shard(tmp_path, 0, images(2))
    with pytest.raises(ValueError, match=r"00000.npy is uint8 .*the index says uint8"):
        PixelCache.open(tmp_path)
    shard_file(tmp_path, 0).unlink()
    with pytest.raises(ValueError, match=r"cannot read .*00000.npy"):
        PixelCache.open(tmp_path)
    np.save(tmp_path / "index.npy", np.zeros((3, 2)))
    with pytest.raises(ValueError, match=r"expected int64 \(N, 4\)"):
        PixelCache.open(tmp_path)


def test_repeated_rows_are_those_with_the_pixels_of_the_row_before(tmp_path: Path) -> None:
    pixels = images(3)
    lines = write_shard(tmp_path, 0, [*pixels, pixels[1].copy()])
    write_index(tmp_path, lines[[0, 1, 3, 1, 2, 0, 0]])
    assert repeated_rows(PixelCache.open(tmp_path)) == [(2, 1), (3, 1), (6, 5)]
    write_index(tmp_path, lines[:0])
    assert repeated_rows(PixelCache.open(tmp_path)) == []
