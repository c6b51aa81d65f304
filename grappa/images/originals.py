"""The seam between images and where they come from: the bytes of a row of a table, whatever its source is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
import pyarrow as pa

from grappa.images.files import read_file
from grappa.images.paths import image_file

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

    def read(row: int) -> bytes:
        path = paths[row].as_py()
        size = None if sizes is None else int(sizes[row])
        return read_file(image_file(roots[numbers[row]], path), name=path, size=size, max_pixels=max_pixels)

    return read


def described(rows: pd.DataFrame) -> list[list[Any]]:
    """Return what identifies the images of some rows of a listing, for a fingerprint: a list a row, in JSON's types."""
    boxes = rows[["box_x0", "box_y0", "box_x1", "box_y1"]].to_numpy().tolist()
    columns = [rows[name].tolist() for name in ("path", "root", "domain")]
    return [list(row) for row in zip(*columns, boxes, rows["size"].tolist(), strict=True)]
