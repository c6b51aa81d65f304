"""The object views of all images, cut from the original files into a pixel cache of their own.

Every original is decoded once. Row i of the cache is row i of the image table. An interrupted pass goes on at the first
shard that is not whole and ends with the same bytes (``grappa.images.ingest``). Without a cache nothing is cut ahead:
the views are made from the originals at every access. Shapes: N images.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from grappa.core.arrays import Pixels
from grappa.core.notes import Claim
from grappa.images.caching.codec import Encoded, encode
from grappa.images.caching.manifests import Record, ShardManifests, fingerprint
from grappa.images.caching.uncached import ADVICE, HOW_FILE, ROWS_FILE, Originals, places, write_rows
from grappa.images.decoding import shrink
from grappa.images.files import ImagesChangedError
from grappa.images.paths import unescape_path
from grappa.images.pixels import ENCODED_COLUMNS, RAW_COLUMNS, ImageRows, PixelCache, write_index, write_shard_claimed
from grappa.images.sources.urls import is_url
from grappa.images.table import BOX_COLUMNS
from grappa.objects.boxes import object_view


@dataclass(frozen=True)
class Framing:
    """How an object view is cut (``boxes.view_window``) and stored; cache_size: the largest shorter side, in pixels."""

    enlargement: float
    max_aspect: float
    cache_size: int


def write_object_views(
    images: pd.DataFrame,
    boxes: NDArray[np.float64],
    roots: Sequence[str],
    cached: ImageRows,
    folder: Path,
    *,
    cache: str = "raw",
    framing: Framing,
    max_pixels: int,
    shard_size: int,
    manifests: Path,
    num_workers: int = 1,
    progress: Callable[[int], None] | None = None,
    dropped: Callable[[str], None] | None = None,
    written: Callable[[Path, Claim], None] | None = None,
) -> None:
    """Write the object view of every image as a pixel cache in ``folder``.

    Args:
        images: the image table (path, root, sha256); roots: the folders that its column ``root`` numbers.
        boxes: (N, 4) accepted boxes in pixels of the oriented original; four NaN: the image keeps its own pixels.
        cached: those pixels; row i is row i of the table.
        cache, max_pixels, shard_size, manifests, num_workers, progress, dropped, written: those of
            ``grappa.images.ingest.decode_all``.

    Raises:
        ImagesChangedError: an original is gone, cannot be read, or has other bytes than were decoded; the shards that
            are whole stay for the next call.
    """
    notes = ShardManifests(folder, manifests, dropped, written)
    if cache == "none":
        _write_uncached(folder, images, boxes, framing, max_pixels, progress)
        return
    originals, digests = Originals.of(images, roots, max_pixels=max_pixels), images["sha256"].tolist()

    def view(row: int) -> Pixels | Encoded:
        found = cached.image(row) if np.isnan(boxes[row, 0]) else _view(originals.full(row), boxes[row], framing)
        return encode(found) if cache == "jpeg" else found

    settings = asdict(framing) | ({} if cache == "raw" else {"cache": cache})
    lines: list[list[int]] = []
    with ThreadPoolExecutor(num_workers, "views") as pool:
        for start in range(0, len(images), shard_size):
            rows, shard = range(start, min(start + shard_size, len(images))), start // shard_size
            mark = fingerprint(settings, [[digests[row], *boxes[row].tolist()] for row in rows])
            records = notes.read(shard, mark)
            if records is None:
                records = _write(notes, shard, mark, _counted(pool.map(view, rows), progress))
            elif progress:
                progress(len(records))
            lines += [record["place"] for record in records]
    columns = ENCODED_COLUMNS if cache == "jpeg" else RAW_COLUMNS
    write_index(folder, np.array(lines, dtype=np.int64).reshape(-1, columns))


def _write(notes: ShardManifests, shard: int, mark: str, views: Iterator[Any]) -> list[Record]:
    lines, pixels = write_shard_claimed(notes.folder, shard, list(views))
    records: list[Record] = [{"place": place} for place in lines.tolist()]
    notes.write(shard, mark, pixels, records)
    return records


def _counted(views: Iterator[Any], progress: Callable[[int], None] | None) -> Iterator[Any]:
    for view in views:
        if progress:
            progress(1)
        yield view


def _view(image: Pixels, box: NDArray[np.float64], framing: Framing) -> Pixels:
    x0, y0, x1, y1 = box.tolist()
    return object_view(
        image,
        (x0, y0, x1, y1),
        enlargement=framing.enlargement,
        max_aspect=framing.max_aspect,
        shorter_side=framing.cache_size,
    )


# ---------------------------------------------------------------- without a cache


@dataclass(frozen=True)
class UncachedViews:
    """The object views of a folder without a cache, by row of the image table; boxes (N, 4), four NaN: the image."""

    originals: Originals
    boxes: NDArray[np.float64]
    framing: Framing

    @classmethod
    def open(cls, folder: Path, roots: Sequence[str]) -> UncachedViews:
        """Open a folder; ``roots``: the folders, as they are now, that the table's column ``root`` numbers."""
        how = json.loads((folder / HOW_FILE).read_bytes())
        table = pd.read_parquet(folder / ROWS_FILE)
        originals = Originals.of(table, roots, max_pixels=how.pop("max_pixels"))
        return cls(originals, table[list(BOX_COLUMNS)].to_numpy(dtype=np.float64), Framing(**how))

    def __len__(self) -> int:
        return len(self.originals)

    def image(self, row: int) -> Pixels:
        """Return the view that a raw cache would hold, (H, W, 3) uint8; ImagesChangedError as ``Originals.full``."""
        image, box = self.originals.full(row), self.boxes[row]
        if np.isnan(box[0]):
            return np.asarray(shrink(image, self.framing.cache_size))
        return _view(image, box, self.framing)

    def content(self, row: int) -> NDArray[np.uint8]:
        """Return the digest of the image's bytes, and how its view is cut."""
        made = [self.originals.sha256[row].as_py(), self.boxes[row].tolist(), asdict(self.framing)]
        return np.frombuffer(json.dumps(made).encode(), dtype=np.uint8)


def _write_uncached(
    folder: Path,
    images: pd.DataFrame,
    boxes: NDArray[np.float64],
    framing: Framing,
    max_pixels: int,
    progress: Callable[[int], None] | None,
) -> None:
    rows = images[places(images)].copy()
    rows[list(BOX_COLUMNS)] = boxes
    write_rows(folder, rows, {**asdict(framing), "max_pixels": max_pixels})
    if progress:
        progress(len(images))


def open_object_views(folder: Path, roots: Sequence[str]) -> ImageRows:
    """Return the object views in a folder that ``write_object_views`` has written, cached or not."""
    return UncachedViews.open(folder, roots) if (folder / HOW_FILE).exists() else PixelCache.open(folder)


def check_roots(roots: Sequence[str]) -> None:
    """Raise ImagesChangedError where a folder of originals is gone, before boxes are sought for nothing."""
    for root in roots:
        if not is_url(root) and not os.path.isdir(unescape_path(root)):
            raise ImagesChangedError(f"the folder {root} of the originals is gone: {ADVICE}")
