"""Copies among listed files: how many different contents there are, found with as little reading as possible."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pandas as pd

from grappa.images.paths import MISSING, image_file

_END = 4096  # bytes at the end of a file, which differ even where the heads of photographs are alike
_NUM_THREADS = 8


def count_distinct_files(listing: pd.DataFrame, roots: Sequence[str], *, enough: int | None = None) -> int:
    """Count the different contents of listed files; missing files have none.

    A file is opened only if another one has its size, and read as a whole only if their ends agree too. A file that
    cannot be read counts as one of its own.

    Args:
        listing, roots: what ``grappa.images.table.list_images`` gave (rows of the frame, and its ``attrs["roots"]``).
        enough: read no file if so many are certain by their sizes; the number returned is then a lower bound.
    """
    present = listing[listing["size"] != MISSING]
    files = [image_file(roots[root], path) for root, path in zip(present["root"], present["path"], strict=True)]
    sizes = present["size"].tolist()
    if enough is not None and len(set(sizes)) >= enough:
        return len(set(sizes))
    with ThreadPoolExecutor(_NUM_THREADS, "compare") as pool:
        alike = _shared(files, sizes)
        ends = list(pool.map(_end, alike))
        equal = _shared(alike, ends)
        contents = set(pool.map(_content, equal))
    return len(files) - len(equal) + len(contents)


def _shared(files: Sequence[str], keys: Sequence[Hashable]) -> list[str]:
    """Return the files whose key another file has too."""
    counts = Counter(keys)
    return [file for file, key in zip(files, keys, strict=True) if counts[key] > 1]


def _end(file: str) -> Hashable:
    def read() -> Hashable:
        with open(file, "rb") as opened:
            size = opened.seek(0, os.SEEK_END)
            opened.seek(max(0, size - _END))
            return size, opened.read(_END)

    return _or_itself(file, read)


def _content(file: str) -> Hashable:
    def read() -> Hashable:
        with open(file, "rb", buffering=0) as opened:
            return hashlib.file_digest(opened, "sha256").digest()

    return _or_itself(file, read)


def _or_itself(file: str, read: Callable[[], Hashable]) -> Hashable:
    try:
        return read()
    except OSError:
        return file
