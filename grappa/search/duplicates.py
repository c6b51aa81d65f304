"""Near-duplicates: all pairs of images whose cosine reaches a threshold, exact, in blocks; and the groups they form."""

# B rows of a block, C columns of a block, D width, N images, P pairs

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from grappa.core.vectors import check_unit_vectors, full_float32
from grappa.search.neighbors import product_tolerance

ROW_BLOCK, COLUMN_BLOCK = 1024, 16384
PAIR_BLOCK = 8192
MAX_PAIRS = 10_000_000


@dataclass(frozen=True)
class Pairs:
    """Pairs of rows: first (P,) and second (P,) int64, first < second; their cosines (P,) float32, largest first."""

    first: NDArray[np.int64]
    second: NDArray[np.int64]
    similarities: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.first)


def near_duplicates(
    embeddings: NDArray[np.float32],
    *,
    threshold: float,
    max_pairs: int = MAX_PAIRS,
    progress: Callable[[int], None] | None = None,
) -> Pairs:
    """Return all pairs of rows of ``embeddings`` (N, D), L2-normalised, whose cosine is at least ``threshold``.

    Products of blocks in float32 find the candidates, products in float64 decide: the result depends neither on the
    blocks nor on the number of threads. Beside the embeddings it takes some 100 MB and 20 bytes a pair. ``progress`` is
    called with the number of rows newly compared with all later ones. ValueError for a threshold outside (0, 1], and
    as soon as more than ``max_pairs`` pairs are found.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"the threshold is {threshold}; give a cosine above 0, at most 1")
    embeddings = check_unit_vectors("embeddings", embeddings)
    lengths = np.sqrt(np.einsum("nd,nd->n", embeddings, embeddings))
    floor = threshold * float(lengths.min()) ** 2 - product_tolerance(embeddings.shape[1])
    found: list[Pairs] = []
    with full_float32():
        for start in range(0, len(embeddings), ROW_BLOCK):
            found += _of_rows(embeddings, start, threshold, floor)
            if sum(map(len, found)) > max_pairs:
                raise ValueError(f"more than {max_pairs} pairs reach the threshold {threshold:g}; give a larger one")
            if progress:
                progress(min(ROW_BLOCK, len(embeddings) - start))
    parts = [np.concatenate([getattr(each, name) for each in found]) for name in ("first", "second", "similarities")]
    order = np.lexsort((parts[1], parts[0], -parts[2]))
    return Pairs(*(part[order] for part in parts))


def _of_rows(embeddings: NDArray[np.float32], start: int, threshold: float, floor: float) -> list[Pairs]:
    """Return the pairs of a block of rows with rows after them, a part for each block of these.

    floor: the least float32 product that a pair at the threshold can have.
    """
    rows_BD = _tensor(embeddings[start : start + ROW_BLOCK])
    found = []
    for other in range(start, len(embeddings), COLUMN_BLOCK):
        products_BC = rows_BD @ _tensor(embeddings[other : other + COLUMN_BLOCK]).T
        first, second = (places.numpy() for places in torch.nonzero(products_BC >= floor, as_tuple=True))
        first, second = first + start, second + other
        later = second > first
        found.append(_decided(embeddings, first[later], second[later], threshold))
    return found


def _decided(
    embeddings: NDArray[np.float32], first: NDArray[np.int64], second: NDArray[np.int64], threshold: float
) -> Pairs:
    exact = np.empty(len(first))
    for start in range(0, len(first), PAIR_BLOCK):
        part = slice(start, start + PAIR_BLOCK)
        one, other = (embeddings[rows[part]].astype(np.float64) for rows in (first, second))
        lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
        exact[part] = np.einsum("pd,pd->p", one, other) / lengths
    exact = np.round(exact, 7)  # a vector and its copy have the cosine 1, whatever their float32 rounding
    kept = exact >= threshold
    return Pairs(first[kept], second[kept], exact[kept].astype(np.float32))


def _tensor(rows: NDArray[np.float32]) -> torch.Tensor:
    return torch.from_numpy(rows if rows.flags.writeable else rows.copy())


def groups(first: NDArray[np.int64], second: NDArray[np.int64], num_rows: int) -> NDArray[np.int64]:
    """Return the group of each of ``num_rows`` rows, (N,) int64: rows that pairs connect, directly or not, share one.

    Groups are numbered by their first rows; a row without a pair is a group of its own.
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    ones = np.ones(len(first), dtype=np.int8)
    _, labels = connected_components(coo_matrix((ones, (first, second)), shape=(num_rows, num_rows)), directed=False)
    _, firsts, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(firsts))[inverse].astype(np.int64)
