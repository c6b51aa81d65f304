"""Embedding heads: a label-free last step, fitted in closed form on a model's own train embeddings (not the paper's).

``neighborhood`` splits an embedding into where it lies and how it differs from what lies there, and weighs the two
anew. z is the L2-normalised embedding, c_m the M unit centroids of spherical k-means on the train embeddings:

    q = softmax_m(<z, c_m> / t)                          L = sum_m q_m c_m           its neighbourhood's mean
    a = normalize((z - L - mean_d) S_d^(-p/2))           mean_d, S_d: mean and covariance of z - L over train rows
    b = normalize(L - mean_z)                            mean_z: mean of the train embeddings
    head(z) = normalize(a + g b)

What varies alike within all neighbourhoods (pose, light, background) is thus damped, as whitening does; but it is
measured within neighbourhoods, so that what tells like images apart does not drown in what tells domains apart. The
power is symmetric, so that a and b live in one space; S_d's eigenvalues are raised to 1e-4 of the largest. t is the
temperature at which a train embedding has ``perplexity`` neighbouring centroids (geometric mean of exp(entropy of q)).
No label and no domain is read.

``whitening`` is PCA whitening (``grappa.whitening``), ``none`` passes embeddings on unchanged.
"""

# B rows of a block, D width, N rows, M centroids

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from grappa.assignment import BLOCK_ELEMENTS
from grappa.vectors import as_tensor, check_unit_vectors, full_float32


class IdentityHead(nn.Module):
    """Passes embeddings (B, D) on unchanged."""

    def form(self) -> dict[str, Any]:
        """Return what ``open_head`` needs beside the tensors, for JSON."""
        return {"kind": "none"}

    def forward(self, embeddings_BD: Tensor) -> Tensor:
        return embeddings_BD


class WhiteningHead(nn.Module):
    """PCA whitening: z -> normalize((z - mean) matrix); mean (D,), matrix (D, D)."""

    def __init__(self, mean: Tensor, matrix: Tensor) -> None:
        super().__init__()
        _check_shapes(len(mean), mean=mean, matrix=matrix)
        self.register_buffer("mean", mean)
        self.register_buffer("matrix", matrix)

    mean: Tensor
    matrix: Tensor

    def form(self) -> dict[str, Any]:
        """Return what ``open_head`` needs beside the tensors, for JSON."""
        return {"kind": "whitening"}

    def forward(self, embeddings_BD: Tensor) -> Tensor:
        """Return embeddings (B, D), L2-normalised, as (B, D), L2-normalised."""
        return F.normalize((embeddings_BD - self.mean) @ self.matrix, dim=-1)


class NeighborhoodHead(nn.Module):
    """The equations above, in coordinates relative to mean (D,) = mean_z: exact enough in float32 for embeddings that
    lie close together.

    centroids (M, D) are c_m - mean_z, biases (M,) <mean_z, c_m - mean_z>: <z - mean_z, c_m - mean_z> plus these is
    <z, c_m> but for a constant of z, which a softmax takes away. deviation_mean (D,) is mean_d, deviation_matrix (D, D)
    S_d^(-p/2) times a constant, which the normalisation takes away. ``perplexity`` is the one reached on the train
    embeddings: a record, nothing computes with it.
    """

    def __init__(
        self,
        mean: Tensor,
        centroids: Tensor,
        biases: Tensor,
        deviation_mean: Tensor,
        deviation_matrix: Tensor,
        *,
        temperature: float,
        neighborhood_weight: float,
        perplexity: float,
    ) -> None:
        super().__init__()
        _check_shapes(len(mean), mean=mean, deviation_mean=deviation_mean, deviation_matrix=deviation_matrix)
        if centroids.shape != (len(biases), len(mean)):
            found = f"centroids have shape {tuple(centroids.shape)}, biases {tuple(biases.shape)}"
            raise ValueError(f"{found}, the head's width is {len(mean)}; fit the head again")
        self.register_buffer("mean", mean)
        self.register_buffer("centroids", centroids)
        self.register_buffer("biases", biases)
        self.register_buffer("deviation_mean", deviation_mean)
        self.register_buffer("deviation_matrix", deviation_matrix)
        self.temperature, self.neighborhood_weight = temperature, neighborhood_weight
        self.perplexity = perplexity

    mean: Tensor
    centroids: Tensor
    biases: Tensor
    deviation_mean: Tensor
    deviation_matrix: Tensor

    def form(self) -> dict[str, Any]:
        """Return what ``open_head`` needs beside the tensors, for JSON."""
        return {
            "kind": "neighborhood",
            "num_centroids": len(self.centroids),
            "temperature": self.temperature,
            "neighborhood_weight": self.neighborhood_weight,
            "perplexity": self.perplexity,
        }

    def forward(self, embeddings_BD: Tensor) -> Tensor:
        """Return embeddings (B, D), L2-normalised, as (B, D), L2-normalised."""
        centered_BD = embeddings_BD - self.mean
        local_BD = neighborhood_mean(centered_BD, self.centroids, self.biases, self.temperature)
        deviation_BD = (centered_BD - local_BD - self.deviation_mean) @ self.deviation_matrix
        a_BD, b_BD = F.normalize(deviation_BD, dim=-1), F.normalize(local_BD, dim=-1)
        return F.normalize(a_BD + self.neighborhood_weight * b_BD, dim=-1)


Head = IdentityHead | WhiteningHead | NeighborhoodHead


def open_head(form: Mapping[str, Any], state: Mapping[str, Tensor]) -> Head:
    """Return the head of a ``form()`` and its state dict; ValueError (TypeError) where they are not one head's."""
    settings: dict[str, Any] = {name: value for name, value in form.items() if name not in ("kind", "num_centroids")}
    tensors: dict[str, Any] = dict(state)
    if form["kind"] == "none":
        return IdentityHead()
    if form["kind"] == "whitening":
        return WhiteningHead(**tensors)
    if form["kind"] == "neighborhood":
        return NeighborhoodHead(**tensors, **settings)
    raise ValueError(f"head kind is {form['kind']!r}; expected none, whitening or neighborhood: update grappa")


def apply_head(head: Head, embeddings: NDArray[np.float32], *, device: str = "cpu") -> NDArray[np.float32]:
    """Return embeddings (N, D), L2-normalised, through a head: (N, D) float32, L2-normalised.

    ValueError for a row of which nothing is left: it equals the means, and has no direction to keep.
    """
    embeddings = check_unit_vectors("embeddings", embeddings)
    head, out = head.to(device), np.empty_like(embeddings)
    num_rows = block_rows(len(head.centroids) if isinstance(head, NeighborhoodHead) else embeddings.shape[1], device)
    with torch.inference_mode(), full_float32():
        for start in range(0, len(out), num_rows):
            rows = slice(start, start + num_rows)
            out[rows] = head(as_tensor(embeddings[rows], device)).cpu().numpy()
    lost = np.flatnonzero(~out.any(axis=1))
    if len(lost):
        raise ValueError(f"embeddings row {lost[0]} equals the mean of the train rows; it has no direction to keep")
    return out


def neighborhood_mean(centered_BD: Tensor, centroids_MD: Tensor, biases_M: Tensor, temperature: float) -> Tensor:
    """Return L - mean_z (B, D) of z - mean_z (B, D): the mean of the centroids, weighted by q."""
    return (closeness(centered_BD, centroids_MD, biases_M) / temperature).softmax(-1) @ centroids_MD


def closeness(centered_BD: Tensor, centroids_MD: Tensor, biases_M: Tensor) -> Tensor:
    """Return <z, c_m> - <z, mean_z> (B, M) of z - mean_z (B, D)."""
    return centered_BD @ centroids_MD.T + biases_M


def mean_perplexity(closeness_BM: Tensor, temperature: float) -> float:
    """Return the geometric mean over rows of exp(entropy of softmax(closeness / temperature)), in [1, M]."""
    log_BM = (closeness_BM / temperature).log_softmax(-1)
    return math.exp(float(-(log_BM.exp() * log_BM).sum(-1).mean()))


def block_rows(num_columns: int, device: str) -> int:
    return max(1, BLOCK_ELEMENTS[torch.device(device).type] // num_columns)


def _check_shapes(width: int, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if set(tensor.shape) != {width} or tensor.ndim > 2:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, the head's width is {width}; fit the head again")
