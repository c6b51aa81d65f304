"""The start of k-means: which points are the first centroids."""

# B points of a block, C centroids, D width, L candidates of a round, n points of this process, N points of all

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from grappa.core.randomness import key, uniforms
from grappa.search import screening
from grappa.search.assignment import BLOCK_ELEMENTS, Assignment
from grappa.search.shared_points import SharedPoints

GROWTH, MAX_ROUND = 8, 512  # a round of the start draws an eighth of the centroids so far, at most 512
NUM_TRIALS = 4  # candidates of a round for each centroid that it keeps
MIN_SAMPLE, SAMPLE_PER_CENTROID = 4096, 16  # points on which a round compares its candidates


def start(
    points: SharedPoints, ids: NDArray[np.uint64], num_clusters: int, start_key: int
) -> tuple[torch.Tensor, Assignment]:
    """Draw points as first centroids: greedy k-means++ in growing rounds of an eighth of the present number.

    Each round draws candidates in proportion to their distance to the nearest centroid so far, and keeps the quarter
    that serves a sample of the points best, no two in one place. A draw is a function of ``start_key`` and an id (N,).
    Returns centroids (k, D), and the assignment of the own points to them, which costs nothing more.
    """
    found = Assignment.none(points.own_ND)
    near_N = torch.zeros_like(found.cosines)
    chosen: NDArray[np.int64] = np.empty(0, dtype=np.int64)
    centroids_CD = points.own_ND.new_empty(num_clusters, points.own_ND.shape[1])
    while len(chosen) < num_clusters:
        number = min(max(1, len(chosen) // GROWTH), MAX_ROUND, num_clusters - len(chosen))
        draws = uniforms(key(start_key, len(chosen)), ids[points.own], 1)[:, 0]
        num_drawn = min(NUM_TRIALS * number, points.number - len(chosen))
        drawn = _draw(points, draws, 1.0 - near_N.cpu().numpy(), chosen, num_drawn)
        candidates_LD, near_L = points.take(points.own_ND, drawn), points.take(near_N, drawn)
        sample = max(MIN_SAMPLE, SAMPLE_PER_CENTROID * len(chosen))
        gains_L = _sampled_gains(points, near_N, candidates_LD, min(sample, points.number))
        kept = points.agreed(_best(gains_L, near_L, candidates_LD, number))
        names = torch.arange(len(chosen), len(chosen) + number, device=candidates_LD.device)
        centroids_CD[names] = new_CD = candidates_LD[torch.from_numpy(kept).to(candidates_LD.device)]
        points.improve(found, new_CD, names=names)
        near_N = found.cosines
        chosen = np.concatenate([chosen, drawn[kept]])
    return centroids_CD, found


def _draw(
    points: SharedPoints,
    draws: NDArray[np.float64],
    weights: NDArray[np.floating],
    chosen: NDArray[np.int64],
    number: int,
) -> NDArray[np.int64]:
    """Draw rows without replacement, in proportion to weights (Efraimidis & Spirakis 2006), none of ``chosen``."""
    waiting = -np.log1p(-draws) / np.maximum(weights, 1e-9).astype(np.float64)
    waiting[chosen[points.holds(chosen)] - points.own.start] = np.inf
    return points.smallest(waiting, number)


def _best(gains_L: torch.Tensor, near_L: torch.Tensor, candidates_LD: torch.Tensor, number: int) -> NDArray[np.int64]:
    """Return which ``number`` of the candidates to keep: those that gain most.

    A candidate is passed over if a kept one of this round is nearer to it than any earlier centroid, unless too few
    are left.
    """
    ranking = gains_L.argsort(descending=True, stable=True).cpu().numpy()
    taken_LL = ((candidates_LD @ candidates_LD.T) > near_L).cpu().numpy()
    return _apart(ranking, taken_LL, number)


def _sampled_gains(
    points: SharedPoints, near_N: torch.Tensor, candidates_LD: torch.Tensor, sample: int
) -> torch.Tensor:
    """Return the gains (L,), integers, by each candidate for the first points of each part, ``sample`` in all."""
    gains_L = torch.zeros(len(candidates_LD), dtype=torch.float64, device=candidates_LD.device)
    for part, points_BD in points.parts(Assignment(near_N, near_N)):
        number = -(-sample * len(points_BD) // points.number)
        gains_L += (_gains(points_BD[:number], part.cosines[:number], candidates_LD).double() * points.unit).round_()
    return points.total(gains_L)


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
