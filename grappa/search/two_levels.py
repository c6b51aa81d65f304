"""Spherical k-means in two levels, for so many clusters that comparing each image with every centroid takes too long.

All images are clustered into some sqrt(k) / 2 parts, then each part by itself into its share of the k clusters, both by
:func:`grappa.search.kmeans.cluster`. The borders between parts are still bad then: a few iterations follow in which an
image is compared with the centroids of the parts nearest to it, as an inverted file is searched. Over N images each of
these comparisons is one with some 2 sqrt(k) to 8 sqrt(k) centroids in place of k.
"""

# B images of a block, D width, k clusters, m images of a part, N images of all processes, n of this one, P parts

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from grappa.core.distributed import ALONE, Processes
from grappa.core.memory import FLOAT, INTEGER, WORK
from grappa.core.randomness import key
from grappa.core.vectors import as_tensor, check_unit_vectors, full_float32
from grappa.search import kmeans
from grappa.search.assignment import Assignment, Progress, improve
from grappa.search.cluster_means import Sums
from grappa.search.kmeans import Clustering, cluster, count_distinct, distances_of, fill_empty, in_rows
from grappa.search.screening import without_screening
from grappa.search.shared_points import TAKEN_ROWS, SharedPoints, most_rows

NEAR_PARTS = 4  # parts with whose centroids an image is compared in the end
LAST_ITERATIONS = 3  # Lloyd's iterations across the parts
LARGEST_PART = 4  # times the mean one: the part for which memory is asked


@dataclass(frozen=True)
class Parts:
    """The first level: centroids (P, D) float32, of length 1; the clusters of part p are those from first[p] up to
    first[p + 1], first (P + 1,) int64."""

    centroids: NDArray[np.float32]
    first: NDArray[np.int64]


@without_screening()
def cluster_in_two_levels(
    features: NDArray[np.float32],
    *,
    num_clusters: int,
    ids: NDArray[np.uint64],
    num_iterations: int = 20,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress = lambda _: None,
    processes: Processes = ALONE,
) -> tuple[Clustering, Parts]:
    """Cluster features (N, D) float32, L2-normalised, into ``num_clusters`` clusters, in two levels.

    Arguments and result are those of :func:`grappa.search.kmeans.cluster`, with several processes too, but a label is
    that of the nearest centroid in the four parts that are nearest to the image, or of a cluster that was empty. A
    part's share of the clusters follows its number of images; it is one at least, and at most half of its images and
    its different images. Every draw is a function of (seed, k, part, id). ``progress`` is told :func:`num_assignments`
    in all. A part is clustered by one process, and its images pass through all of them. ValueError also where the
    shares of the parts cannot make up k.
    """
    given: dict[str, Any] = {"num_iterations": num_iterations, "device": device}
    if processes.world_size == 1 and len(features) == len(ids) and (ids[1:] < ids[:-1]).any():
        order = np.argsort(ids, kind="stable")
        same: dict[str, Any] = {"num_clusters": num_clusters, "seed": seed, "progress": progress, **given}
        found, parts = cluster_in_two_levels(features[order], ids=ids[order], **same)
        return in_rows(found, order), parts
    most = max(0, len(ids) - _num_parts(num_clusters)) // 2
    if not 1 <= num_clusters <= most:
        raise ValueError(f"num_clusters is {num_clusters}; {len(ids)} images in two levels allow 1 to {most}")
    team: dict[str, Any] = {"progress": progress, "processes": processes}
    one = key(seed, "parts", num_clusters)
    coarse = cluster(features, num_clusters=_num_parts(num_clusters), ids=ids, seed=one, **given, **team)
    points = SharedPoints(as_tensor(np.ascontiguousarray(features, dtype=np.float32), device), len(ids), processes)
    rows = _members(points, coarse)
    shares = _shares(coarse.sizes, _most(points, rows), num_clusters)
    parts = Parts(coarse.centroids[shares > 0], np.unique([0, *np.cumsum(shares)]))
    second = _Second(points, ids, rows, shares, num_clusters, seed, given)
    centroids, num_reseeded = second.centroids(coarse, progress)
    with full_float32():
        found = _across(points, centroids, parts, progress)
    return replace(found, num_reseeded=coarse.num_reseeded + num_reseeded + found.num_reseeded), parts


@without_screening()
def assign_in_two_levels(
    features: NDArray[np.float32], centroids: NDArray[np.float32], parts: Parts, *, device: str = "cpu"
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return the nearest of centroids (k, D) in the parts that are nearest to features (N, D): labels and distances as
    those of :func:`grappa.search.kmeans.assign`."""
    points = SharedPoints.alone(as_tensor(check_unit_vectors("features", features), device))
    found = Assignment.none(points.own_ND)
    with full_float32():
        _compare(points, found, as_tensor(centroids, device), parts)
    return found.labels.cpu().numpy(), distances_of(found.cosines)


def num_assignments(num_images: int, num_clusters: int, num_iterations: int) -> int:
    """Return the sum of all that :func:`cluster_in_two_levels` tells its progress: the images assigned in all
    iterations of both levels (of the second as if each part had one start) and in those across the parts."""
    coarse = kmeans.num_assignments(num_images, [_num_parts(num_clusters)], num_iterations)
    return coarse + num_images * (num_iterations + 1 + LAST_ITERATIONS + 1)


def memory_needed(num_images: int, width: int, num_clusters: int, world_size: int = 1) -> int:
    """Return the bytes that clustering in two levels takes at its peak in the largest of ``world_size`` processes.

    Counted are the first level; beside the process's images the second one, for a part of ``LARGEST_PART`` times the
    mean size; and what is held after it: centroids before and after an iteration with their sums.
    """
    num_parts, own = _num_parts(num_clusters), most_rows(num_images, world_size)
    part, share = (min(number, LARGEST_PART * number // num_parts) for number in (num_images, num_clusters))
    held = own * width * FLOAT + 2 * num_images * INTEGER
    second = kmeans.memory_needed(part, width, max(share, 1)) + num_clusters * width * FLOAT
    last = 8 * num_clusters * width * FLOAT + own * (6 * INTEGER + 4 * FLOAT) + WORK // 2
    return max(kmeans.memory_needed(num_images, width, num_parts, world_size), held + max(second, last))


def _num_parts(num_clusters: int) -> int:
    return max(1, round(math.sqrt(max(num_clusters, 0)) / 2))


def _members(points: SharedPoints, coarse: Clustering) -> list[NDArray[np.int64]]:
    """Return the rows of each part, ascending, in every process."""
    labels = np.zeros(points.number, dtype=np.int64)
    labels[points.own] = coarse.pseudo_labels
    _add_up(points, labels)
    return np.split(np.argsort(labels, kind="stable"), np.cumsum(coarse.sizes)[:-1])


def _add_up(points: SharedPoints, values: NDArray[Any]) -> None:
    """Put together in place what the processes have put in other places of zeros each, by sums of bits."""
    for block in torch.from_numpy(values.view(np.int32)).split(TAKEN_ROWS):
        points.processes.all_reduce([block])


def _most(points: SharedPoints, rows: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Return how many clusters each part may have (P,): half its images, its different images, and one at least."""
    most = np.zeros(len(rows), dtype=np.int64)
    for part, of_part in enumerate(rows):
        if len(of_part):
            own = points.own_ND[of_part[points.holds(of_part)] - points.own.start].cpu().numpy()
            most[part] = count_distinct(own, max(1, len(of_part) // 2), points.processes)
    return most


def _shares(sizes: NDArray[np.int64], most: NDArray[np.int64], num_clusters: int) -> NDArray[np.int64]:
    """Return the parts' shares of the clusters (P,), in proportion to their sizes, at most ``most``.

    Each part with images gets one; each further one goes to the part that has most images for its clusters, by the
    divisors of Webster (3, 5, 7 ...). Of equal parts the first is served first.
    """
    if most.sum() < num_clusters:
        raise ValueError(f"num_clusters is {num_clusters}; these images in two levels allow at most {most.sum()}")
    shares = np.minimum(most, 1)
    waiting = [(-sizes[part] / 3, part) for part in np.flatnonzero(most > 1)]
    heapq.heapify(waiting)
    for _ in range(num_clusters - int(shares.sum())):
        part = waiting[0][1]
        shares[part] += 1
        if shares[part] < most[part]:
            heapq.heapreplace(waiting, (-sizes[part] / (2 * shares[part] + 1), part))
        else:
            heapq.heappop(waiting)
    return shares


@dataclass(frozen=True)
class _Second:
    """The second level. rows: those of each part. options: further arguments of ``cluster``."""

    points: SharedPoints
    ids: NDArray[np.uint64]
    rows: Sequence[NDArray[np.int64]]
    shares: NDArray[np.int64]
    num_clusters: int
    seed: int
    options: dict[str, Any]

    def centroids(self, coarse: Clustering, progress: Progress) -> tuple[NDArray[np.float32], int]:
        """Return the centroids (k, D) of all parts, and how many were re-seeded; a part that has a share of one keeps
        its centroid."""
        first, processes = np.cumsum(self.shares) - self.shares, self.points.processes
        centroids = np.zeros((self.num_clusters, coarse.centroids.shape[1]), dtype=np.float32)
        num_reseeded, whole = np.zeros(1, dtype=np.int64), np.flatnonzero(self.shares == 1)
        if processes.leads:
            centroids[first[whole]] = coarse.centroids[whole]
        self._tell(whole, progress)
        for group in self._rounds(coarse.sizes):
            found = self._of_own_part(group)
            if found is not None:
                start = first[group[processes.rank]]
                centroids[start : start + len(found.centroids)] = found.centroids
                num_reseeded += found.num_reseeded
            self._tell(group, progress)
        _add_up(self.points, centroids)
        _add_up(self.points, num_reseeded)
        return centroids, int(num_reseeded[0])

    def _rounds(self, sizes: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Return the parts with a share above one in rounds, a part a process, the costliest first: those of a round
        are alike, so that no process waits long."""
        costs = np.where(self.shares > 1, sizes * self.shares, 0)
        order, step = np.argsort(-costs, kind="stable")[: np.count_nonzero(costs)], self.points.processes.world_size
        return [order[start : start + step] for start in range(0, len(order), step)]

    def _of_own_part(self, group: NDArray[np.int64]) -> Clustering | None:
        """Cluster this process's part of a round; None where it has none."""
        mine = None
        for rank, part in enumerate(group):
            taken = self.points.take(self.points.own_ND, self.rows[part])
            mine = taken if rank == self.points.processes.rank else mine
        if mine is None:
            return None
        part = int(group[self.points.processes.rank])
        own: dict[str, Any] = {
            "ids": self.ids[self.rows[part]],
            "seed": key(self.seed, "part", self.num_clusters, part),
        }
        return cluster(mine.cpu().numpy(), num_clusters=int(self.shares[part]), **own, **self.options)

    def _tell(self, group: NDArray[np.int64], progress: Progress) -> None:
        """Tell the progress of some parts: their own images, in all iterations."""
        own = sum(int(self.points.holds(self.rows[part]).sum()) for part in group)
        progress(own * (int(self.options["num_iterations"]) + 1))


def _across(points: SharedPoints, centroids: NDArray[np.float32], parts: Parts, progress: Progress) -> Clustering:
    """Make the iterations across the parts."""
    centroids_kD, found = as_tensor(centroids, str(points.own_ND.device)), Assignment.none(points.own_ND)
    sums, num_reseeded = Sums(), 0
    for iteration in range(LAST_ITERATIONS + 1):
        if iteration:
            centroids_kD = sums.means(points, found.labels, centroids_kD)
        found.cosines.fill_(-torch.inf)
        _compare(points, found, centroids_kD, parts, progress)
        centroids_kD, num_new = fill_empty(points, found, centroids_kD)
        num_reseeded += num_new
    labels, sizes = found.labels.cpu().numpy(), points.sizes(found, len(centroids)).cpu().numpy()
    arrays = labels, centroids_kD.cpu().numpy(), distances_of(found.cosines), sizes
    return Clustering(*arrays, objective=points.mean(found.cosines), num_reseeded=num_reseeded)


def _compare(
    points: SharedPoints,
    found: Assignment,
    centroids_kD: torch.Tensor,
    parts: Parts,
    progress: Progress = lambda _: None,
) -> None:
    """Give each own point, in place, the nearest centroid of the parts near it if it is nearer than the present one."""
    coarse_PD, number = torch.from_numpy(parts.centroids).to(centroids_kD.device), len(parts.centroids)
    for part, points_BD in points.parts(found):
        near = (points_BD @ coarse_PD.T).topk(min(NEAR_PARTS, number)).indices.cpu().numpy()
        order, ends = np.argsort(near, axis=None, kind="stable"), np.cumsum(np.bincount(near.ravel(), minlength=number))
        for one, places in enumerate(np.split(order, ends[:-1])):
            first, after = parts.first[one : one + 2].tolist()
            names = torch.arange(first, after, device=centroids_kD.device)
            rows = torch.from_numpy(places // near.shape[1]).to(centroids_kD.device)
            if len(rows):
                improve(part, points_BD, centroids_kD[first:after], names=names, rows=rows)
        progress(len(points_BD))
