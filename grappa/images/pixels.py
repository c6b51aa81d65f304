"""The pixel cache: every image, decoded once and stored in plain uint8 arrays that are memory-mapped.

A folder holds shards ``00000.npy``, ``00001.npy``, ... (flat uint8, the images of a shard one after the other, each
H x W x 3) and ``index.npy``, (N, 4) int64: row i says in which shard, at which offset, with which height and width
image i lies.
"""

from __future__ import annotations

import errno
import resource
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from grappa.core.atomic import write_whole

INDEX_FILE = "index.npy"


def shard_file(folder: Path, shard: int) -> Path:
    """Return the file of shard number ``shard``."""
    return folder / f"{shard:05d}.npy"


def write_shard(folder: Path, shard: int, images: Sequence[NDArray[np.uint8]]) -> NDArray[np.int64]:
    """Write a shard of (H, W, 3) uint8 images; it appears whole or not at all.

    Returns:
        (len(images), 4) int64: the images' lines of the index (shard, offset, height, width).
    """
    write_whole(shard_file(folder, shard), lambda file: _write_flat(file, images))
    sizes = np.array([image.size for image in images], dtype=np.int64)
    offsets = (np.cumsum(sizes) - sizes).tolist()
    lines = [(shard, offset, *image.shape[:2]) for offset, image in zip(offsets, images, strict=True)]
    return np.array(lines, dtype=np.int64).reshape(-1, 4)


def _write_flat(file: BinaryIO, images: Sequence[NDArray[np.uint8]]) -> None:
    """Write the bytes that ``np.save`` would write of all pixels end to end, without a second copy in memory."""
    shape = (sum(image.size for image in images),)
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    for image in images:
        file.write(np.ascontiguousarray(image).data)


def write_index(folder: Path, index: NDArray[np.int64]) -> None:
    """Write the index, (N, 4) int64 (shard, offset, height, width), the cache's last file."""
    write_whole(folder / INDEX_FILE, lambda file: np.save(file, index.astype(np.int64), allow_pickle=False))


class ImageRows(Protocol):
    """Images by row of the image table: a pixel cache, or images that are made from one at every access."""

    def __len__(self) -> int: ...

    def image(self, row: int) -> NDArray[np.uint8]:
        """Return the image of a row, (H, W, 3) uint8."""
        ...


@dataclass(frozen=True)
class ChosenRows:
    """Some of the images: row i is row ``rows[i]`` of ``images``; rows: (m,) int64."""

    images: ImageRows
    rows: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.rows)

    def image(self, row: int) -> NDArray[np.uint8]:
        return self.images.image(int(self.rows[row]))


@dataclass(frozen=True)
class PixelCache:
    """Read access to the images of a pixel cache, by row of the image table; no image is loaded ahead.

    index: (N, 4) int64 (shard, offset, height, width); shards: flat uint8 memory maps by number.
    """

    index: NDArray[np.int64]
    shards: dict[int, NDArray[np.uint8]]

    @classmethod
    def open(cls, folder: Path) -> PixelCache:
        """Open a cache folder.

        Raises:
            ValueError: a file is missing, unreadable, truncated, or disagrees with the index.
        """
        index = _load(folder / INDEX_FILE)
        if index.ndim != 2 or index.shape[1] != 4 or index.dtype != np.int64:
            raise ValueError(f"{folder / INDEX_FILE} is {index.dtype} {index.shape}, expected int64 (N, 4): {_REDO}")
        _allow_open_files(len(np.unique(index[:, 0])))
        shards = dict(_open_shards(folder, index))
        return cls(index=np.array(index), shards=shards)

    def __len__(self) -> int:
        return len(self.index)

    def image(self, row: int) -> NDArray[np.uint8]:
        """Return the image of a row, (H, W, 3) uint8, a read-only view of the memory map."""
        shard, offset, height, width = self.index[row].tolist()
        pixels: NDArray[np.uint8] = self.shards[shard][offset : offset + height * width * 3]
        return pixels.reshape(height, width, 3)


def repeated_rows(cache: ImageRows) -> list[tuple[int, int]]:
    """Return (row, first) for every row whose pixels are those of the row before it; first: where they begin.

    Copies of one file are neighbours, because the rows are in the order of their ids.
    """
    found: list[tuple[int, int]] = []
    first = 0
    for row in range(1, len(cache)):
        ours, own = cache.image(first), cache.image(row)
        if np.array_equal(ours[:1], own[:1]) and np.array_equal(ours, own):
            found.append((row, first))
        else:
            first = row
    return found


_REDO = "decode the images again"


def _open_shards(folder: Path, index: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    needed = np.zeros(int(index[:, 0].max(initial=-1)) + 1, dtype=np.int64)
    np.maximum.at(needed, index[:, 0], index[:, 1] + index[:, 2] * index[:, 3] * 3)
    for shard in np.unique(index[:, 0]).tolist():
        pixels = _load(shard_file(folder, shard))
        if pixels.dtype != np.uint8 or pixels.shape != (needed[shard],):
            found = f"{pixels.dtype} {pixels.shape}"
            raise ValueError(
                f"{shard_file(folder, shard)} is {found}, the index says uint8 ({needed[shard]},): {_REDO}"
            )
        yield shard, pixels.view(np.ndarray)


def _allow_open_files(num_shards: int) -> None:
    """Each mapped shard keeps a file open: raise this process's soft limit where it is too low for them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = num_shards + 256
    if soft != resource.RLIM_INFINITY and soft < wanted:
        wanted = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))


def _load(file: Path) -> NDArray[Any]:
    try:
        loaded: NDArray[Any] = np.load(file, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise ValueError(f"too many open files at {file}: raise `ulimit -n`, or images.shard_size") from error
        if error.errno == errno.ENOMEM:  # of address space, or of maps: the kernel allows a process vm.max_map_count
            raise ValueError(f"too many files are mapped at {file}: raise images.shard_size") from error
        raise ValueError(f"cannot read {file} of the pixel cache ({error}): {_REDO}") from error
    except (ValueError, EOFError) as error:
        raise ValueError(f"cannot read {file} of the pixel cache ({error}): {_REDO}") from error
    return loaded
