"""Copies among listed files: how many different contents there are, found with as little reading as possible."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain, groupby, repeat
from typing import IO, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from grappa.images.originals import homes_of
from grappa.images.paths import MISSING
from grappa.images.sources.urls import is_url

_END = 4096  # bytes at the end of a file, which differ even where the heads of photographs are alike
_NUM_THREADS = 8
_ROWS = 4096  # images that are looked at in one go
_BLOCK = 2**20  # bytes that are read at a time


class _Place(NamedTuple):
    """Where the bytes of an image lie."""

    file: str
    offset: int
    size: int


def count_distinct_files(
    listing: pd.DataFrame,
    roots: Sequence[str],
    *,
    among: NDArray[np.bool_] | None = None,
    enough: int | None = None,
) -> int:
    """Count the different contents of listed images; missing files have none.

    A file is opened only if another one has its size, and read as a whole only if their ends agree too. What cannot be
    read counts as one of its own, and so do images behind URLs and those whose size is not known before. No copy of the
    listing is made, and a tar is opened once for thousands of its images.

    Args:
        listing, roots: what ``grappa.images.table.list_images`` gave (rows of the frame, and its ``attrs["roots"]``).
        among: (n,), the rows that are counted; None: all.
        enough: read no file if so many are certain by their sizes; the number returned is then a lower bound.
    """
    sizes = listing["size"].to_numpy()
    present = (sizes != MISSING) if among is None else among & (sizes != MISSING)
    known = present & (sizes >= 0)
    different, counts = np.unique(sizes[known], return_counts=True)
    certain = len(different) + int((present & ~known).sum())
    if enough is not None and certain >= enough:
        return certain
    local = np.array([not is_url(root) for root in roots], bool)[listing["root"].to_numpy()]
    rows = np.flatnonzero(known & local & np.isin(sizes, different[counts > 1]))
    with ThreadPoolExecutor(_NUM_THREADS, "compare") as pool:
        ends = list(pool.map(partial(_ends, listing, roots), _blocks(rows)))
        equal = rows[_is_shared(np.concatenate(ends))] if ends else rows
        contents = list(chain.from_iterable(pool.map(partial(_contents, listing, roots), _blocks(equal))))
    return int(present.sum()) - len(equal) + len(set(contents) - {None}) + contents.count(None)


def _blocks(rows: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    return (rows[start : start + _ROWS] for start in range(0, len(rows), _ROWS))


def _ends(listing: pd.DataFrame, roots: Sequence[str], rows: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return a number of the size and the end of each image, (n,); 0: cannot be read."""
    found = (b"" if end is None else end for end in _read(_places(listing.iloc[rows], roots), _end))
    return np.fromiter((int.from_bytes(end, "little") for end in found), np.uint64, len(rows))


def _contents(listing: pd.DataFrame, roots: Sequence[str], rows: NDArray[np.int64]) -> list[bytes | None]:
    """Return the digest of each image; None: cannot be read."""
    return _read(_places(listing.iloc[rows], roots), _content)


def _is_shared(keys: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Tell of each key whether another one equals it, (n,); 0 equals none."""
    ordered = np.sort(keys)
    shared = np.append(ordered[1:][ordered[1:] == ordered[:-1]], np.uint64(0))  # never empty
    place = np.searchsorted(shared[:-1], keys)
    return np.asarray((shared[place] == keys) & (keys > 0))


def _places(rows: pd.DataFrame, roots: Sequence[str]) -> list[_Place]:
    """Return where the bytes of local images lie: a file of their own, or a part of a tar."""
    offsets = rows["offset"].clip(lower=0).to_list() if "offset" in rows else repeat(0)
    return list(map(_Place, homes_of(rows, roots), offsets, rows["size"].to_list()))


def _read(places: Sequence[_Place], of: Callable[[IO[bytes], _Place], bytes]) -> list[bytes | None]:
    """Return what a function reads of each place, None where that fails; a file is opened once for all in a row."""
    found: list[bytes | None] = []
    for file, parts in ((file, list(group)) for file, group in groupby(places, lambda place: place.file)):
        try:
            with open(file, "rb", buffering=0) as opened:
                found += [_or_none(of, opened, place) for place in parts]
        except OSError:  # it cannot be opened
            found += [None] * len(parts)
    return found


def _or_none(of: Callable[[IO[bytes], _Place], bytes], opened: IO[bytes], place: _Place) -> bytes | None:
    try:
        return of(opened, place)
    except OSError:
        return None


def _end(opened: IO[bytes], place: _Place) -> bytes:
    length = min(place.size, _END)
    end = os.pread(opened.fileno(), length, place.offset + place.size - length)
    return hashlib.blake2b(end, digest_size=8, salt=place.size.to_bytes(8, "little")).digest()


def _content(opened: IO[bytes], place: _Place) -> bytes:
    opened.seek(place.offset)
    digest, left = hashlib.sha256(), place.size
    while left > 0 and (block := opened.read(min(left, _BLOCK))):
        digest.update(block)
        left -= len(block)
    return digest.digest()
