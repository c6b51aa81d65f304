"""Which few centroids can be nearest to each point while centroids move little: the exact answer by few products.

A full search writes down, for each point, the centroids whose product lies within a margin of its largest, and no other
centroid reaches the floor below. A product of a unit vector changes by no more than the centroid has moved since (the
triangle inequality, as in Elkan 2003 and Drake & Hamerly 2012; the lists hold products instead of distances). So while
the movements are small against the margin, only listed centroids are compared; the few that have moved most are
compared with all points, and the points whose own centroid has left them are searched in full.
"""

# B points of a block, D width, N points, C centroids, P pairs of a point and a centroid on its list

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from grappa.core.vectors import NORM_TOLERANCE
from grappa.search import screening
from grappa.search.assignment import (
    BLOCK_ELEMENTS,
    MAX_BLOCK_ROWS,
    Assignment,
    first_largest,
    improve,
    places_of,
    reassign,
)

MIN_CENTROIDS = 64
LISTED, LISTED_SHARE = 32, 8  # centroids on a list: 32, for fewer than 256 centroids an eighth of them
MAX_SHARE = 0.5  # of a full search: the lists are not used where far centroids and lost points cost more
MARGIN_ROWS, FAR_ROWS = 256, 4096  # points by which the margin is chosen, and which centroids are far
SLACK = 1e-5  # far above the rounding of a float32 product
PAIR_COST, LISTED_COST, ROW_COST = 4.0, 0.5, 20.0  # of a pair, a list's entry and a point, in products of a block


@dataclass(frozen=True)
class _Part:
    """The lists of points from row ``start`` on: where each begins (B + 1,), centroids (P,), products then (P,)."""

    start: int
    begins: torch.Tensor
    columns: torch.Tensor
    products: torch.Tensor


@dataclass
class Shortlists:
    """Lists of all points, made anew when using the old ones has cost as much as a full search.

    While few centroids move, and the first lists would cost more than what is compared without, there are none. floors
    (N,): what no centroid off a point's list reached. reference (C, D): the centroids then. spent: the cost of using
    the lists since, or of doing without, in products.
    """

    reference: torch.Tensor | None = None
    floors: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    parts: list[_Part] = field(default_factory=list)
    spent: float = 0.0

    def reassign(
        self, found: Assignment, points_ND: torch.Tensor, centroids_CD: torch.Tensor, changed_C: torch.Tensor
    ) -> None:
        """Bring ``found`` up to date in place after the centroids ``changed_C`` (C,) bool have moved: the nearest of
        all for each point."""
        whole = float(len(points_ND) * len(centroids_CD))
        if self.reference is None:
            self.spent += len(points_ND) * int(changed_C.sum()) + len(centroids_CD) * int(changed_C[found.labels].sum())
            if self.spent < MAX_SHARE * whole:
                reassign(found, points_ND, centroids_CD, changed_C, lambda _: None)
                return
        if self.reference is None or self.spent >= whole:
            self._search(found, points_ND, centroids_CD)
            return
        rows = torch.arange(len(points_ND))
        found.cosines.copy_(screening.pair_products(points_ND, centroids_CD, (rows, found.labels)))
        moved_C = (centroids_CD - self.reference).norm(dim=1) * (1.0 + NORM_TOLERANCE) + SLACK
        far_C, reach = self._far(found, moved_C)
        lost = places_of(found.cosines < self.floors + reach)
        cost = len(points_ND) * int(far_C.sum()) + len(lost) * len(centroids_CD)
        if cost >= MAX_SHARE * whole:
            self._search(found, points_ND, centroids_CD)
            return
        self.spent += cost + len(points_ND) * ROW_COST
        for part in self.parts:
            self._compare(part, found, points_ND, centroids_CD, moved_C.masked_fill(far_C, -torch.inf))
        far = torch.nonzero(far_C)[:, 0]
        if len(far):
            improve(found, points_ND, centroids_CD[far], names=far)
        improve(found, points_ND, centroids_CD, rows=lost)

    def _far(self, found: Assignment, moved_C: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Return which centroids (C,) bool are to be compared with all points, and how far others have moved at most.

        The number is the one that costs least for a sample of the points: with each centroid more, fewer points are
        searched in full.
        """
        order = moved_C.argsort(descending=True, stable=True)
        room = (found.cosines - self.floors)[:: -(-len(self.floors) // FAR_ROWS)].sort().values
        numbers = torch.arange(len(moved_C))
        costs = numbers * len(room) + torch.searchsorted(room, moved_C[order]) * len(moved_C)
        number = int(costs.argmin())
        far_C = torch.zeros(len(moved_C), dtype=torch.bool)
        far_C[order[:number]] = True
        return far_C, float(moved_C[order[number]])

    def _compare(
        self, part: _Part, found: Assignment, points_ND: torch.Tensor, centroids_CD: torch.Tensor, moved_C: torch.Tensor
    ) -> None:
        """Compare the points of a part with those centroids on their lists that can have become the nearest."""
        block = slice(part.start, part.start + len(part.begins) - 1)
        labels_B, cosines_B = found.labels[block], found.cosines[block]
        rows_P = torch.repeat_interleave(part.begins.diff())
        reached_P = moved_C.index_select(0, part.columns).add_(part.products)
        left = places_of(reached_P >= cosines_B.index_select(0, rows_P))
        rows, columns = rows_P[left].long(), part.columns[left].long()
        others = places_of(columns != labels_B[rows])
        pairs = rows[others], columns[others]
        self.spent += len(rows_P) * LISTED_COST + len(others) * PAIR_COST
        products_P = screening.pair_products(points_ND[block], centroids_CD, pairs)
        best_B, largest_B = first_largest(*pairs, products_P, len(labels_B))
        better_B = largest_B > cosines_B
        labels_B[better_B], cosines_B[better_B] = best_B[better_B], largest_B[better_B]

    def _search(self, found: Assignment, points_ND: torch.Tensor, centroids_CD: torch.Tensor) -> None:
        """Search all points in full, and write the lists down."""
        self.reference, self.floors, self.parts, self.spent = centroids_CD, torch.empty(len(points_ND)), [], 0.0
        margin = _margin(points_ND[:MARGIN_ROWS], centroids_CD)
        num_rows = max(1, min(BLOCK_ELEMENTS["cpu"] // len(centroids_CD), MAX_BLOCK_ROWS, len(points_ND)))
        products = torch.empty(num_rows, len(centroids_CD))
        for start in range(0, len(points_ND), num_rows):
            block = slice(start, start + num_rows)
            products_BC = products[: len(points_ND[block])]
            torch.mm(points_ND[block], centroids_CD.T, out=products_BC)
            labels_B = torch.from_numpy(products_BC.numpy().argmax(1))
            cosines_B = products_BC.gather(1, labels_B[:, None])[:, 0]
            found.labels[block], found.cosines[block] = labels_B, cosines_B
            self.floors[block] = cosines_B - margin
            self.parts.append(_listed(start, products_BC, self.floors[block]))


def _margin(points_BD: torch.Tensor, centroids_CD: torch.Tensor) -> float:
    """Return the margin below the largest product within which so many centroids lie as a list shall hold."""
    products_BC = points_BD @ centroids_CD.T
    listed = min(LISTED, len(centroids_CD) // LISTED_SHARE)
    gaps = (products_BC.amax(1, keepdim=True) - products_BC).flatten()
    return float(gaps.kthvalue(listed * len(points_BD)).values)


def _listed(start: int, products_BC: torch.Tensor, floors_B: torch.Tensor) -> _Part:
    places = torch.from_numpy((products_BC.numpy() >= floors_B.numpy()[:, None]).reshape(-1).nonzero()[0])
    rows = places // products_BC.shape[1]
    ends = torch.bincount(rows, minlength=len(products_BC)).cumsum(0)
    columns = places - rows * products_BC.shape[1]
    begins = torch.cat([ends.new_zeros(1), ends]).int()
    return _Part(start, begins, columns.int(), products_BC.view(-1)[places])
