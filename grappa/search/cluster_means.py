"""The means of clusters: of all points at once, or kept up to date from iteration to iteration."""

# D width, N points, C clusters

from __future__ import annotations

from dataclasses import dataclass

import torch

SAME_POINT = 1e-6
FEW_CHANGED, ADDED_ROWS = 4, 256  # sums are updated where one point in four or fewer has changed; rows added at a time


def means(points_ND: torch.Tensor, labels: torch.Tensor, centroids_CD: torch.Tensor) -> torch.Tensor:
    """Return the normalised mean of each cluster's points.

    A cluster without points, or whose mean is zero, keeps its centroid.
    """
    add = _sums if points_ND.device.type == "cpu" else _sums_by_segment
    return _normalised(add(points_ND, labels, len(centroids_CD)), centroids_CD)


def _normalised(sums_CD: torch.Tensor, centroids_CD: torch.Tensor) -> torch.Tensor:
    norms = sums_CD.norm(dim=1, keepdim=True)
    return torch.where(norms > SAME_POINT, sums_CD / norms.clamp_min(SAME_POINT), centroids_CD)


@dataclass
class Sums:
    """The sums of the points of each cluster, (C, D) float64 on a CPU, kept from iteration to iteration.

    Points that have changed their cluster are taken from one sum and added to another, exactly enough that nothing is
    left of them; where many have, all are added up anew.
    """

    sums: torch.Tensor | None = None
    labels: torch.Tensor | None = None

    def means(self, points_ND: torch.Tensor, labels: torch.Tensor, centroids_CD: torch.Tensor) -> torch.Tensor:
        """Return what the function ``means`` returns, up to the rounding of its float32 sums."""
        sums_CD = self._updated(points_ND, labels, len(centroids_CD)).to(points_ND.dtype)
        return _normalised(sums_CD, centroids_CD)

    def _updated(self, points_ND: torch.Tensor, labels: torch.Tensor, num_clusters: int) -> torch.Tensor:
        if points_ND.device.type != "cpu":
            return _sums_by_segment(points_ND, labels, num_clusters)
        changed = torch.nonzero(self.labels != labels)[:, 0] if self.labels is not None else None
        if self.sums is None or self.labels is None or changed is None or FEW_CHANGED * len(changed) > len(labels):
            self.sums = _add(points_ND.new_zeros(num_clusters, points_ND.shape[1]).double(), points_ND, labels)
        else:
            _add(self.sums, points_ND, self.labels, changed, -1.0)
            _add(self.sums, points_ND, labels, changed)
        self.labels = labels.clone()
        return self.sums


def _add(
    sums_CD: torch.Tensor,
    points_ND: torch.Tensor,
    labels: torch.Tensor,
    rows: torch.Tensor | None = None,
    sign: float = 1.0,
) -> torch.Tensor:
    """Add the points (of some rows, or all) to the sums of their clusters, in place, in the order of the rows."""
    for part in (torch.arange(len(labels)) if rows is None else rows).split(ADDED_ROWS):
        sums_CD.index_add_(0, labels[part], points_ND[part].double(), alpha=sign)
    return sums_CD


def _sums_by_segment(points_ND: torch.Tensor, labels: torch.Tensor, num_clusters: int) -> torch.Tensor:
    """Return the same sums, added in an order that does not vary from run to run (atomic additions on a GPU do)."""
    order = torch.argsort(labels, stable=True)
    lengths = torch.bincount(labels, minlength=num_clusters)
    return torch.segment_reduce(points_ND[order], "sum", lengths=lengths)


def _sums(points_ND: torch.Tensor, labels: torch.Tensor, num_clusters: int) -> torch.Tensor:
    return torch.zeros(num_clusters, points_ND.shape[1]).index_add_(0, labels, points_ND)
