"""Images that are nearly the same, and images that are like no other: both from the nearest neighbours of all images.

N images, K neighbours. Near-duplicates are found by the frozen backbone, which was not taught to see two different
images of a kind as one; outliers by the deployed model, which is the one that searches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from grappa.pipeline.pages.explore.collection import Collection

NUM_NEIGHBORS = 10
LEAST_SIMILARITY = 0.8


@dataclass(frozen=True)
class Near:
    """neighbors (N, K) rows and similarities (N, K) by the frozen backbone; ``loneliness`` (N,): 1 - mean cosine to the
    nearest K images by the deployed model, 0 to 2."""

    neighbors: NDArray[np.int64]
    similarities: NDArray[np.float32]
    loneliness: NDArray[np.float32]


def find_near(collection: Collection, report: Callable[[float], None]) -> Near:
    """Return the nearest images of all images by both models."""
    from grappa.search.neighbors import nearest_neighbors

    number, rows = min(NUM_NEIGHBORS, len(collection) - 1), np.arange(len(collection))
    if number < 1:
        raise ValueError("the run has one image only: nothing can be compared")
    done = 0

    def advance(more: int) -> None:
        nonlocal done
        done += more
        report(done / (2 * len(rows)))

    def search(embeddings: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        points = np.asarray(embeddings)
        return nearest_neighbors(
            points, points, num_neighbors=number, query_ids=rows, candidate_ids=rows, progress=advance
        )

    neighbors, similarities = search(collection.before.embeddings)
    loneliness = 1 - search(collection.after.embeddings)[1].mean(axis=1)
    return Near(neighbors, similarities, loneliness)


def same_files(sha256: Sequence[str]) -> list[list[int]]:
    """Return the rows of images whose files have the same bytes, the largest groups first."""
    found: dict[str, list[int]] = {}
    for row, digest in enumerate(sha256):
        found.setdefault(digest, []).append(row)
    return sorted((rows for rows in found.values() if len(rows) > 1), key=lambda rows: (-len(rows), rows))


def near_duplicates(near: Near, threshold: float) -> list[tuple[list[int], float]]:
    """Return groups of images that chains of similarities of at least ``threshold`` link, with the least of these
    similarities, the most similar groups first."""
    number = len(near.neighbors)
    close = near.similarities >= threshold
    sources, places = np.nonzero(close)
    targets, values = near.neighbors[sources, places], near.similarities[sources, places]
    links = sparse.coo_matrix((np.ones(len(sources)), (sources, targets)), shape=(number, number))
    component = connected_components(links, directed=False)[1]
    least = np.full(int(component.max(initial=-1)) + 1, np.inf)
    np.minimum.at(least, component[sources], values)
    order = np.argsort(component, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(component[order])) + 1)
    found = [(group.tolist(), float(least[component[group[0]]])) for group in groups if len(group) > 1]
    return sorted(found, key=lambda each: (-round(each[1], 6), each[0]))
