"""The means of clusters: of all points at once, or kept up to date from iteration to iteration."""

# D width, N points, C clusters

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from grappa.search.shared_points import SharedPoints

SAME_POINT = 1e-6
FEW_CHANGED = 4  # sums are updated where one point in four or fewer has changed
ADDED_ROWS = {"cpu": 256, "cuda": 65536}  # rows added at a time
BLOCK_ELEMENTS = 2**20  # of the sums that are exchanged at a time


def means(points_ND: torch.Tensor, labels: torch.Tensor, centroids_CD: torch.Tensor) -> torch.Tensor:
    """Return the normalised mean of each cluster's points.

    A cluster without points, or whose mean is zero, keeps its centroid.
    """
    return Sums().means(SharedPoints.alone(points_ND), labels, centroids_CD)


@dataclass
class Sums:
    """The sums of this process's points of each cluster, (C, D) float64, kept between iterations.

    Points that have changed their cluster are taken from one sum and added to another; where many have, all are added
    up anew. Both give the same: the sums are integers (``SharedPoints.counted``).
    """

    sums: torch.Tensor | None = None
    labels: torch.Tensor | None = None

    def means(self, points: SharedPoints, labels: torch.Tensor, centroids_CD: torch.Tensor) -> torch.Tensor:
        """Return what the function ``means`` returns, of the points of all processes; labels: those of the own ones."""
        sums_CD, means_CD = self._updated(points, labels, len(centroids_CD)), torch.empty_like(centroids_CD)
        num_rows = max(1, BLOCK_ELEMENTS // centroids_CD.shape[1])
        blocks = (each.split(num_rows) for each in (sums_CD, centroids_CD, means_CD))
        for sums, before, means in zip(*blocks, strict=True):
            means.copy_(_normalised((points.total(sums) / points.unit).float(), before))
        return means_CD

    def _updated(self, points: SharedPoints, labels: torch.Tensor, num_clusters: int) -> torch.Tensor:
        changed = torch.nonzero(self.labels != labels)[:, 0] if self.labels is not None else None
        if self.sums is None or self.labels is None or changed is None or FEW_CHANGED * len(changed) > len(labels):
            self.sums = points.own_ND.new_zeros(num_clusters, points.own_ND.shape[1], dtype=torch.float64)
            _add(self.sums, points, labels)
        else:
            _add(self.sums, points, self.labels, changed, -1.0)
            _add(self.sums, points, labels, changed)
        self.labels = labels.clone()
        return self.sums


def _normalised(sums_CD: torch.Tensor, centroids_CD: torch.Tensor) -> torch.Tensor:
    norms = sums_CD.norm(dim=1, keepdim=True)
    return torch.where(norms > SAME_POINT, sums_CD / norms.clamp_min(SAME_POINT), centroids_CD)


def _add(
    sums_CD: torch.Tensor,
    points: SharedPoints,
    labels: torch.Tensor,
    rows: torch.Tensor | None = None,
    sign: float = 1.0,
) -> None:
    """Add the own points (some places, or all) to the sums of their clusters, in place."""
    number = ADDED_ROWS[labels.device.type]
    whole = zip(labels.split(number), points.own_ND.split(number), strict=True)
    blocks: Iterable[tuple[torch.Tensor, torch.Tensor]] = whole
    if rows is not None:
        blocks = ((labels[part], points.own_ND[part]) for part in rows.split(number))
    for labels_B, points_BD in blocks:
        sums_CD.index_add_(0, labels_B, points.counted(points_BD), alpha=sign)
