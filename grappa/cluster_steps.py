"""The steps of spherical k-means on tensors: a start, the nearest centroids, the means, new seeds for empty clusters.

All are deterministic and take the points in the order of their ids (hashes): the first rows are a random sample.
"""

# B points of a block, D width, N points, C centroids, L candidates of a round of the start

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from grappa.randomness import key, uniforms

Progress = Callable[[int], None]
BLOCK_ELEMENTS = {"cpu": 2**21, "cuda": 2**27}
SAME_POINT = 1e-6
GROWTH, MAX_ROUND = 8, 512
NUM_TRIALS, MIN_SAMPLE, SAMPLE_PER_CENTROID = 4, 4096, 16


def start(
    points_ND: torch.Tensor, ids: NDArray[np.uint64], num_clusters: int, start_key: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw points as first centroids: greedy k-means++ in growing rounds of an eighth of the present number.

    Each round draws candidates in proportion to their distance to the nearest centroid so far, and keeps the quarter
    that serves a sample of the points best, no two in one place. A draw is a function of ``start_key`` and an id.
    Returns centroids (k, D) and the labels (N,) that come out of it for free.
    """
    cosines = torch.zeros(len(ids), device=points_ND.device)
    labels = torch.zeros(len(ids), dtype=torch.int64, device=points_ND.device)
    chosen: NDArray[np.int64] = np.empty(0, dtype=np.int64)
    while len(chosen) < num_clusters:
        number = min(max(1, len(chosen) // GROWTH), MAX_ROUND, num_clusters - len(chosen))
        draws = uniforms(key(start_key, len(chosen)), ids, 1)[:, 0]
        drawn = _draw(draws, 1.0 - cosines.cpu().numpy(), chosen, min(NUM_TRIALS * number, len(ids) - len(chosen)))
        sample = max(MIN_SAMPLE, SAMPLE_PER_CENTROID * len(chosen))
        new = drawn[_best(points_ND, points_ND[:sample], cosines, drawn, number)]
        found, closer = nearest(points_ND, _rows(points_ND, new), _silent)
        moved = (closer > cosines) | (len(chosen) == 0)
        labels = torch.where(moved, found + len(chosen), labels)
        cosines = torch.where(moved, closer, cosines)
        chosen = np.concatenate([chosen, new])
    return _rows(points_ND, chosen), labels


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
    gains = torch.zeros(len(candidates_LD), device=candidates_LD.device)
    num_rows = max(1, BLOCK_ELEMENTS[candidates_LD.device.type] // len(candidates_LD))
    for rows, near in zip(sample_ND.split(num_rows), cosines[: len(sample_ND)].split(num_rows), strict=True):
        gains += (rows @ candidates_LD.T).sub_(near[:, None]).clamp_min_(0.0).sum(0)
    ranking = gains.argsort(descending=True, stable=True).cpu().numpy()
    taken_LL = ((candidates_LD @ candidates_LD.T) > _rows(cosines, drawn)).cpu().numpy()
    return _apart(ranking, taken_LL, number)


def _apart(ranking: NDArray[np.int64], taken_LL: NDArray[np.bool_], number: int) -> NDArray[np.int64]:
    free = np.ones(len(ranking), dtype=bool)
    kept: list[int] = []
    for candidate in ranking:
        if free[candidate] and len(kept) < number:
            kept.append(candidate)
            free &= ~taken_LL[candidate]
    passed = ranking[~np.isin(ranking, kept)]
    return np.concatenate([np.array(kept, dtype=np.int64), passed[: number - len(kept)]])


def _silent(_: int) -> None:
    return None


def nearest(
    points_ND: torch.Tensor, centroids_CD: torch.Tensor, progress: Progress
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the nearest centroid of each point (N,) int64 and its cosine (N,), one block of products at a time."""
    num_rows = max(1, min(BLOCK_ELEMENTS[points_ND.device.type] // len(centroids_CD), len(points_ND), 65536))
    labels = torch.empty(len(points_ND), dtype=torch.int64, device=points_ND.device)
    cosines = torch.empty(len(points_ND), device=points_ND.device)
    products = torch.empty(num_rows, len(centroids_CD), device=points_ND.device)
    for start in range(0, len(points_ND), num_rows):
        rows = slice(start, start + num_rows)
        block_BC = products[: len(labels[rows])]
        torch.mm(points_ND[rows], centroids_CD.T, out=block_BC)
        labels[rows] = _argmax(block_BC)
        cosines[rows] = block_BC.gather(1, labels[rows, None])[:, 0]
        progress(len(block_BC))
    return labels, cosines


def _argmax(products_BC: torch.Tensor) -> torch.Tensor:
    """The first largest column of each row; on a CPU numpy finds it ten times faster than torch does."""
    if products_BC.device.type == "cpu":
        return torch.from_numpy(products_BC.numpy().argmax(1))
    return products_BC.argmax(1)


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


def fill_empty(
    points_ND: torch.Tensor, labels: torch.Tensor, cosines: torch.Tensor, centroids_CD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """Re-seed empty clusters on the worst-served points until none is empty (or every point is its own centroid).

    No point gets further from its centroid and at least one gets nearer in each round, so it ends.
    """
    num_reseeded = 0
    while True:
        sizes = torch.bincount(labels, minlength=len(centroids_CD))
        empty = torch.nonzero(sizes == 0)[:, 0]
        seeds = _worst_served(points_ND, labels, cosines, sizes, len(empty))
        if not len(seeds):
            return labels, cosines, centroids_CD, num_reseeded
        empty = empty[: len(seeds)]
        centroids_CD = centroids_CD.index_copy(0, empty, points_ND[seeds])
        found, closer = nearest(points_ND, points_ND[seeds], _silent)
        moved = closer > cosines
        labels, cosines = torch.where(moved, empty[found], labels), torch.where(moved, closer, cosines)
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
