"""The steps of spherical k-means on tensors: a start, the means, new seeds for empty clusters.

All are deterministic and take the points in the order of their ids (hashes): the first rows are a random sample.
"""

# B points of a block, D width, N points, C centroids, L candidates of a round of the start

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from grappa import proposals
from grappa.assignment import BLOCK_ELEMENTS, Assignment, improve
from grappa.randomness import key, uniforms

SAME_POINT = 1e-6
GROWTH, MAX_ROUND = 8, 512
NUM_TRIALS, MIN_SAMPLE, SAMPLE_PER_CENTROID = 4, 4096, 16


def start(
    points_ND: torch.Tensor, ids: NDArray[np.uint64], num_clusters: int, start_key: int
) -> tuple[torch.Tensor, Assignment]:
    """Draw points as first centroids: greedy k-means++ in growing rounds of an eighth of the present number.

    Each round draws candidates in proportion to their distance to the nearest centroid so far, and keeps the quarter
    that serves a sample of the points best, no two in one place. A draw is a function of ``start_key`` and an id.
    Returns centroids (k, D) and the assignment to them that comes out of it for free.
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
    """Return which ``number`` of the drawn points to keep: those that raise the cosines of the sample most, passing
    over one that a kept one of this round would serve better than any earlier centroid does, unless too few are
    left."""
    candidates_LD = _rows(points_ND, drawn)
    gains_L = _gains(sample_ND, cosines[: len(sample_ND)], candidates_LD)
    ranking = gains_L.argsort(descending=True, stable=True).cpu().numpy()
    taken_LL = ((candidates_LD @ candidates_LD.T) > _rows(cosines, drawn)).cpu().numpy()
    return _apart(ranking, taken_LL, number)


def _gains(points_ND: torch.Tensor, cosines: torch.Tensor, candidates_LD: torch.Tensor) -> torch.Tensor:
    """Return by how much each candidate as a further centroid would raise the sum of the points' cosines, (L,)."""
    gains_L = torch.zeros(len(candidates_LD), device=candidates_LD.device)
    num_rows = max(1, BLOCK_ELEMENTS[candidates_LD.device.type] // len(candidates_LD))
    proposer = None
    if proposals.worthwhile(candidates_LD.device, len(candidates_LD)):
        proposer = proposals.Proposer(candidates_LD, num_rows)
    for rows, near in zip(points_ND.split(num_rows), cosines.split(num_rows), strict=True):
        pairs = proposer.larger(rows, near) if proposer else None
        if pairs is None:
            gains_L += (rows @ candidates_LD.T).sub_(near[:, None]).clamp_min_(0.0).sum(0)
        else:
            products_P = proposals.pair_products(rows, candidates_LD, pairs)
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


def means(points_ND: torch.Tensor, labels: torch.Tensor, centroids_CD: torch.Tensor) -> torch.Tensor:
    """Return the normalised mean of each cluster's points; a cluster without points, or of mean zero, keeps its own."""
    add = _sums if points_ND.device.type == "cpu" else _sums_by_segment
    sums_CD = add(points_ND, labels, len(centroids_CD))
    norms = sums_CD.norm(dim=1, keepdim=True)
    return torch.where(norms > SAME_POINT, sums_CD / norms.clamp_min(SAME_POINT), centroids_CD)


def _sums(points_ND: torch.Tensor, labels: torch.Tensor, num_clusters: int) -> torch.Tensor:
    return torch.zeros(num_clusters, points_ND.shape[1]).index_add_(0, labels, points_ND)


def _sums_by_segment(points_ND: torch.Tensor, labels: torch.Tensor, num_clusters: int) -> torch.Tensor:
    """The same sums, in an order that does not vary from run to run on a GPU (atomic additions would)."""
    order = torch.argsort(labels, stable=True)
    lengths = torch.bincount(labels, minlength=num_clusters)
    return torch.segment_reduce(points_ND[order], "sum", lengths=lengths)


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
    """Return at most ``number`` different points, furthest from their centroid first, none alone in its cluster."""
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
