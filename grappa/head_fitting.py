"""Fitting embedding heads (``grappa.head``) on train embeddings: closed form but for k-means, float64, no label read.

Everything is done in the order of the ids, so that the order of the rows changes nothing.
"""

# B rows of a block, D width, n train rows, M centroids

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from grappa.assignment import Progress
from grappa.clusters import cluster, count_distinct
from grappa.head import NeighborhoodHead, WhiteningHead, block_rows, closeness, mean_perplexity, neighborhood_mean
from grappa.vectors import as_tensor, check_unit_vectors
from grappa.whitening import MIN_VARIANCE, fit_whitening

IMAGES_PER_CENTROID, MAX_CENTROIDS = 3, 4096
MIN_EIGENVALUE_SHARE = 1e-4
MAX_SAMPLE, NUM_HALVINGS = 2048, 40
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-8, 1e2
MEAN_ROWS = 65536


def fit_whitening_head(
    embeddings: NDArray[np.float32], ids: NDArray[np.uint64], *, power: float = 0.5
) -> WhiteningHead:
    """Fit PCA whitening on train embeddings (n, D), L2-normalised, with unique ids (n,); see ``grappa.whitening``."""
    fitted = fit_whitening(_in_order(embeddings, ids), power=power)
    return WhiteningHead(torch.from_numpy(fitted.mean).float(), torch.from_numpy(fitted.matrix).float())


def automatic_num_centroids(embeddings: NDArray[np.float32]) -> int:
    """Return a third of the n embeddings (n, D), at most 4,096, never above n/2 or the number of different ones."""
    number = len(embeddings)
    most = min(MAX_CENTROIDS, number // 2, count_distinct(embeddings, MAX_CENTROIDS))
    return max(2, min(round(number / IMAGES_PER_CENTROID), most))


def fit_neighborhood_head(
    embeddings: NDArray[np.float32],
    ids: NDArray[np.uint64],
    *,
    num_centroids: int | None = None,
    perplexity: float = 10.0,
    deviation_power: float = 0.5,
    neighborhood_weight: float = 1.0,
    num_iterations: int = 20,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress | None = None,
) -> NeighborhoodHead:
    """Fit the head on train embeddings (n, D) float32, L2-normalised, with unique ids (n,) uint64; float64 inside.

    ``num_centroids`` None: :func:`automatic_num_centroids`. A ``perplexity`` above (M + 1) / 2, the middle of what M
    centroids allow, is lowered to that; where even a temperature of 1e-8 leaves more (embeddings that hardly differ)
    it stays above. The one reached is kept in the head. ``progress`` is told of the clustering, as
    :func:`grappa.clusters.cluster` does.
    ValueError for fewer than 4 embeddings, for ones that do not differ, and for values out of their ranges.
    """
    _check_settings(num_centroids, perplexity, deviation_power, neighborhood_weight)
    ordered, ids = _in_order(embeddings, ids), np.sort(ids)
    _check_different(ordered)
    number = automatic_num_centroids(ordered) if num_centroids is None else num_centroids
    found = cluster(
        ordered,
        num_clusters=number,
        ids=ids,
        num_iterations=num_iterations,
        seed=seed,
        device=device,
        progress=progress,
    )
    points, centroids = as_tensor(ordered, device), as_tensor(found.centroids, device)
    return _fit_around(
        points, centroids.double(), min(perplexity, (number + 1) / 2), deviation_power, neighborhood_weight
    )


def _fit_around(
    points_nD: Tensor, centroids_MD: Tensor, perplexity: float, power: float, weight: float
) -> NeighborhoodHead:
    """Return the head with the given centroids (float64); ``perplexity`` is one that so many centroids allow."""
    mean = _mean(points_nD)
    centered_MD = centroids_MD - mean
    near = (centered_MD, centered_MD @ mean)
    temperature, reached = _fit_temperature(points_nD[:MAX_SAMPLE].double() - mean, *near, perplexity)
    deviation_mean, covariance = _deviations(points_nD, mean, *near, temperature)
    matrix = _inverse_power(covariance.cpu(), power)
    tensors = (each.float().cpu() for each in (mean, *near, deviation_mean, matrix))
    return NeighborhoodHead(*tensors, temperature=temperature, neighborhood_weight=weight, perplexity=reached)


def _check_different(embeddings_nD: NDArray[np.float32]) -> None:
    if len(embeddings_nD) < 4 or count_distinct(embeddings_nD, 2) < 2:
        raise ValueError(
            f"the {len(embeddings_nD)} train embeddings are too few or do not differ; a neighborhood head needs at "
            "least 4, and two different ones: give more images or set heads.kind to none"
        )


def _mean(points_nD: Tensor) -> Tensor:
    """Return the mean (D,) in float64, rounded to float32 as the head stores it."""
    total = sum((block.double().sum(0) for block in points_nD.split(MEAN_ROWS)), points_nD.new_zeros(()).double())
    return (total / len(points_nD)).float().double()


def _fit_temperature(centered_BD: Tensor, centroids_MD: Tensor, biases_M: Tensor, wanted: float) -> tuple[float, float]:
    """Bisect the temperature's logarithm (entropy grows with it) on at most 2,048 images, those of the smallest ids;
    return it and the perplexity reached."""
    near_BM = closeness(centered_BD, centroids_MD, biases_M)
    low, high = math.log(MIN_TEMPERATURE), math.log(MAX_TEMPERATURE)
    for _ in range(NUM_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if mean_perplexity(near_BM, math.exp(middle)) < wanted else (low, middle)
    temperature = math.exp((low + high) / 2)
    return temperature, mean_perplexity(near_BM, temperature)


def _deviations(
    points_nD: Tensor, mean: Tensor, centroids_MD: Tensor, biases_M: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return mean_d (D,) and S_d (D, D) in float64, over blocks of rows."""
    total, products = torch.zeros_like(mean), torch.zeros_like(torch.outer(mean, mean))
    for block in points_nD.split(block_rows(len(centroids_MD), points_nD.device.type)):
        centered_BD = block.double() - mean
        deviation_BD = centered_BD - neighborhood_mean(centered_BD, centroids_MD, biases_M, temperature)
        total += deviation_BD.sum(0)
        products += deviation_BD.T @ deviation_BD
    mean_d = total / len(points_nD)
    return mean_d, products / len(points_nD) - torch.outer(mean_d, mean_d)


def _inverse_power(covariance_DD: Tensor, power: float) -> Tensor:
    """Return (S / largest eigenvalue) ** (-power / 2), symmetric, its eigenvalues between 1 and 1e4 ** (power / 2)."""
    eigenvalues, axes_DD = torch.linalg.eigh(covariance_DD)
    largest = float(eigenvalues[-1])
    if largest <= MIN_VARIANCE:
        raise ValueError("the train embeddings do not differ from their neighbourhoods; set heads.kind to none")
    scales = (eigenvalues / largest).clamp_min(MIN_EIGENVALUE_SHARE) ** (-power / 2)
    return (axes_DD * scales) @ axes_DD.T


def _in_order(embeddings: NDArray[np.float32], ids: NDArray[np.uint64]) -> NDArray[np.float32]:
    embeddings = check_unit_vectors("embeddings", embeddings)
    if len(np.unique(ids)) != len(embeddings) or len(ids) != len(embeddings):
        raise ValueError(f"ids holds {len(np.unique(ids))} different ids for {len(embeddings)} rows; give each its own")
    return embeddings[np.argsort(ids, kind="stable")]


def _check_settings(num_centroids: int | None, perplexity: float, power: float, weight: float) -> None:
    if num_centroids is not None and num_centroids < 2:
        raise ValueError(f"num_centroids is {num_centroids}; expected at least 2")
    if not perplexity > 1.0:
        raise ValueError(f"perplexity is {perplexity}; expected more than 1 (neighbouring centroids an image)")
    if not 0.0 <= power <= 1.0:
        raise ValueError(f"deviation_power is {power}; expected a number between 0 (none) and 1 (full whitening)")
    if weight < 0.0:
        raise ValueError(f"neighborhood_weight is {weight}; expected 0 or more")
