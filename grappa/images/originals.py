"""The seam between images and where they come from: the bytes of a row of a table, whatever its source is."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from grappa.images.files import (
    ImagesChangedError,
    RejectedFileError,
    UnansweredError,
    changed,
    check_size,
    read_file,
)
from grappa.images.paths import PLACE_COLUMNS, UNKNOWN, ImageTableError, escape_path, image_file, tell
from grappa.images.sources import urls
from grappa.images.sources.shards import OpenShards, list_shards, split_shard
from grappa.images.sources.tar_shards import SEPARATOR
from grappa.images.sources.urls import is_url

ReadRow = Callable[[int], bytes]


def open_rows(rows: pd.DataFrame, roots: Sequence[str], *, max_pixels: int) -> ReadRow:
    """Return a function from the number of a row to the bytes of its image. Threads may call it at the same time.

    Rows that lie near each other are best asked for in order: some sources are read in blocks of rows.

    Args:
        rows: a listing, a part of it, or an image table: the columns ``path``, ``root`` (position in ``roots``) and,
            where they are there, ``size``, with which the bytes are compared, and ``PLACE_COLUMNS``.
        roots: the escaped folders of ``list_images``.
        max_pixels: more bytes than an image of so many pixels can need are refused before they are read.

    The function raises:
        RejectedFileError: this image cannot be used, for the reason that the message gives. An UnansweredError may go
            away by itself, so that the reason is not kept for a later pass.
        ImagesChangedError: it is not what was listed.
        OSError: what concerns more than this image, such as too many open files.
    """
    paths, numbers = pa.array(rows["path"], type=pa.large_string()), rows["root"].to_numpy()
    sizes = rows["size"].to_numpy() if "size" in rows else None
    placed = set(PLACE_COLUMNS) <= set(rows)
    offsets = rows["offset"].to_numpy() if placed else None
    versions = pa.array(rows["version"], type=pa.large_string()).dictionary_encode() if placed else None
    shards = OpenShards()

    def read(row: int) -> bytes:
        path, root = paths[row].as_py(), roots[numbers[row]]
        size = None if sizes is None else int(sizes[row])
        offset = -1 if offsets is None else int(offsets[row])
        version = "" if versions is None else versions[row].as_py()
        if offset >= 0 and size is not None:
            return shards.read(root, path, size, offset, version, max_pixels=max_pixels)
        if is_url(root):
            return _read_url(image_file(root, path), path, size, version, max_pixels)
        return read_file(image_file(root, path), name=path, size=size, max_pixels=max_pixels)

    return read


def are_plain_files(rows: pd.DataFrame, roots: Sequence[str]) -> NDArray[np.bool_]:
    """Return which rows are local files of their own, (n,)."""
    local = np.array([not is_url(root) for root in roots], bool)[rows["root"].to_numpy()]
    return local & (rows["offset"].to_numpy() < 0) if "offset" in rows else local


def homes_of(rows: pd.DataFrame, roots: Sequence[str]) -> Iterator[str]:
    """Yield the local file that holds each image of a listing, its own or a shard; "" for one behind a URL."""
    offsets = rows["offset"] if "offset" in rows else repeat(-1)
    before, home = (-1, ""), ""
    for root, path, offset in zip(rows["root"], rows["path"], offsets, strict=False):
        shard = split_shard(path) if offset >= 0 else None
        place = (root, shard[0] if shard else path)
        if place != before:  # many images of a shard follow each other
            before, home = place, "" if is_url(roots[root]) else image_file(roots[root], place[1])
        yield home


def read_image(place: str | Path, *, max_pixels: int) -> bytes:
    """Return the bytes of one image by its address: a file, a URL, or ``shard::member`` as commands print it.

    The headers of the whole shard are read for it.

    Raises:
        ImageTableError: no such image, or it cannot be read; the message is one sentence.
        OSError: the local file cannot be read.
    """
    source = urls.as_source(place)
    parts = None if os.path.lexists(source) else split_shard(str(source))
    if parts is None and not is_url(source):
        return Path(source).read_bytes()
    try:
        if parts is None:
            return _read_url(str(source), tell(source), None, "", max_pixels)
        rows, root = _rows_in_shard(parts[0], str(source))
        return open_rows(rows, [root], max_pixels=max_pixels)(0)
    except (RejectedFileError, ImagesChangedError) as error:
        raise ImageTableError(f"{tell(source)} cannot be read: {getattr(error, 'finding', error)}") from error


def is_there(place: str) -> bool:
    """Tell whether an address leads to a local file, its own or a shard; a URL is taken to lead somewhere."""
    shard = None if os.path.isfile(place) else split_shard(place)
    return is_url(place) or os.path.isfile(shard[0] if shard else place)


def _rows_in_shard(shard: str, place: str) -> tuple[pd.DataFrame, str]:
    """Return the row of one image, and the escaped root; ImageTableError where there is no such image."""
    root, _, name = (shard if is_url(shard) else os.path.abspath(shard)).rpartition("/")
    listed = list_shards(root or "/", [name])[0][0]
    wanted = escape_path(f"{name}{place[len(shard) :]}")
    found = listed.filter(pc.equal(listed["path"], wanted))
    if not len(found):
        first = f", such as {tell(shard)}{listed['path'][0].as_py()[len(escape_path(name)) :]}" if len(listed) else ""
        raise ImageTableError(f"there is no image {tell(place)}: the file holds {len(listed)} images{first}")
    return found.to_pandas().assign(root=0), escape_path(root or "/")


def refuse_packed(files: Iterable[str], what: str) -> None:
    """Raise ImageTableError where an image's address names no file: it lies in a tar or a Parquet file, or is a URL."""
    for file in files:
        if urls.is_url(file) or (SEPARATOR in file and not os.path.lexists(file)):
            raise ImageTableError(f"{file} is no local file: {what} reads local files only; unpack or fetch the images")


def _read_url(url: str, name: str, size: int | None, version: str, max_pixels: int) -> bytes:
    known = size is not None and size >= 0
    try:
        now = urls.look_at(url)
        if version and now.version != version:
            raise changed(name, size if known else None, "it is another one")
        if known and now.size not in (size, UNKNOWN):
            raise changed(name, size, f"it has {now.size} bytes")
        check_size(max(now.size, 0), max_pixels)
        data = urls.read_object(url)
    except urls.NotThereError as error:
        raise changed(name, size, "it has gone") if known else RejectedFileError("missing") from error
    except urls.NoAnswerError as error:
        raise UnansweredError(str(error)) from error
    expected = size if known else now.size
    if expected != UNKNOWN and len(data) != expected:
        raise UnansweredError(f"{len(data)} of {expected} bytes came")
    return data


def described(rows: pd.DataFrame) -> list[list[Any]]:
    """Return what identifies the images of some rows of a listing, for a fingerprint: a list a row, in JSON's types."""
    boxes = rows[["box_x0", "box_y0", "box_x1", "box_y1"]].to_numpy().tolist()
    columns = [rows[name].tolist() for name in ("path", "root", "domain")]
    places = [rows[name].tolist() for name in PLACE_COLUMNS if name in rows]
    return [list(row) for row in zip(*columns, boxes, rows["size"].tolist(), *places, strict=True)]
