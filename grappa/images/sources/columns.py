"""Columns of listed images, as Arrow arrays: escaped texts, folders of paths, and the table that a source gives.

Shapes: n rows. No Python object is made for a row; where each text has to be looked at, it is in blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from grappa.images.paths import escape_path

TEXT = pa.large_string()
BLOCK = 16_384  # texts that are Python objects at a time
BOX_COLUMNS = ("box_x0", "box_y0", "box_x1", "box_y1")


def escaped(texts: Sequence[str | None]) -> pa.Array:
    """Return texts (``os.fsdecode`` form) as an array, each as ``escape_path`` gives it; None is null."""
    try:
        found = pa.array(texts, TEXT)
    except UnicodeEncodeError:
        return pa.array([None if text is None else escape_path(text) for text in texts], TEXT)
    if pc.any(pc.match_substring(found, "%")).as_py():
        return pa.array([None if text is None else escape_path(text) for text in texts], TEXT)
    return found


def mapped(texts: pa.ChunkedArray, change: Callable[[str], str]) -> pa.ChunkedArray:
    """Return the texts (nulls stay) with a Python function applied to each, which is called once a different text."""
    encoded = texts.combine_chunks().dictionary_encode()
    found = pa.array([change(text) for text in encoded.dictionary.to_pylist()], TEXT)
    return pa.chunked_array([found.take(encoded.indices)], TEXT)


def folders_of(paths: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return the folder of each path, "" for a path without one."""
    return pc.replace_substring_regex(paths, "/?[^/]*$", "")


def blocks(texts: pa.ChunkedArray) -> Iterator[list[str]]:
    """Yield the texts as lists, a block at a time."""
    for start in range(0, len(texts), BLOCK):
        yield texts.slice(start, BLOCK).to_pylist()


def numbers(texts: pa.ChunkedArray, of: Callable[[str], int]) -> NDArray[np.int64]:
    """Return what a function gives for each text, (n,) int64."""
    parts = [np.fromiter(map(of, block), np.int64, len(block)) for block in blocks(texts)]
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def constant(value: str | int | None, number: int, kind: pa.DataType) -> pa.Array:
    """Return an array of one value."""
    return pa.repeat(pa.scalar(value, kind), number)


def give_back() -> None:
    """Give the memory that Arrow keeps for later back to the system."""
    pa.default_memory_pool().release_unused()
