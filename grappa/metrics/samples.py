"""A sample of images, drawn evenly over domains by hashes of their ids: the same in whatever order they come."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from grappa.core.randomness import shuffled


def even_sample(domains: NDArray[np.object_], ids: NDArray[np.uint64], number: int, *, seed: int) -> NDArray[np.int64]:
    """Return ``number`` of the N rows, ascending, or all where there are no more.

    domains (N,), ids (N,) uint64, unique. Every domain gives as many: one with fewer rows gives all of them, and the
    others share what it leaves. ``seed`` is the key of the draw, of which an image's place depends on its id only: a
    domain's sample is part of its larger ones.
    """
    names = sorted(set(domains))
    sizes = np.array([np.count_nonzero(domains == name) for name in names], dtype=np.int64)
    chosen = []
    for name, size in zip(names, _shares(sizes, number), strict=True):
        rows = np.flatnonzero(domains == name)
        chosen.append(rows[shuffled(seed, ids[rows])[:size]])
    return np.sort(np.concatenate(chosen)) if chosen else np.empty(0, dtype=np.int64)


def _shares(sizes: NDArray[np.int64], number: int) -> NDArray[np.int64]:
    """Return how many of each domain are drawn: min(size, level), with the level at which the sum is ``number``."""
    shares, left = np.zeros_like(sizes), min(number, int(sizes.sum()))
    while left:
        open_ones = np.flatnonzero(shares < sizes)
        step = max(1, min(left // len(open_ones), int((sizes - shares)[open_ones].min())))
        given = open_ones[:left] if left < len(open_ones) else open_ones
        shares[given] += step
        left -= step * len(given)
    return shares
