"""Copies among listed files: how many different contents there are, found with as little reading as possible."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import pandas as pd

from grappa.images.originals import homes_of
from grappa.images.paths import MISSING
from grappa.images.sources.urls import is_url

_END = 4096  # bytes at the end of a file, which differ even where the heads of photographs are alike
_NUM_THREADS = 8
_BLOCK = 2**20  # bytes that are read at a time


class _Place(NamedTuple):
    """Where the bytes of an image lie."""

    file: str
    offset: int
    size: int


def count_distinct_files(listing: pd.DataFrame, roots: Sequence[str], *, enough: int | None = None) -> int:
    """Count the different contents of listed images; missing files have none.

    A file is opened only if another one has its size, and read as a whole only if their ends agree too. What cannot be
    read counts as one of its own, and so do images behind URLs and those whose size is not known before.

    Args:
        listing, roots: what ``grappa.images.table.list_images`` gave (rows of the frame, and its ``attrs["roots"]``).
        enough: read no file if so many are certain by their sizes; the number returned is then a lower bound.
    """
    present = listing[listing["size"] != MISSING]
    sizes = present["size"].to_numpy()
    different, place, counts = np.unique(sizes[sizes >= 0], return_inverse=True, return_counts=True)
    if enough is not None and len(different) + int((sizes < 0).sum()) >= enough:
        return len(different) + int((sizes < 0).sum())
    local = np.array([not is_url(root) for root in roots], bool)[present["root"].to_numpy()]
    repeated = np.zeros(len(sizes), bool)
    repeated[sizes >= 0] = counts[place] > 1
    rows = present[repeated & local]
    with ThreadPoolExecutor(_NUM_THREADS, "compare") as pool:
        alike = _places(rows, roots)
        ends = list(pool.map(_end, alike))
        equal = _shared(alike, ends)
        contents = set(pool.map(_content, equal))
    return len(present) - len(equal) + len(contents)


def _places(rows: pd.DataFrame, roots: Sequence[str]) -> list[_Place]:
    """Return where the bytes of local images lie: a file of their own, or a part of a tar."""
    offsets = rows["offset"].clip(lower=0) if "offset" in rows else [0] * len(rows)
    return [_Place(*each) for each in zip(homes_of(rows, roots), offsets, rows["size"], strict=True)]


def _shared(places: Sequence[_Place], keys: Sequence[Hashable]) -> list[_Place]:
    """Return the places whose key another one has too."""
    counts = Counter(keys)
    return [place for place, key in zip(places, keys, strict=True) if counts[key] > 1]


def _end(place: _Place) -> Hashable:
    def read() -> Hashable:
        with open(place.file, "rb") as opened:
            opened.seek(place.offset + max(0, place.size - _END))
            return place.size, opened.read(min(place.size, _END))

    return _or_itself(place, read)


def _content(place: _Place) -> Hashable:
    def read() -> Hashable:
        with open(place.file, "rb", buffering=0) as opened:
            opened.seek(place.offset)
            digest, left = hashlib.sha256(), place.size
            while left > 0 and (block := opened.read(min(left, _BLOCK))):
                digest.update(block)
                left -= len(block)
            return digest.digest()

    return _or_itself(place, read)


def _or_itself(place: _Place, read: Callable[[], Hashable]) -> Hashable:
    try:
        return read()
    except OSError:
        return place
