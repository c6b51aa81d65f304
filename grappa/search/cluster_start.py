"""The start of k-means: which points are the first centroids."""

# B points of a block, C centroids, D width, L candidates of a round, n points of this process, N points of all, P pairs

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from grappa.core.randomness import key, uniforms
from grappa.search import screening
from grappa.search.assignment import BLOCK_ELEMENTS, Assignment, first_largest, improve, places_of
from grappa.search.cluster_means import SAME_POINT
from grappa.search.shared_points import SharedPoints

GROWTH, MAX_ROUND = 8, 512  # a round of the start draws an eighth of the centroids so far, at most 512
NUM_TRIALS = 4  # candidates of a round for each centroid that it keeps
MIN_SAMPLE, SAMPLE_PER_CENTROID = 4096, 16  # points on which a round compares its candidates


@dataclass(frozen=True)
class Nearer:
    """The pairs of one of the first ``number`` points of a part and a candidate that is nearer than its centroid: rows,
    columns and products, (P,) each, by row."""

    number: int
    rows: torch.Tensor
    columns: torch.Tensor
    products: torch.Tensor


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
        gains_L, nearer = _sampled_gains(points, near_N, candidates_LD, min(sample, points.number))
        kept = points.agreed(_best(gains_L, near_L, candidates_LD, number))
        new = torch.from_numpy(kept).to(candidates_LD.device)
        centroids_CD[len(chosen) : len(chosen) + number] = candidates_LD[new]
        if len(chosen):
            _adopt(points, found, nearer, candidates_LD, new, len(chosen))
        else:
            points.improve(found, candidates_LD[new])
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
) -> tuple[torch.Tensor, list[Nearer]]:
    """Return the gains (L,), integers, by each candidate for the first points of each part, ``sample`` in all: by how
    much it as a further centroid would raise the sum of the points' cosines. Also return the pairs that they come from.
    """
    gains_L = torch.zeros(len(candidates_LD), dtype=torch.float64, device=candidates_LD.device)
    found = []
    for part, points_BD in points.parts(Assignment(near_N, near_N)):
        number = -(-sample * len(points_BD) // points.number)
        nearer = _nearer(points_BD[:number], part.cosines[:number], candidates_LD)
        gains_L.index_add_(0, nearer.columns, points.counted(nearer.products - part.cosines[nearer.rows]))
        found.append(nearer)
    return points.total(gains_L), found


def _nearer(points_BD: torch.Tensor, near_B: torch.Tensor, candidates_LD: torch.Tensor) -> Nearer:
    """Return the pairs of a point and a candidate whose product is larger than the point's cosine (B,) so far, by more
    than rounding: copies of a centroid are no pairs."""
    num_rows = max(1, min(BLOCK_ELEMENTS[candidates_LD.device.type] // len(candidates_LD), len(points_BD)))
    screened = screening.worthwhile(candidates_LD.device, len(candidates_LD))
    screen = screening.Screen(candidates_LD, num_rows) if screened else None
    products = candidates_LD.new_empty(num_rows, len(candidates_LD))
    found = []
    for start in range(0, len(points_BD), num_rows):
        rows_BD, before_B = points_BD[start : start + num_rows], near_B[start : start + num_rows] + SAME_POINT
        pairs = screen.larger(rows_BD, before_B) if screen else None
        if pairs is None:
            products_BL = torch.mm(rows_BD, candidates_LD.T, out=products[: len(rows_BD)])
            pairs, products_P = _larger(products_BL, before_B)
        else:
            products_P = screening.pair_products(rows_BD, candidates_LD, pairs)
            larger = places_of(products_P > before_B[pairs[0]])
            pairs, products_P = (pairs[0][larger], pairs[1][larger]), products_P[larger]
        found.append((pairs[0] + start, pairs[1], products_P))
    return Nearer(len(points_BD), *(torch.cat(each) for each in zip(*found, strict=True)))


def _larger(products_BL: torch.Tensor, floors_B: torch.Tensor) -> tuple[screening.Pairs, torch.Tensor]:
    """Return rows and columns (P,), by row, of all products above their row's floor, and these products (P,)."""
    if products_BL.device.type == "cpu":  # numpy compares in half of torch's time
        mask_BL = torch.from_numpy(products_BL.numpy() > floors_B.numpy()[:, None])
    else:
        mask_BL = products_BL > floors_B[:, None]
    places = places_of(mask_BL.view(-1))
    rows = places // products_BL.shape[1]
    return (rows, places - rows * products_BL.shape[1]), products_BL.view(-1)[places]


def _adopt(
    points: SharedPoints,
    found: Assignment,
    nearer: list[Nearer],
    candidates_LD: torch.Tensor,
    kept: torch.Tensor,
    first_name: int,
) -> None:
    """Give each own point, in place, the nearest of the kept candidates if it is nearer than the point's centroid; of
    the sample's points the products are known. The candidates are called ``first_name`` and so on."""
    kept_L = torch.full((len(candidates_LD),), -1, device=kept.device)
    kept_L[kept] = names = torch.arange(first_name, first_name + len(kept), device=kept.device)
    for (part, points_BD), known in zip(points.parts(found), nearer, strict=True):
        names_P = kept_L[known.columns]
        of_kept = places_of(names_P >= 0)
        pairs = known.rows[of_kept], names_P[of_kept]
        labels_B, largest_B = first_largest(*pairs, known.products[of_kept], known.number)
        better = places_of(largest_B > -torch.inf)
        part.labels[better], part.cosines[better] = labels_B[better], largest_B[better]
        if known.number < len(points_BD):
            rest = Assignment(part.labels[known.number :], part.cosines[known.number :])
            improve(rest, points_BD[known.number :], candidates_LD[kept], names=names)


def _apart(ranking: NDArray[np.int64], taken_LL: NDArray[np.bool_], number: int) -> NDArray[np.int64]:
    free = np.ones(len(ranking), dtype=bool)
    kept: list[int] = []
    for candidate in ranking:
        if free[candidate] and len(kept) < number:
            kept.append(candidate)
            free &= ~taken_LL[candidate]
    passed = ranking[~np.isin(ranking, kept)]
    return np.concatenate([np.array(kept, dtype=np.int64), passed[: number - len(kept)]])
