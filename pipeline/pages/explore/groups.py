"""The clusters of one granularity as they are shown: with their names, merged and split, and what describes them.

N images, G groups, M domains, D width. A group is a cluster, or what people made of clusters (``store.edits``).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from grappa.pipeline.pages.explore.collection import Column

NUM_MEDOIDS = 6


@dataclass(frozen=True)
class Groups:
    """``numbers`` (G,): the groups' numbers, rising; ``of`` (N,): the position of each image's group in ``numbers``.

    distances (N,): 1 - cosine to the centroid of the image's cluster. order (N,): all rows by group, in a group by
    distance; those of group g are ``order[starts[g]:starts[g + 1]]``.
    """

    name: str
    numbers: NDArray[np.int64]
    names: dict[int, str]
    of: NDArray[np.int64]
    distances: NDArray[np.float32]
    order: NDArray[np.int64]
    starts: NDArray[np.int64]

    @classmethod
    def of_images(
        cls, name: str, groups: NDArray[np.int64], distances: NDArray[np.float32], names: dict[int, str]
    ) -> Groups:
        """Return the groups of a granularity from the group of each image (N,)."""
        numbers, of = np.unique(groups, return_inverse=True)
        order = np.lexsort((np.arange(len(of)), distances, of))
        starts = np.searchsorted(of[order], np.arange(len(numbers) + 1))
        return cls(name, numbers, names, of, distances, order, starts)

    def __len__(self) -> int:
        return len(self.numbers)

    @cached_property
    def sizes(self) -> NDArray[np.int64]:
        return np.diff(self.starts)

    def place(self, number: int) -> int | None:
        """Return the position of a group's number, or None where no image is in such a group."""
        found = int(np.searchsorted(self.numbers, number))
        return found if found < len(self) and self.numbers[found] == number else None

    def rows(self, place: int) -> NDArray[np.int64]:
        """Return the rows of a group's images, the most typical first."""
        return self.order[self.starts[place] : self.starts[place + 1]]

    def title(self, place: int) -> str:
        return self.names.get(int(self.numbers[place]), "")

    def mix(self, column: Column) -> NDArray[np.int64]:
        """Return how often each value of a column occurs in each group, (G, M)."""
        return overlap(self.of, len(self), column.codes, len(column.names)).toarray()

    def centroids(self, embeddings: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the L2-normalised mean embedding of each group, (G, D)."""
        member = sparse.csr_matrix(
            (np.ones(len(self.of), dtype=np.float32), (self.of, np.arange(len(self.of)))),
            shape=(len(self), len(self.of)),
        )
        means: NDArray[np.float32] = np.asarray(member @ embeddings)
        return means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)


@dataclass(frozen=True)
class Purity:
    """labelled (G,): how many images of a group have a label; label (G,): the most frequent one's position in the names
    of the labels, -1: none; share (G,): its share of the labelled images, NaN: none."""

    labelled: NDArray[np.int64]
    label: NDArray[np.int64]
    share: NDArray[np.float64]

    @classmethod
    def of(cls, groups: Groups, labels: Column) -> Purity:
        counts = overlap(groups.of, len(groups), labels.codes, max(len(labels.names), 1)).tocsr()
        labelled = np.asarray(counts.sum(axis=1)).ravel()
        label = np.asarray(counts.argmax(axis=1)).ravel()
        most = counts.max(axis=1).toarray().ravel()
        share = np.divide(most, labelled, out=np.full(len(groups), np.nan), where=labelled > 0)
        return cls(labelled, np.where(labelled > 0, label, -1), share)


def overlap(first: NDArray[Any], num_first: int, second: NDArray[Any], num_second: int) -> sparse.coo_matrix:
    """Return how many images have each pair of values, (num_first, num_second); a value below 0 does not count."""
    known = (first >= 0) & (second >= 0)
    ones = np.ones(int(known.sum()), dtype=np.int64)
    found = sparse.coo_matrix((ones, (first[known], second[known])), shape=(num_first, num_second))
    found.sum_duplicates()
    return found


def largest_overlaps(of: Groups, place: int, other: Groups) -> list[tuple[int, int]]:
    """Return (position in ``other``, number of images) of the groups that a group's images are in, largest first."""
    places, counts = np.unique(other.of[of.rows(place)], return_counts=True)
    order = np.lexsort((places, -counts))
    return [(int(places[each]), int(counts[each])) for each in order]


def parts(embeddings: NDArray[np.float32], num_parts: int) -> NDArray[np.int64]:
    """Return into which of the parts a split by k-means puts each image, (n,) int64; part 0 is the largest."""
    from sklearn.cluster import KMeans

    found = KMeans(num_parts, n_init=4, random_state=0).fit_predict(np.asarray(embeddings))
    sizes = np.bincount(found, minlength=num_parts)
    rank = np.empty(num_parts, dtype=np.int64)
    rank[np.argsort(-sizes, kind="stable")] = np.arange(num_parts)
    return rank[found]
