"""Spherical k-means on the pooled features of all domains, at one k or several (start and re-seeding are ours).

Lloyd's iterations on unit vectors: an image belongs to the centroid of largest cosine, a centroid is the normalised
mean of its images. Every image is used (no sub-sampling), rows are handled in blocks (never an N x k array), and images
are put in the order of their ids first: the order of the rows changes nothing. A result for one k does not depend on
the other k's. The module reads from the outside in: clustering at several k, at one k, then the steps of an iteration:
the start (``start``), the means (``Sums``) and the re-seeding of empty clusters (``fill_empty``).
"""

# B points of a block, D width, N points (images), C clusters or centroids (the argument num_clusters, "k"),
# L candidates of a round of the start

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from grappa.core.distributed import ALONE, Processes
from grappa.core.memory import FLOAT, INTEGER, WORK
from grappa.core.randomness import key, shuffled
from grappa.core.vectors import as_tensor, check_unit_vectors, full_float32
from grappa.search import screening
from grappa.search.assignment import Assignment, Progress, nearest, reassign
from grappa.search.cluster_means import SAME_POINT, Sums
from grappa.search.cluster_start import GROWTH, MAX_ROUND, MIN_SAMPLE, NUM_TRIALS, start
from grappa.search.shared_points import SharedPoints, most_rows, own_rows
from grappa.search.shortlists import LISTED, MIN_CENTROIDS, Shortlists

MAX_STARTS, STARTS_BUDGET, SAMPLE_BUDGET = 4, 256, 64
FIRST_PER_CENTROID, FEWEST_PER_CENTROID = 128, 32  # images in the sample on which the first iterations are made
FIRST_TOLERANCE, TOLERANCE = 3e-4, 7e-5  # iterations end where the mean cosine rises by less than this share of itself


@dataclass(frozen=True)
class Clustering:
    """One partition of N images into k clusters.

    pseudo_labels: (N,) int64 in [0, k). centroids: (k, D) float32, of length 1. distances: (N,) float32 in [0, 2], 1 -
    the cosine between an image and its centroid. sizes: (k,) int64. objective: the mean cosine. num_reseeded: how many
    empty clusters were re-seeded.
    """

    pseudo_labels: NDArray[np.int64]
    centroids: NDArray[np.float32]
    distances: NDArray[np.float32]
    sizes: NDArray[np.int64]
    objective: float
    num_reseeded: int


@dataclass(frozen=True)
class ClusterHealth:
    """How even a partition is: its empty and singleton clusters, the largest cluster's share of the images (0-1)."""

    num_clusters: int
    num_empty: int
    num_singletons: int
    largest_share: float
    median_size: float


def cluster(
    features: NDArray[np.float32],
    *,
    num_clusters: int,
    ids: NDArray[np.uint64],
    num_iterations: int = 20,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress | None = None,
    processes: Processes = ALONE,
) -> Clustering:
    """Cluster features (N, D), L2-normalised, into ``num_clusters`` clusters; see :func:`cluster_many`."""
    options: dict[str, Any] = {"num_iterations": num_iterations, "seed": seed, "device": device}
    return cluster_many(features, [num_clusters], ids=ids, progress=progress, processes=processes, **options)[0]


def cluster_many(
    features: NDArray[np.float32],
    num_clusters: Sequence[int],
    *,
    ids: NDArray[np.uint64],
    num_iterations: int = 20,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress | None = None,
    processes: Processes = ALONE,
) -> list[Clustering]:
    """Cluster features (N, D) float32, L2-normalised, once for each k of ``num_clusters``.

    The result for a k equals that of a call with this k alone. ids (N,) uint64, unique, name the images: every draw is
    a function of (seed, k, id). At most ``num_iterations`` of
    Lloyd's iterations are made over all images, fewer when no label changes or the mean cosine rises by less than 0.007
    % of itself; of many images a sample makes the first ones. Empty clusters are re-seeded on the worst-served images
    after each. The labels returned are those of the nearest centroids. Rows in the order of their ids are not copied.
    ``progress`` is called with images newly assigned, :func:`num_assignments` in all. ValueError when k < 1, k > N/2,
    fewer distinct images than k, the same id twice, or vectors that are not of length 1.

    Several processes give all N ids, in ascending order (else ValueError), and each the features of its ``own_rows``
    (``grappa.search.shared_points``) only. Labels and distances returned are those of the own rows, all else is that of
    all images. The result is the same, bit for bit, with any number of processes of one kind of CPU or GPU, each with
    the same number of threads. ``progress`` counts the own images.
    """
    _check(num_clusters, ids, num_iterations)
    order = np.argsort(ids, kind="stable")
    ordered = ids[order].astype(np.uint64)
    in_order = np.array_equal(ordered, ids)
    own = _checked(features, ids, processes, in_order)
    _check_distinct(own, len(ids), max(num_clusters), processes)
    points = SharedPoints(as_tensor(own if in_order else own[order], device), len(ids), processes)
    with full_float32():
        found = [_cluster(points, ordered, k, num_iterations, seed, progress or _silent) for k in num_clusters]
    return found if in_order else [in_rows(result, order) for result in found]


def assign(
    features: NDArray[np.float32],
    centroids: NDArray[np.float32],
    *,
    device: str = "cpu",
    progress: Progress | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return the nearest of centroids (k, D) for features (N, D), both L2-normalised: labels (N,) int64, distances (N,)
    float32 = 1 - cosine in [0, 2]. ``progress`` is called with images newly assigned. ValueError when widths differ."""
    features, centroids = check_unit_vectors("features", features), check_unit_vectors("centroids", centroids)
    if features.shape[1] != centroids.shape[1]:
        raise ValueError(f"features are {features.shape[1]} wide and centroids {centroids.shape[1]}; cluster again")
    with full_float32():
        labels, cosines = nearest(as_tensor(features, device), as_tensor(centroids, device), progress or _silent)
    return labels.cpu().numpy(), distances_of(cosines)


def cluster_health(sizes: NDArray[np.int64]) -> ClusterHealth:
    """Return the health of a partition with these sizes (k,)."""
    return ClusterHealth(
        num_clusters=len(sizes),
        num_empty=int((sizes == 0).sum()),
        num_singletons=int((sizes == 1).sum()),
        largest_share=float(sizes.max() / sizes.sum()),
        median_size=float(np.median(sizes)),
    )


def num_assignments(num_images: int, num_clusters: Sequence[int], num_iterations: int) -> int:
    """Return the sum of all that :func:`cluster_many` tells its progress: the images assigned in all iterations."""
    whole = (_num_starts(k) if _num_first(num_images, k) == num_images else 1 for k in num_clusters)
    return sum(whole) * num_images * (num_iterations + 1)


def memory_needed(num_images: int, width: int, num_clusters: int, world_size: int = 1) -> int:
    """Return the bytes that clustering takes at its peak in the largest of ``world_size`` processes.

    Counted are the images in the order of their ids, the sample of the first iterations, labels, lists of near
    centroids, all of them of the process's own rows; centroids before and after an iteration with their sums, the
    products among the candidates of a round of the start, and with several processes the ids and labels of all images.
    """
    first, own = _num_first(num_images, num_clusters), most_rows(num_images, world_size)
    points = (own + (most_rows(first, world_size) if first < num_images else 0)) * width * FLOAT
    listed = LISTED * 2 * FLOAT if num_clusters >= MIN_CENTROIDS else 0
    labels = own * (6 * INTEGER + 4 * FLOAT + listed) + (num_images - own) * 4 * INTEGER
    centroids = 8 * num_clusters * width * FLOAT
    candidates = NUM_TRIALS * min(MAX_ROUND, num_clusters / GROWTH)
    return points + labels + centroids + int(candidates) ** 2 * (FLOAT + 1) + WORK // 2


def count_distinct(features: NDArray[np.float32], enough: int, processes: Processes = ALONE) -> int:
    """Count the different rows of all processes, but stop as soon as there are ``enough``."""
    seen: set[int] = set()
    for row in features:
        seen.add(_digest(row))
        if len(seen) >= enough:
            break
    if processes.world_size == 1:
        return len(seen)
    found = torch.zeros(enough, 2, dtype=torch.int64)
    found[: len(seen), 0], found[: len(seen), 1] = torch.tensor(sorted(seen)), 1
    digests, real = processes.beside(found).flatten(0, 1).unbind(1)
    return min(len(digests[real > 0].unique()), enough)


def _digest(row: NDArray[np.float32]) -> int:
    """Return 64 bits of a row that are equal in every process, as Python's own ``hash`` is not."""
    return int.from_bytes(hashlib.blake2b(row.tobytes(), digest_size=8).digest(), "little", signed=True)


def _silent(_: int) -> None:
    return None


def _check(num_clusters: Sequence[int], ids: NDArray[np.uint64], num_iterations: int) -> None:
    if not num_clusters:
        raise ValueError("num_clusters is empty; give at least one number of clusters")
    low, high, number = min(num_clusters), max(num_clusters), len(ids)
    if low < 1:
        raise ValueError(f"num_clusters is {low}; expected at least 1")
    if 2 * high > number:
        raise ValueError(f"num_clusters is {high}, but {number} images allow at most {number // 2}; ask for fewer")
    if num_iterations < 1:
        raise ValueError(f"num_iterations is {num_iterations}; expected at least 1")
    if len(np.unique(ids)) != number:
        raise ValueError(f"ids holds {len(np.unique(ids))} different ids for {number} images; give each image its own")


def _checked(
    features: NDArray[np.float32], ids: NDArray[np.uint64], processes: Processes, in_order: bool
) -> NDArray[np.float32]:
    """Return the features of this process; ValueError where they are no unit vectors, or not those of its rows."""
    own = own_rows(len(ids), processes)
    if processes.world_size > 1 and not in_order:
        raise ValueError("the ids of several processes are in no order; give ids, and the rows, in ascending order")
    if len(features) != own.stop - own.start:
        raise ValueError(f"found {len(features)} features, expected those of the rows {own.start} to {own.stop}")
    return check_unit_vectors("features", features) if len(features) else features


def _check_distinct(
    features: NDArray[np.float32], num_images: int, num_clusters: int, processes: Processes = ALONE
) -> None:
    distinct = count_distinct(features, num_clusters, processes)
    if distinct < num_clusters:
        raise ValueError(
            f"num_clusters is {num_clusters}, but only {distinct} of {num_images} images differ; ask for fewer"
        )


def in_rows(result: Clustering, order: NDArray[np.int64]) -> Clustering:
    """Bring what was computed in the order of ids back to the caller's rows."""
    labels, distances = np.empty_like(result.pseudo_labels), np.empty_like(result.distances)
    labels[order], distances[order] = result.pseudo_labels, result.distances
    return Clustering(labels, result.centroids, distances, result.sizes, result.objective, result.num_reseeded)


def _num_starts(num_clusters: int, budget: int = STARTS_BUDGET) -> int:
    """Return how many starts a k gets, of which the best is kept.

    A small k costs little and often ends in a poor local optimum: it gets up to four. On a sample of many images all
    starts end about equally well.
    """
    return min(max(budget // num_clusters, 1), MAX_STARTS)


def _cluster(
    points: SharedPoints,
    ids: NDArray[np.uint64],
    num_clusters: int,
    num_iterations: int,
    seed: int,
    progress: Progress,
) -> Clustering:
    number = _num_first(len(ids), num_clusters)
    budget = STARTS_BUDGET if number == len(ids) else SAMPLE_BUDGET
    keys = [key(seed, "clusters", num_clusters, one) for one in range(_num_starts(num_clusters, budget))]
    if number == len(ids):
        tried = (_from_start(points, ids, num_clusters, num_iterations, one, progress) for one in keys)
        return max(tried, key=lambda result: result.objective)
    first = np.sort(shuffled(key(seed, "clusters", num_clusters, "sample"), ids)[:number])
    centroids = _first_centroids(points.subset(first), ids[first], num_clusters, num_iterations, keys)
    found = Assignment.none(points.own_ND)
    points.improve(found, centroids, progress=progress)
    return _iterated(points, found, centroids, num_iterations, progress)


def _num_first(num_images: int, num_clusters: int) -> int:
    """Return on how many images the first iterations are made: a quarter or less, where this is enough, or all."""
    sample = max(MIN_SAMPLE, min(FIRST_PER_CENTROID * num_clusters, num_images // 4))
    enough = max(sample, FEWEST_PER_CENTROID * num_clusters)
    return sample if sample == enough and 4 * sample <= num_images else num_images


def _first_centroids(
    sample: SharedPoints, ids: NDArray[np.uint64], num_clusters: int, num_iterations: int, keys: Sequence[int]
) -> torch.Tensor:
    """Return the centroids (k, D) of the best of several starts on a sample of the points."""
    best, objective = None, -math.inf
    for one in keys:
        centroids, found = start(sample, ids, num_clusters, one)
        centroids, _, reached = _iterate(sample, found, centroids, num_iterations, FIRST_TOLERANCE, _silent)
        if best is None or reached > objective:
            best, objective = centroids, reached
    assert best is not None
    return best


def _from_start(
    points: SharedPoints,
    ids: NDArray[np.uint64],
    num_clusters: int,
    num_iterations: int,
    start_key: int,
    progress: Progress,
) -> Clustering:
    centroids, found = start(points, ids, num_clusters, start_key)
    progress(len(points.own_ND))
    return _iterated(points, found, centroids, num_iterations, progress)


def _iterated(
    points: SharedPoints,
    found: Assignment,
    centroids_CD: torch.Tensor,
    num_iterations: int,
    progress: Progress,
) -> Clustering:
    centroids, num_reseeded, objective = _iterate(points, found, centroids_CD, num_iterations, TOLERANCE, progress)
    sizes = points.sizes(found, len(centroids))
    arrays = found.labels.cpu().numpy(), centroids.cpu().numpy(), distances_of(found.cosines), sizes.cpu().numpy()
    return Clustering(*arrays, objective=objective, num_reseeded=num_reseeded)


def _iterate(
    points: SharedPoints,
    found: Assignment,
    centroids_CD: torch.Tensor,
    num_iterations: int,
    tolerance: float,
    progress: Progress,
) -> tuple[torch.Tensor, int, float]:
    """Make Lloyd's iterations, ``found`` in place, until the mean cosine rises by less than ``tolerance`` of itself.

    Returns the centroids, how many of them were re-seeded, and the mean cosine.
    """
    centroids, value, num_reseeded = centroids_CD, points.mean(found.cosines), 0
    lists, sums = _lists(points, found, len(centroids)), Sums()
    for iteration in range(num_iterations):
        before, stood, former = found.labels.clone(), centroids, value
        centroids = sums.means(points, found.labels, centroids)
        changed = (centroids != stood).any(1)
        if iteration and lists:
            for each, (part, points_BD) in zip(lists, points.parts(found), strict=True):
                each.reassign(part, points_BD, centroids, changed)
                progress(len(points_BD))
        else:
            for part, points_BD in points.parts(found):
                reassign(part, points_BD, centroids, changed, progress)
        centroids, num_new = fill_empty(points, found, centroids)
        num_reseeded, value = num_reseeded + num_new, points.mean(found.cosines)
        if not points.total((found.labels != before).sum()) or value - former < tolerance * abs(value):
            progress(len(points.own_ND) * (num_iterations - 1 - iteration))
            break
    return centroids, num_reseeded, value


def _lists(points: SharedPoints, found: Assignment, num_clusters: int) -> list[Shortlists]:
    """Return lists of near centroids, of each part, where they save time: on a CPU without quick products that screen
    all of them."""
    device = points.own_ND.device
    quick = device.type != "cpu" or screening.worthwhile(device, num_clusters)
    return [] if quick or num_clusters < MIN_CENTROIDS else [Shortlists() for _ in points.parts(found)]


def distances_of(cosines: torch.Tensor) -> NDArray[np.float32]:
    """Return 1 - cosines, in [0, 2]."""
    distances: NDArray[np.float32] = (1.0 - cosines).clamp(0.0, 2.0).cpu().numpy()
    return distances


def fill_empty(points: SharedPoints, found: Assignment, centroids_CD: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Re-seed empty clusters on the worst-served points until none is empty, or no point gets nearer by that.

    ``found`` is brought up to date in place. No point gets further from its centroid, so it ends. A point need not be
    nearest to itself: lengths differ by up to 1 %. Returns the centroids and how many were re-seeded.
    """
    num_reseeded = 0
    while True:
        sizes = points.sizes(found, len(centroids_CD))
        empty = torch.nonzero(sizes == 0)[:, 0]
        seeds = _worst_served(points, found, sizes.cpu().numpy(), len(empty))
        if not len(seeds):
            return centroids_CD, num_reseeded
        empty, seeds_SD = empty[: len(seeds)], points.take(points.own_ND, seeds)
        centroids_CD = centroids_CD.index_copy(0, empty, seeds_SD)
        before = found.cosines.clone()
        points.improve(found, seeds_SD, names=empty)
        if not points.total((found.cosines > before).sum()):
            return centroids_CD, num_reseeded
        num_reseeded += len(seeds)


def _worst_served(points: SharedPoints, found: Assignment, sizes: NDArray[np.int64], number: int) -> NDArray[np.int64]:
    """Return at most ``number`` different points, those furthest from their centroid first.

    A point that is alone in its cluster is not taken.
    """
    asked, seeds, cosines = 2 * number, np.empty(0, dtype=np.int64), found.cosines.cpu().numpy()
    while len(seeds) < number:
        rows = points.smallest(cosines, min(asked, points.number))
        looked = (points.take(each, rows).cpu().numpy() for each in (found.labels, found.cosines, points.own_ND))
        labels, worst, points_MD = looked
        seeds = rows[_seeds(labels, worst, points_MD, sizes.copy(), number)]
        if len(rows) == points.number or worst[-1] > 1.0 - SAME_POINT:
            break
        asked *= 4
    return seeds


def _seeds(
    labels: NDArray[np.int64],
    cosines: NDArray[np.float32],
    points_ND: NDArray[np.float32],
    left: NDArray[np.int64],
    number: int,
) -> list[int]:
    """Return which of the points, the worst-served first, become centroids; ``left``, the sizes, is used up."""
    seeds: list[int] = []
    seen: set[bytes] = set()
    for place, (label, cosine, point) in enumerate(zip(labels, cosines, points_ND, strict=True)):
        if len(seeds) == number or cosine > 1.0 - SAME_POINT:
            break
        if left[label] > 1 and point.tobytes() not in seen:
            seeds.append(place)
            seen.add(point.tobytes())
            left[label] -= 1
    return seeds
