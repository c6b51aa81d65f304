"""Images without a cache: decoded from where they come from at every access, to the pixels that a raw cache has.

A folder holds ``originals.parquet``, row i about image i: what ``grappa.images.originals.open_rows`` needs to read it,
and the SHA-256 of its bytes; and ``originals.json``: cache_size and max_pixels. Bytes that are others than at the first
decoding are an error, never other pixels.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from grappa.core.arrays import Pixels
from grappa.core.atomic import write_whole
from grappa.images.decoding import ImageDecodeError, decode_image, shrink
from grappa.images.files import ImagesChangedError, RejectedFileError
from grappa.images.originals import open_rows
from grappa.images.paths import PLACE_COLUMNS, escape_path, image_file
from grappa.images.pixels import INDEX_FILE, ImageRows, PixelCache

ROWS_FILE, HOW_FILE = "originals.parquet", "originals.json"
FINDERS = (INDEX_FILE, ROWS_FILE, HOW_FILE)  # the files of a folder, cached or not, that say where its images are
ADVICE = "bring it back; if the images moved, say where: `grappa init RUN --images FOLDER_OR_TABLE`"


@dataclass(frozen=True)
class Originals:
    """The originals of an image table, decoded again at their full size; threads may read them at the same time."""

    read: Callable[[int], bytes]
    sha256: pa.Array
    name: Callable[[int], str]
    max_pixels: int

    @classmethod
    def of(cls, table: pd.DataFrame, roots: Sequence[str], *, max_pixels: int) -> Originals:
        """Return the originals of a table with the columns path, root and sha256, and what else says where they are."""
        paths, numbers = pa.array(table["path"], type=pa.large_string()), table["root"].to_numpy()

        def name(row: int) -> str:
            return escape_path(image_file(roots[numbers[row]], paths[row].as_py()))

        read = open_rows(table, roots, max_pixels=max_pixels)
        return cls(read, pa.array(table["sha256"], type=pa.large_string()), name, max_pixels)

    def __len__(self) -> int:
        return len(self.sha256)

    def full(self, row: int) -> Pixels:
        """Return an image (H, W, 3) uint8, oriented, at its full size.

        Raises:
            ImagesChangedError: it is gone, cannot be read, or has other bytes than when the table was made.
        """
        try:
            data = self.read(row)
        except (RejectedFileError, ImagesChangedError) as error:
            why = error.__cause__.strerror if isinstance(error.__cause__, OSError) else str(error)
            raise ImagesChangedError(f"the original {self.name(row)} cannot be read now ({why}): {ADVICE}") from error
        if hashlib.sha256(data).hexdigest() != self.sha256[row].as_py():
            raise ImagesChangedError(f"the original {self.name(row)} has other bytes than were decoded: {ADVICE}")
        try:
            return decode_image(data, max_pixels=self.max_pixels)
        except ImageDecodeError as error:
            raise ImagesChangedError(f"the original {self.name(row)} cannot be decoded again: {error}") from error


@dataclass(frozen=True)
class Uncached:
    """The images of a folder without a cache, by row of the image table (an ``ImageRows``)."""

    originals: Originals
    cache_size: int

    @classmethod
    def open(cls, folder: Path, roots: Sequence[str]) -> Uncached:
        """Open a folder; ``roots``: the folders, as they are now, that the table's column ``root`` numbers."""
        how = json.loads((folder / HOW_FILE).read_bytes())
        table = pd.read_parquet(folder / ROWS_FILE)
        return cls(Originals.of(table, roots, max_pixels=how["max_pixels"]), how["cache_size"])

    def __len__(self) -> int:
        return len(self.originals)

    def image(self, row: int) -> Pixels:
        """Return the pixels that a raw cache would hold, (H, W, 3) uint8; ImagesChangedError as ``Originals.full``."""
        return np.asarray(shrink(self.originals.full(row), self.cache_size))

    def content(self, row: int) -> NDArray[np.uint8]:
        """Return the digest of the image's bytes, and the size to which it is shrunk."""
        return np.frombuffer(f"{self.originals.sha256[row].as_py()} {self.cache_size}".encode(), dtype=np.uint8)


def open_images(folder: Path, roots: Sequence[str]) -> ImageRows:
    """Return the images in a folder that ``grappa.images.ingest.decode_all`` has written, cached or not."""
    return Uncached.open(folder, roots) if (folder / HOW_FILE).exists() else PixelCache.open(folder)


def write_uncached(folder: Path, images: pd.DataFrame, *, cache_size: int, max_pixels: int) -> None:
    """Write the folder of images that are not cached; ``images``: the image table."""
    write_rows(folder, images[places(images)], {"cache_size": cache_size, "max_pixels": max_pixels})


def places(images: pd.DataFrame) -> list[str]:
    """Return the columns of an image table that say where its images are, and which bytes they have."""
    return [name for name in ("path", "root", "size", *PLACE_COLUMNS, "sha256") if name in images]


def write_rows(folder: Path, rows: pd.DataFrame, how: dict[str, object]) -> None:
    """Write the two files of a folder, ``originals.json`` last."""
    plain = rows.reset_index(drop=True)
    plain.attrs = {}
    write_whole(folder / ROWS_FILE, lambda file: plain.to_parquet(file, index=False))
    write_whole(folder / HOW_FILE, lambda file: file.write(json.dumps(how).encode()))
