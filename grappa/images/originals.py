"""The seam between images and where they come from: the bytes of a row of a table, whatever its source is."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from grappa.images.files import RejectedFileError, UnansweredError, changed, check_size, read_file
from grappa.images.paths import PLACE_COLUMNS, UNKNOWN, ImageTableError, image_file
from grappa.images.sources import urls
from grappa.images.sources.shards import OpenShards
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


def refuse_others(rows: pd.DataFrame, roots: Sequence[str], what: str) -> None:
    """Raise ImageTableError where not all rows are local files of their own; ``what`` reads no others."""
    others = rows["path"].to_numpy()[~are_plain_files(rows, roots)]
    if len(others):
        raise ImageTableError(
            f"{others[0]} is no local file: {what} reads local files only; unpack or fetch the images"
        )


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
