"""Which centroid is nearest to each point: the exact answer in blocks, and its update when few centroids have changed.

A CPU that multiplies bfloat16 numbers screens with them which centroids may be nearest; float32 products decide.
"""

# B points of a block, D width, N points, C centroids, P pairs of a point and a centroid

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from grappa.search import screening

Progress = Callable[[int], None]
Search = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
BLOCK_ELEMENTS = {"cpu": 2**21, "cuda": 2**27}
MAX_BLOCK_ROWS = 65536
MIN_CENTROIDS = 256


@dataclass
class Assignment:
    """Each point's centroid: labels (N,) int64, cosines (N,) float32."""

    labels: torch.Tensor
    cosines: torch.Tensor

    @classmethod
    def none(cls, points_ND: torch.Tensor) -> Assignment:
        """Return labels 0 that any centroid improves on."""
        labels = torch.zeros(len(points_ND), dtype=torch.int64, device=points_ND.device)
        return cls(labels, torch.full((len(points_ND),), -torch.inf, device=points_ND.device))


def nearest(
    points_ND: torch.Tensor, centroids_CD: torch.Tensor, progress: Progress
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the nearest centroid of each point (N,) int64 and its cosine (N,), one block of products at a time."""
    found = Assignment.none(points_ND)
    improve(found, points_ND, centroids_CD, progress=progress)
    return found.labels, found.cosines


def reassign(
    found: Assignment, points_ND: torch.Tensor, centroids_CD: torch.Tensor, changed_C: torch.Tensor, progress: Progress
) -> None:
    """Bring ``found`` up to date in place after the centroids ``changed_C`` (C,) bool have moved.

    A centroid that stayed cannot win a point from a centroid that stayed, nor from one that has come nearer. So only
    points whose centroid moved away from them are compared with all centroids, and the other points with the moved
    centroids. The result is exact, and the work becomes less from iteration to iteration.
    """
    moved = torch.nonzero(changed_C)[:, 0]
    if len(centroids_CD) < MIN_CENTROIDS or 2 * len(moved) > len(centroids_CD):
        found.cosines.fill_(-torch.inf)
        improve(found, points_ND, centroids_CD, progress=progress)
        return
    kept, lost = _split(found, points_ND, centroids_CD, changed_C)
    improve(found, points_ND, centroids_CD, rows=lost, progress=progress)
    if len(moved):
        improve(found, points_ND, centroids_CD[moved], names=moved, rows=kept, progress=progress)
    else:
        progress(len(kept))


def _split(
    found: Assignment, points_ND: torch.Tensor, centroids_CD: torch.Tensor, changed_C: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the points that keep their centroid unless a moved one is nearer, and those whose centroid moved away.

    The cosines of points with a moved centroid are brought up to date in place; where it moved away they become -inf.
    """
    own = torch.nonzero(changed_C[found.labels])[:, 0]
    cosines = screening.pair_products(points_ND, centroids_CD, (own, found.labels[own]))
    lost = own[cosines < found.cosines[own]]
    found.cosines[own] = cosines
    found.cosines[lost] = -torch.inf
    return torch.nonzero(found.cosines > -torch.inf)[:, 0], lost


def improve(
    found: Assignment,
    points_ND: torch.Tensor,
    centroids_CD: torch.Tensor,
    *,
    names: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    progress: Progress = lambda _: None,
) -> None:
    """Give each point, in place, the nearest of these centroids if it is nearer than the point's present centroid.

    names: (C,) the labels of the centroids; None: 0..C-1. rows: the points to look at; None: all.
    """
    number = len(points_ND) if rows is None else len(rows)
    num_rows = max(1, min(BLOCK_ELEMENTS[points_ND.device.type] // len(centroids_CD), number, MAX_BLOCK_ROWS))
    search = _search(centroids_CD, num_rows)
    for start in range(0, number, num_rows):
        block = slice(start, start + num_rows) if rows is None else rows[start : start + num_rows]
        before_B = found.cosines[block]
        labels_B, cosines_B = search(points_ND[block], before_B)
        better_B = cosines_B > before_B
        labels_B = labels_B if names is None else names[labels_B]
        found.labels[block] = torch.where(better_B, labels_B, found.labels[block])
        found.cosines[block] = torch.where(better_B, cosines_B, before_B)
        progress(len(labels_B))


def _search(centroids_CD: torch.Tensor, num_rows: int) -> Search:
    """Return how to find the nearest of these centroids for at most ``num_rows`` points at a time."""
    products = torch.empty(num_rows, len(centroids_CD), device=centroids_CD.device)

    def multiply(points_BD: torch.Tensor, before_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        block_BC = products[: len(points_BD)]
        torch.mm(points_BD, centroids_CD.T, out=block_BC)
        labels = _argmax(block_BC)
        return labels, block_BC.gather(1, labels[:, None])[:, 0]

    if not screening.worthwhile(centroids_CD.device, len(centroids_CD)):
        return multiply
    screen = screening.Screen(centroids_CD, num_rows)

    def screened(points_BD: torch.Tensor, before_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pairs = screen.largest(points_BD, before_B)
        if pairs is None:
            return multiply(points_BD, before_B)
        cosines_P = screening.pair_products(points_BD, centroids_CD, pairs)
        return first_largest(*pairs, cosines_P, len(points_BD))

    return screened


def _argmax(products_BC: torch.Tensor) -> torch.Tensor:
    """Return the first largest column of each row; on a CPU numpy does it ten times faster than torch."""
    if products_BC.device.type == "cpu":
        return torch.from_numpy(products_BC.numpy().argmax(1))
    return products_BC.argmax(1)


def first_largest(
    rows_P: torch.Tensor, columns_P: torch.Tensor, cosines_P: torch.Tensor, num_rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the column (or name) and cosine of each row's largest pair, the smallest column of equal ones; a row
    without a pair gets 0 and -inf."""
    largest_B = cosines_P.new_full((num_rows,), -torch.inf).scatter_reduce_(0, rows_P, cosines_P, "amax")
    winners = places_of(cosines_P == largest_B.index_select(0, rows_P))
    labels_B = columns_P.new_zeros(num_rows)
    labels_B.scatter_reduce_(0, rows_P[winners], columns_P[winners], "amin", include_self=False)
    return labels_B, largest_B


def places_of(mask: torch.Tensor) -> torch.Tensor:
    """Return where a mask (N,) is true, (n,) int64; on a CPU numpy does it eight times faster than torch."""
    if mask.device.type == "cpu":
        return torch.from_numpy(mask.numpy().nonzero()[0])
    return torch.nonzero(mask)[:, 0]
