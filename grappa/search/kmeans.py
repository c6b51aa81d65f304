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

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from grappa.core.memory import FLOAT, INTEGER, WORK
from grappa.core.randomness import key, shuffled, uniforms
from grappa.core.vectors import as_tensor, check_unit_vectors, full_float32
from grappa.search import screening
from grappa.search.assignment import BLOCK_ELEMENTS, Assignment, Progress, improve, nearest, reassign
from grappa.search.cluster_means import SAME_POINT, Sums
from grappa.search.shortlists import LISTED, MIN_CENTROIDS, Shortlists

MAX_STARTS, STARTS_BUDGET, SAMPLE_BUDGET = 4, 256, 64
GROWTH, MAX_ROUND = 8, 512  # a round of the start draws an eighth of the centroids so far, at most 512
NUM_TRIALS = 4  # candidates of a round for each centroid that it keeps
MIN_SAMPLE, SAMPLE_PER_CENTROID = 4096, 16  # points on which a round compares its candidates
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
) -> Clustering:
    """Cluster features (N, D), L2-normalised, into ``num_clusters`` clusters; see :func:`cluster_many`."""
    return cluster_many(
        features, [num_clusters], ids=ids, num_iterations=num_iterations, seed=seed, device=device, progress=progress
    )[0]


def cluster_many(
    features: NDArray[np.float32],
    num_clusters: Sequence[int],
    *,
    ids: NDArray[np.uint64],
    num_iterations: int = 20,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress | None = None,
) -> list[Clustering]:
    """Cluster features (N, D) float32, L2-normalised, once for each k of ``num_clusters``.

    The result for a k equals that of a call with this k alone. ids (N,) uint64, unique, name the images: every draw is
    a function of (seed, k, id). At most ``num_iterations`` of
    Lloyd's iterations are made over all images, fewer when no label changes or the mean cosine rises by less than 0.007
    % of itself; of many images a sample makes the first ones. Empty clusters are re-seeded on the worst-served images
    after each. The labels returned are those of the nearest centroids. Rows in the order of their ids are not copied.
    ``progress`` is called with images newly assigned, :func:`num_assignments` in all. ValueError when k < 1, k > N/2,
    fewer distinct images than k, the same id twice, or vectors that are not of length 1.
    """
    features = check_unit_vectors("features", features)
    _check(features, num_clusters, ids, num_iterations)
    order = np.argsort(ids, kind="stable")
    ordered = ids[order].astype(np.uint64)
    points = as_tensor(features if np.array_equal(ordered, ids) else features[order], device)
    with full_float32():
        found = [_cluster(points, ordered, k, num_iterations, seed, progress or _silent) for k in num_clusters]
    return [_in_rows(result, order) for result in found]


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
    return labels.cpu().numpy(), _distances(cosines)


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


def memory_needed(num_images: int, width: int, num_clusters: int) -> int:
    """Return the bytes that clustering takes at its peak, and the assignment of all images after it.

    Counted are the images in the order of their ids (or all images in their file), the sample of the first iterations,
    labels, lists of near centroids, centroids before and after an iteration with their sums, and the products among the
    candidates of a round of the start.
    """
    first = _num_first(num_images, num_clusters)
    points = (num_images + (first if first < num_images else 0)) * width * FLOAT
    listed = LISTED * 2 * FLOAT if num_clusters >= MIN_CENTROIDS else 0
    labels = num_images * (6 * INTEGER + 4 * FLOAT + listed)
    centroids = 8 * num_clusters * width * FLOAT
    candidates = NUM_TRIALS * min(MAX_ROUND, num_clusters / GROWTH)
    return points + labels + centroids + int(candidates) ** 2 * (FLOAT + 1) + WORK // 2


def count_distinct(features: NDArray[np.float32], enough: int) -> int:
    """Count the different rows, but stop as soon as there are ``enough``."""
    seen: set[int] = set()
    for row in features:
        seen.add(hash(row.tobytes()))
        if len(seen) >= enough:
            break
    return len(seen)


def _silent(_: int) -> None:
    return None


def _check(
    features: NDArray[np.float32], num_clusters: Sequence[int], ids: NDArray[np.uint64], num_iterations: int
) -> None:
    if not num_clusters:
        raise ValueError("num_clusters is empty; give at least one number of clusters")
    low, high, number = min(num_clusters), max(num_clusters), len(features)
    if low < 1:
        raise ValueError(f"num_clusters is {low}; expected at least 1")
    if 2 * high > number:
        raise ValueError(f"num_clusters is {high}, but {number} images allow at most {number // 2}; ask for fewer")
    if num_iterations < 1:
        raise ValueError(f"num_iterations is {num_iterations}; expected at least 1")
    if len(ids) != number or len(np.unique(ids)) != number:
        raise ValueError(f"ids holds {len(np.unique(ids))} different ids for {number} images; give each image its own")
    distinct = count_distinct(features, high)
    if distinct < high:
        raise ValueError(f"num_clusters is {high}, but only {distinct} of {number} images differ; ask for fewer")


def _in_rows(result: Clustering, order: NDArray[np.int64]) -> Clustering:
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
    points_ND: torch.Tensor,
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
        tried = (_from_start(points_ND, ids, num_clusters, num_iterations, one, progress) for one in keys)
        return max(tried, key=lambda result: result.objective)
    first = np.sort(shuffled(key(seed, "clusters", num_clusters, "sample"), ids)[:number])
    centroids = _first_centroids(_rows(points_ND, first), ids[first], num_clusters, num_iterations, keys)
    found = Assignment(*nearest(points_ND, centroids, progress))
    return _iterated(points_ND, found, centroids, num_iterations, TOLERANCE, progress)


def _num_first(num_images: int, num_clusters: int) -> int:
    """Return on how many images the first iterations are made: a quarter or less, where this is enough, or all."""
    sample = max(MIN_SAMPLE, min(FIRST_PER_CENTROID * num_clusters, num_images // 4))
    enough = max(sample, FEWEST_PER_CENTROID * num_clusters)
    return sample if sample == enough and 4 * sample <= num_images else num_images


def _first_centroids(
    sample_ND: torch.Tensor, ids: NDArray[np.uint64], num_clusters: int, num_iterations: int, keys: Sequence[int]
) -> torch.Tensor:
    """Return the centroids (k, D) of the best of several starts on a sample of the points."""
    best, objective = None, -math.inf
    for one in keys:
        centroids, found = start(sample_ND, ids, num_clusters, one)
        centroids, _ = _iterate(sample_ND, found, centroids, num_iterations, FIRST_TOLERANCE, _silent)
        if best is None or _mean_cosine(found) > objective:
            best, objective = centroids, _mean_cosine(found)
    assert best is not None
    return best


def _from_start(
    points_ND: torch.Tensor,
    ids: NDArray[np.uint64],
    num_clusters: int,
    num_iterations: int,
    start_key: int,
    progress: Progress,
) -> Clustering:
    centroids, found = start(points_ND, ids, num_clusters, start_key)
    progress(len(ids))
    return _iterated(points_ND, found, centroids, num_iterations, TOLERANCE, progress)


def _iterated(
    points_ND: torch.Tensor,
    found: Assignment,
    centroids_CD: torch.Tensor,
    num_iterations: int,
    tolerance: float,
    progress: Progress,
) -> Clustering:
    centroids, num_reseeded = _iterate(points_ND, found, centroids_CD, num_iterations, tolerance, progress)
    sizes = torch.bincount(found.labels, minlength=len(centroids))
    arrays = found.labels.cpu().numpy(), centroids.cpu().numpy(), _distances(found.cosines), sizes.cpu().numpy()
    return Clustering(*arrays, objective=_mean_cosine(found), num_reseeded=num_reseeded)


def _iterate(
    points_ND: torch.Tensor,
    found: Assignment,
    centroids_CD: torch.Tensor,
    num_iterations: int,
    tolerance: float,
    progress: Progress,
) -> tuple[torch.Tensor, int]:
    """Make Lloyd's iterations, ``found`` in place, until the mean cosine rises by less than ``tolerance`` of itself.

    Returns the centroids and how many of them were re-seeded.
    """
    centroids, value, num_reseeded = centroids_CD, _mean_cosine(found), 0
    lists, sums = _lists(points_ND.device, len(centroids)), Sums()
    for iteration in range(num_iterations):
        before, stood, former = found.labels.clone(), centroids, value
        centroids = sums.means(points_ND, found.labels, centroids)
        if iteration and lists is not None:
            lists.reassign(found, points_ND, centroids)
            progress(len(points_ND))
        else:
            reassign(found, points_ND, centroids, (centroids != stood).any(1), progress)
        centroids, num_new = fill_empty(points_ND, found, centroids)
        num_reseeded, value = num_reseeded + num_new, _mean_cosine(found)
        if torch.equal(found.labels, before) or value - former < tolerance * abs(value):
            progress(len(points_ND) * (num_iterations - 1 - iteration))
            break
    return centroids, num_reseeded


def _lists(device: torch.device, num_clusters: int) -> Shortlists | None:
    """Return lists of near centroids where they save time: on a CPU without quick products that screen all of them."""
    quick = device.type != "cpu" or screening.worthwhile(device, num_clusters)
    return None if quick or num_clusters < MIN_CENTROIDS else Shortlists()


def _mean_cosine(found: Assignment) -> float:
    return float(found.cosines.double().mean())


def _distances(cosines: torch.Tensor) -> NDArray[np.float32]:
    distances: NDArray[np.float32] = (1.0 - cosines).clamp(0.0, 2.0).cpu().numpy()
    return distances


def start(
    points_ND: torch.Tensor, ids: NDArray[np.uint64], num_clusters: int, start_key: int
) -> tuple[torch.Tensor, Assignment]:
    """Draw points as first centroids: greedy k-means++ in growing rounds of an eighth of the present number.

    Each round draws candidates in proportion to their distance to the nearest centroid so far, and keeps the quarter
    that serves a sample of the points best, no two in one place. A draw is a function of ``start_key`` and an id.
    Returns centroids (k, D), and the assignment of the points to them, which costs nothing more.
    """
    found = Assignment.none(points_ND)
    near_N = torch.zeros_like(found.cosines)
    chosen: NDArray[np.int64] = np.empty(0, dtype=np.int64)
    while len(chosen) < num_clusters:
        number = min(max(1, len(chosen) // GROWTH), MAX_ROUND, num_clusters - len(chosen))
        draws = uniforms(key(start_key, len(chosen)), ids, 1)[:, 0]
        drawn = _draw(draws, 1.0 - near_N.cpu().numpy(), chosen, min(NUM_TRIALS * number, len(ids) - len(chosen)))
        sample = max(MIN_SAMPLE, SAMPLE_PER_CENTROID * len(chosen))
        new = drawn[_best(points_ND, points_ND[:sample], near_N, drawn, number)]
        names = torch.arange(len(chosen), len(chosen) + number, device=points_ND.device)
        improve(found, points_ND, _rows(points_ND, new), names=names)
        near_N = found.cosines
        chosen = np.concatenate([chosen, new])
    return _rows(points_ND, chosen), found


def _rows(values: torch.Tensor, rows: NDArray[np.int64]) -> torch.Tensor:
    return values[torch.from_numpy(rows).to(values.device)]


def _draw(
    draws: NDArray[np.float64], weights: NDArray[np.floating], chosen: NDArray[np.int64], number: int
) -> NDArray[np.int64]:
    """Draw rows without replacement, in proportion to weights (Efraimidis & Spirakis 2006), none of ``chosen``."""
    waiting = -np.log1p(-draws) / np.maximum(weights, 1e-9).astype(np.float64)
    waiting[chosen] = np.inf
    first = np.argpartition(waiting, number - 1)[:number]
    return first[np.argsort(waiting[first], kind="stable")]


def _best(
    points_ND: torch.Tensor, sample_ND: torch.Tensor, cosines: torch.Tensor, drawn: NDArray[np.int64], number: int
) -> NDArray[np.int64]:
    """Return which ``number`` of the drawn points to keep: those that raise the cosines of the sample most.

    A point is passed over if a kept point of this round is nearer to it than any earlier centroid, unless too few
    points are left.
    """
    candidates_LD = _rows(points_ND, drawn)
    gains_L = _gains(sample_ND, cosines[: len(sample_ND)], candidates_LD)
    ranking = gains_L.argsort(descending=True, stable=True).cpu().numpy()
    taken_LL = ((candidates_LD @ candidates_LD.T) > _rows(cosines, drawn)).cpu().numpy()
    return _apart(ranking, taken_LL, number)


def _gains(points_ND: torch.Tensor, cosines: torch.Tensor, candidates_LD: torch.Tensor) -> torch.Tensor:
    """Return by how much each candidate as a further centroid would raise the sum of the points' cosines, (L,)."""
    gains_L = torch.zeros(len(candidates_LD), device=candidates_LD.device)
    num_rows = max(1, BLOCK_ELEMENTS[candidates_LD.device.type] // len(candidates_LD))
    screen = None
    if screening.worthwhile(candidates_LD.device, len(candidates_LD)):
        screen = screening.Screen(candidates_LD, num_rows)
    for rows, near in zip(points_ND.split(num_rows), cosines.split(num_rows), strict=True):
        pairs = screen.larger(rows, near) if screen else None
        if pairs is None:
            gains_L += (rows @ candidates_LD.T).sub_(near[:, None]).clamp_min_(0.0).sum(0)
        else:
            products_P = screening.pair_products(rows, candidates_LD, pairs)
            gains_L.index_add_(0, pairs[1], products_P.sub_(near[pairs[0]]).clamp_min_(0.0))
    return gains_L


def _apart(ranking: NDArray[np.int64], taken_LL: NDArray[np.bool_], number: int) -> NDArray[np.int64]:
    free = np.ones(len(ranking), dtype=bool)
    kept: list[int] = []
    for candidate in ranking:
        if free[candidate] and len(kept) < number:
            kept.append(candidate)
            free &= ~taken_LL[candidate]
    passed = ranking[~np.isin(ranking, kept)]
    return np.concatenate([np.array(kept, dtype=np.int64), passed[: number - len(kept)]])


def fill_empty(points_ND: torch.Tensor, found: Assignment, centroids_CD: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Re-seed empty clusters on the worst-served points until none is empty (or every point is its own centroid).

    ``found`` is brought up to date in place. No point gets further from its centroid and at least one gets nearer in
    each round, so it ends. Returns the centroids and how many were re-seeded.
    """
    num_reseeded = 0
    while True:
        sizes = torch.bincount(found.labels, minlength=len(centroids_CD))
        empty = torch.nonzero(sizes == 0)[:, 0]
        seeds = _worst_served(points_ND, found.labels, found.cosines, sizes, len(empty))
        if not len(seeds):
            return centroids_CD, num_reseeded
        empty = empty[: len(seeds)]
        centroids_CD = centroids_CD.index_copy(0, empty, points_ND[seeds])
        improve(found, points_ND, points_ND[seeds], names=empty)
        num_reseeded += len(seeds)


def _worst_served(
    points_ND: torch.Tensor, labels: torch.Tensor, cosines: torch.Tensor, sizes: torch.Tensor, number: int
) -> torch.Tensor:
    """Return at most ``number`` different points, those furthest from their centroid first.

    A point that is alone in its cluster is not taken.
    """
    left = sizes.cpu().numpy().copy()
    seeds: list[int] = []
    seen: set[bytes] = set()
    order = torch.argsort(cosines, stable=True).cpu().numpy() if number else np.empty(0, dtype=np.int64)
    own, near = labels.cpu().numpy(), cosines.cpu().numpy()
    for row in order:
        if len(seeds) == number or near[row] > 1.0 - SAME_POINT:
            break
        point = points_ND[row].cpu().numpy().tobytes()
        if left[own[row]] > 1 and point not in seen:
            seeds.append(int(row))
            seen.add(point)
            left[own[row]] -= 1
    return torch.tensor(np.array(seeds, dtype=np.int64), device=points_ND.device)
