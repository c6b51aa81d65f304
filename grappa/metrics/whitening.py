"""PCA whitening, which costs no training: learned on some rows, applied to all, and L2-normalised again."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from grappa.core.vectors import check_vectors

RANK_TOLERANCE = 1e-7
MIN_VARIANCE = 1e-14
BLOCK_ROWS = 8192


@dataclass(frozen=True)
class Whitening:
    """mean (D,) and matrix (D, D), float64: a row x becomes (x - mean) @ matrix."""

    mean: NDArray[np.float64]
    matrix: NDArray[np.float64]

    def apply(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return features (N, D) whitened and L2-normalised, (N, D) float32; ValueError for a row equal to the mean."""
        features = check_vectors("features", features)
        if features.shape[1] != len(self.mean):
            raise ValueError(f"features are {features.shape[1]} wide, the whitening {len(self.mean)}; fit it again")
        whitened = np.empty_like(features)
        for start in range(0, len(features), BLOCK_ROWS):
            rows = slice(start, start + BLOCK_ROWS)
            projected = (features[rows] - self.mean) @ self.matrix
            norms = np.linalg.norm(projected, axis=1, keepdims=True)
            if not norms.all():
                raise ValueError(
                    f"features row {start + int(norms.argmin())} equals the mean; it has no direction to keep"
                )
            whitened[rows] = projected / norms
        return whitened


def fit_whitening(features: NDArray[np.float32], *, power: float = 0.5, min_share: float = 0.0) -> Whitening:
    """Learn from features (N, D): principal axes scaled by eigenvalue ** (-power / 2).

    power 1 is full whitening (equal variances), 0 only centers and rotates, 0.5 lies between. Axes without variance
    (rank below D) are set to zero. Eigenvalues below ``min_share`` of the largest are raised to that: directions of
    little variance, and the rounding in them, are not blown up. ValueError unless N >= 2, 0 <= power <= 1 and the rows
    differ.
    """
    features = check_vectors("features", features)
    if not 0.0 <= power <= 1.0:
        raise ValueError(f"power is {power}; expected a number between 0 (rotation only) and 1 (full whitening)")
    mean, eigenvalues, axes = principal_axes(features)
    if len(features) < 2 or eigenvalues[-1] <= MIN_VARIANCE:
        raise ValueError(
            f"the {len(features)} rows of features do not differ; whitening needs at least two different ones"
        )
    kept = eigenvalues > RANK_TOLERANCE * eigenvalues[-1]
    raised = np.maximum(np.where(kept, eigenvalues, 1.0), min_share * eigenvalues[-1])
    scales = np.where(kept, raised ** (-power / 2.0), 0.0)
    return Whitening(mean=mean, matrix=axes * scales)


def principal_axes(
    features: NDArray[np.float32],
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return the mean (D,) of features (N, D), their variances (D,) along the principal axes, ascending, and these, the
    columns of (D, D).
    """
    mean = features.mean(axis=0, dtype=np.float64)
    variances, axes = np.linalg.eigh(_covariance(features, mean))
    return mean, variances, axes


def _covariance(features: NDArray[np.float32], mean: NDArray[np.float64]) -> NDArray[np.float64]:
    total = np.zeros((len(mean), len(mean)))
    for start in range(0, len(features), BLOCK_ROWS):
        centered = features[start : start + BLOCK_ROWS] - mean
        total += centered.T @ centered
    return total / len(features)
