"""A curated subset: images drawn evenly over clusters, and within a cluster evenly over the clusters of finer levels.

A small cluster gives all its images before a large one gives more than its share: what is rare stays, what is frequent
is thinned out. The idea is that of hierarchical sampling (Vo et al., Automatic Data Curation for Self-Supervised
Learning, TMLR 2024); we use the partitions that the run has, where the paper clusters the centroids again.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from grappa.core.randomness import key, uniforms


def balanced_order(partitions: Sequence[NDArray[np.int64]], ids: NDArray[np.uint64], *, seed: int) -> NDArray[np.int64]:
    """Return the N rows in an order, (N,) int64, of which the first n are the sample of n images, for every n.

    Args:
        partitions: the cluster of each row, (N,) int64, at one level or several, coarse ones first. The cells of a
            level lie within those of the level before; cells take turns at giving an image.
        ids: (N,) uint64, different numbers of the images (``grappa.core.randomness.id_numbers``): draws belong to
            them, so the order of the rows changes nothing.
        seed: of the draws.

    A sample of n is a part of that of n + 1, and its images are spread over the cells of every level as evenly as
    their sizes allow.
    """
    if any(len(each) != len(ids) for each in partitions):
        raise ValueError(
            f"partitions have {[len(each) for each in partitions]} rows, ids {len(ids)}; give all one length"
        )
    if len(np.unique(ids)) != len(ids):
        raise ValueError("ids holds the same number twice; give each image its own")
    cells = [np.zeros(len(ids), dtype=np.int64)]
    for labels in partitions:
        names, places = np.unique(labels, return_inverse=True)
        cells.append(np.unique(cells[-1] * len(names) + places, return_inverse=True)[1].astype(np.int64))
    draws = uniforms(key(seed, "sample"), ids, len(cells))
    turns = np.zeros(len(ids), dtype=np.int64)  # the round in which a row is its cell's turn
    for level in reversed(range(len(cells))):
        turns = _ranks(cells[level], turns, draws[:, level], ids)
    return np.argsort(turns, kind="stable")


def _ranks(
    cells: NDArray[np.int64], turns: NDArray[np.int64], draws: NDArray[np.float64], ids: NDArray[np.uint64]
) -> NDArray[np.int64]:
    """Return each row's place within its cell, (N,) int64, ordered by turn, then by draw."""
    order = np.lexsort((ids, draws, turns, cells))
    starts = np.searchsorted(cells[order], cells[order], side="left")
    ranks = np.empty(len(cells), dtype=np.int64)
    ranks[order] = np.arange(len(cells)) - starts
    return ranks
