"""The object views of all images, cut from the original files into a pixel cache of their own.

Every original is decoded once. Row i of the cache is row i of the image table. An interrupted pass goes on at the first
shard that is not whole and ends with the same bytes (``grappa.images.ingest``). Shapes: N images.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from grappa.core.arrays import Box, Pixels
from grappa.images.decoding import ImageDecodeError, decode_image
from grappa.images.files import ERRORS_OF_THE_FILE, ImagesChangedError, RejectedFileError
from grappa.images.ingest import Record, fingerprint, read_shard_manifest, write_shard_manifest
from grappa.images.originals import are_plain_files, open_rows
from grappa.images.pixels import PixelCache, write_index, write_shard
from grappa.images.sources.urls import is_url
from grappa.images.table import escape_path, image_file, unescape_path
from grappa.objects.boxes import object_view

_ADVICE = "bring it back; if the images moved, say where: `grappa init RUN --images FOLDER_OR_TABLE`"


@dataclass(frozen=True)
class Framing:
    """How an object view is cut (``boxes.view_window``) and stored; cache_size: the largest shorter side, in pixels."""

    enlargement: float
    max_aspect: float
    cache_size: int


class Original(NamedTuple):
    """The file of an image, the SHA-256 of its bytes when it was decoded, and the box to cut out (four NaN: none)."""

    path: str
    root: int
    sha256: str
    box: Box


def write_object_views(
    images: pd.DataFrame,
    boxes: NDArray[np.float64],
    roots: Sequence[str],
    cache: PixelCache,
    folder: Path,
    *,
    framing: Framing,
    max_pixels: int,
    shard_size: int,
    manifests: Path,
    num_workers: int = 1,
    progress: Callable[[int], None] | None = None,
    dropped: Callable[[str], None] | None = None,
) -> None:
    """Write the object view of every image as a pixel cache in ``folder``.

    Args:
        images: the image table (path, root, sha256); roots: the folders that its column ``root`` numbers.
        boxes: (N, 4) accepted boxes in pixels of the oriented original; four NaN: the image keeps its own pixels.
        cache: those pixels; row i is row i of the table.
        max_pixels, shard_size, manifests, num_workers, progress, dropped: those of ``grappa.images.ingest.decode_all``.

    Raises:
        ImagesChangedError: an original is gone, cannot be read, or has other bytes than were decoded; the shards that
            are whole stay for the next call.
    """
    for place in (folder, manifests):
        place.mkdir(parents=True, exist_ok=True)
    columns = (images[name].tolist() for name in ("path", "root", "sha256"))
    originals = [Original(*each) for each in zip(*columns, map(tuple, boxes.tolist()), strict=True)]
    plain, reader = are_plain_files(images, roots), open_rows(images, roots, max_pixels=max_pixels)
    read = [None if each else partial(reader, row) for row, each in enumerate(plain)]
    view = partial(
        _view, originals=originals, roots=roots, read=read, cache=cache, framing=framing, max_pixels=max_pixels
    )
    lines: list[list[int]] = []
    with ThreadPoolExecutor(num_workers, "views") as pool:
        for start in range(0, len(originals), shard_size):
            rows = range(start, min(start + shard_size, len(originals)))
            shard, mark = start // shard_size, _mark(originals[rows.start : rows.stop], framing)
            manifest = manifests / f"{shard:05d}.json"
            records = read_shard_manifest(folder, shard, manifest, mark, dropped)
            if records is None:
                records = _write(folder, shard, manifest, mark, _counted(pool.map(view, rows), progress))
            elif progress:
                progress(len(records))
            lines += [record["place"] for record in records]
    write_index(folder, np.array(lines, dtype=np.int64).reshape(-1, 4))


def _write(folder: Path, shard: int, manifest: Path, mark: str, views: Iterator[Pixels]) -> list[Record]:
    records: list[Record] = [{"place": place} for place in write_shard(folder, shard, list(views)).tolist()]
    write_shard_manifest(folder, shard, manifest, mark, records)
    return records


def _mark(originals: list[Original], framing: Framing) -> str:
    return fingerprint(asdict(framing), [[original.sha256, *original.box] for original in originals])


def _counted(views: Iterator[Pixels], progress: Callable[[int], None] | None) -> Iterator[Pixels]:
    for view in views:
        if progress:
            progress(1)
        yield view


def _view(
    row: int,
    *,
    originals: list[Original],
    roots: Sequence[str],
    read: Sequence[Callable[[], bytes] | None],
    cache: PixelCache,
    framing: Framing,
    max_pixels: int,
) -> Pixels:
    original = originals[row]
    if np.isnan(original.box[0]):
        return cache.image(row)
    image = read_original(original.path, roots[original.root], original.sha256, max_pixels=max_pixels, read=read[row])
    return object_view(
        image,
        original.box,
        enlargement=framing.enlargement,
        max_aspect=framing.max_aspect,
        shorter_side=framing.cache_size,
    )


def check_roots(roots: Sequence[str]) -> None:
    """Raise ImagesChangedError where a folder of originals is gone, before boxes are sought for nothing."""
    for root in roots:
        if not is_url(root) and not os.path.isdir(unescape_path(root)):
            raise ImagesChangedError(f"the folder {root} of the originals is gone: {_ADVICE}")


def read_original(
    path: str, root: str, sha256: str, *, max_pixels: int, read: Callable[[], bytes] | None = None
) -> Pixels:
    """Decode an image of the image table once more, (H, W, 3) uint8, oriented, at its full size.

    read: gives its bytes (``grappa.images.originals.open_rows``); None: they are those of a local file.

    Raises:
        ImagesChangedError: it is gone, cannot be read, or has other bytes than when the table was made.
    """
    file = image_file(root, path)
    try:
        data = Path(file).read_bytes() if read is None else read()
    except RejectedFileError as error:
        raise ImagesChangedError(f"the original {escape_path(file)} cannot be read now ({error}): {_ADVICE}") from error
    except OSError as error:
        if error.errno not in ERRORS_OF_THE_FILE:
            raise
        shown = escape_path(file)
        raise ImagesChangedError(f"the original {shown} cannot be read now ({error.strerror}): {_ADVICE}") from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ImagesChangedError(f"the original {escape_path(file)} has other bytes than were decoded: {_ADVICE}")
    try:
        return decode_image(data, max_pixels=max_pixels)
    except ImageDecodeError as error:
        raise ImagesChangedError(f"the original {escape_path(file)} cannot be decoded again: {error}") from error
