"""The pixel cache: every image, decoded once, in flat uint8 arrays that are memory-mapped when they are first read.

A folder holds shards ``00000.npy``, ``00001.npy``, ... (flat uint8, the images of a shard one after the other) and
``index.npy``, int64, row i about image i. Raw: an image is H x W x 3 values, and the index (N, 4) says shard, offset,
height and width. Encoded: an image is a file (``grappa.images.caching.codec``), and the index (N, 5) adds its length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from grappa.core.atomic import write_whole
from grappa.core.notes import Claim, Summed, write_claimed
from grappa.images.caching.codec import Encoded, decode
from grappa.images.caching.mapped import REDO, MappedShards, load_array

INDEX_FILE = "index.npy"
RAW_COLUMNS, ENCODED_COLUMNS = 4, 5
NO_LINES = np.zeros((0, RAW_COLUMNS), dtype=np.int64)
_BLOCK_ROWS = 2**20


def shard_file(folder: Path, shard: int) -> Path:
    """Return the file of shard number ``shard``."""
    return folder / f"{shard:05d}.npy"


def write_shard(folder: Path, shard: int, images: Sequence[NDArray[np.uint8]] | Sequence[Encoded]) -> NDArray[np.int64]:
    """Write a shard of (H, W, 3) uint8 images, or of encoded ones; it appears whole or not at all.

    Returns:
        (len(images), 4) int64: the images' lines of the index (shard, offset, height, width); of encoded images
        (len(images), 5): and the length.
    """
    return write_shard_claimed(folder, shard, images)[0]


def write_shard_claimed(
    folder: Path, shard: int, images: Sequence[NDArray[np.uint8]] | Sequence[Encoded]
) -> tuple[NDArray[np.int64], Claim]:
    """Write a shard as ``write_shard`` does; return the lines, and size and digest of the file for its note."""
    parts = [_part(image) for image in images]
    claim = write_claimed(shard_file(folder, shard), lambda file: _write_flat(file, [data for data, _ in parts]))
    sizes = np.array([data.size for data, _ in parts], dtype=np.int64)
    offsets = (np.cumsum(sizes) - sizes).tolist()
    lines = [(shard, offset, *place) for offset, (_, place) in zip(offsets, parts, strict=True)]
    columns = len(lines[0]) if lines else RAW_COLUMNS
    return np.array(lines, dtype=np.int64).reshape(-1, columns), claim


def _part(image: NDArray[np.uint8] | Encoded) -> tuple[NDArray[np.uint8], tuple[int, ...]]:
    """Return what stands in the shard, and what the index says of it beside its place."""
    if isinstance(image, Encoded):
        return np.frombuffer(image.data, dtype=np.uint8), (image.height, image.width, len(image.data))
    return image, (image.shape[0], image.shape[1])


def _write_flat(file: Summed, parts: Sequence[NDArray[np.uint8]]) -> None:
    """Write the bytes that ``np.save`` would write of all parts end to end, without a second copy in memory."""
    shape = (sum(part.size for part in parts),)
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    for part in parts:
        file.write(np.ascontiguousarray(part).data)


def write_index(folder: Path, index: NDArray[np.int64]) -> None:
    """Write the index, int64 (N, 4) or (N, 5), the lines of ``write_shard`` in any order: the cache's last file."""
    write_whole(folder / INDEX_FILE, lambda file: np.save(file, index.astype(np.int64), allow_pickle=False))


class ImageRows(Protocol):
    """Images by row of the image table: a pixel cache, or images that are made from something at every access."""

    def __len__(self) -> int: ...

    def image(self, row: int) -> NDArray[np.uint8]:
        """Return the image of a row, (H, W, 3) uint8."""
        ...

    def content(self, row: int) -> NDArray[np.uint8]:
        """Return what the image is made from, uint8 of any shape: where it is equal, the pixels are equal."""
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

    def content(self, row: int) -> NDArray[np.uint8]:
        return self.images.content(int(self.rows[row]))


@dataclass(frozen=True)
class PixelCache:
    """Read access to the images of a pixel cache, by row of the image table; no image is loaded ahead.

    index: (N, 4) or (N, 5) int64, a memory map; shards: the flat arrays, opened when they are first read.
    """

    index: NDArray[np.int64]
    shards: MappedShards

    @classmethod
    def open(cls, folder: Path) -> PixelCache:
        """Open a cache folder; the size of each of its files is compared with the index.

        Raises:
            ValueError: a file is missing, unreadable, truncated, or disagrees with the index.
        """
        index = load_array(folder / INDEX_FILE)
        if index.ndim != 2 or index.shape[1] not in (RAW_COLUMNS, ENCODED_COLUMNS) or index.dtype != np.int64:
            found = f"{index.dtype} {index.shape}"
            raise ValueError(f"{folder / INDEX_FILE} is {found}, expected int64 (N, 4) or (N, 5): {REDO}")
        return cls(index, MappedShards(folder, _shard_sizes(index), shard_file))

    def __len__(self) -> int:
        return len(self.index)

    def image(self, row: int) -> NDArray[np.uint8]:
        """Return the image of a row, (H, W, 3) uint8: of a raw cache a read-only view of the memory map.

        Raises:
            ValueError: its shard cannot be opened, or its bytes are damaged.
        """
        shard, offset, height, width, *length = self.index[row].tolist()
        if length:
            try:
                return decode(self.shards[shard][offset : offset + length[0]].tobytes(), height, width)
            except ValueError as error:
                raise ValueError(f"image {row} in {self.shards.file(shard)}: {error}: {REDO}") from error
        return self.shards[shard][offset : offset + height * width * 3].reshape(height, width, 3)

    def file(self, row: int) -> Path:
        """Return the file of the shard in which an image lies."""
        return self.shards.file(int(self.index[row, 0]))

    def content(self, row: int) -> NDArray[np.uint8]:
        """Return the pixels of a raw cache (H, W, 3), of an encoded one the bytes of the image's file."""
        shard, offset, _, _, *length = self.index[row].tolist()
        return self.shards[shard][offset : offset + length[0]] if length else self.image(row)


def repeated_rows(cache: ImageRows) -> list[tuple[int, int]]:
    """Return (row, first) for every row whose pixels are those of the row before it; first: where they begin.

    Copies of one file are neighbours, because the rows are in the order of their ids. Contents are compared, so that
    nothing is decoded for it.
    """
    found: list[tuple[int, int]] = []
    first = 0
    for row in range(1, len(cache)):
        ours, own = cache.content(first), cache.content(row)
        if np.array_equal(ours[:1], own[:1]) and np.array_equal(ours, own):
            found.append((row, first))
        else:
            first = row
    return found


def _shard_sizes(index: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return how many bytes of images each shard has at least, by its number; 0: no image of it is in the index."""
    sizes = np.zeros(0, dtype=np.int64)
    for start in range(0, len(index), _BLOCK_ROWS):
        lines = np.asarray(index[start : start + _BLOCK_ROWS])
        lengths = lines[:, 4] if lines.shape[1] == ENCODED_COLUMNS else lines[:, 2] * lines[:, 3] * 3
        sizes = np.concatenate([sizes, np.zeros(max(0, int(lines[:, 0].max()) + 1 - len(sizes)), dtype=np.int64)])
        np.maximum.at(sizes, lines[:, 0], lines[:, 1] + lengths)
    return sizes
