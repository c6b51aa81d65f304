"""Embedding heads: a label-free last step of a model, fitted in closed form on its train embeddings (not the paper's).

``neighborhood`` splits an embedding into where it lies and how it differs from what lies there, and weighs the two
anew. z is the L2-normalised embedding, c_m the M unit centroids of spherical k-means on the train embeddings:

    q = softmax_m(<z, c_m> / t)                          L = sum_m q_m c_m           its neighbourhood's mean
    a = normalize((z - L - mean_d) S_d^(-p/2))           mean_d, S_d: mean and covariance of z - L over train rows
    b = normalize(L - mean_z)                            mean_z: mean of the train embeddings
    head(z) = normalize(a + g b)

What varies alike within all neighbourhoods (pose, light, background) is thus damped, as whitening does; but it is
measured within neighbourhoods, so that what tells like images apart does not drown in what tells domains apart. The
power is symmetric, so that a and b live in one space; S_d's eigenvalues are raised to .03 of the largest, so that few
images, which leave most directions without variance, do not blow up what they do not know. t is the
temperature at which a train embedding has ``perplexity`` neighbouring centroids (geometric mean of exp(entropy of q)).
No label and no domain is read.

``whitening`` is PCA whitening (``grappa.metrics.whitening``), ``none`` passes embeddings on unchanged.
``whitened_neighborhood`` is ``neighborhood`` behind PCA whitening: where a few directions hold most of the variance
(DINOv2's first two hold half of it), they decide which centroids are near unless they are damped first.
``grappa.method.head_choice`` chooses its g without labels.

Fitting is in float64 and in the order of the ids, so that the order of the rows changes nothing. First come the heads
and how they are applied, then how they are fitted.
"""

# B rows of a block, D width, N rows, n train rows, M centroids

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from grappa.core.arrays import below
from grappa.core.memory import DOUBLE, FLOAT, WORK
from grappa.core.printing import shown
from grappa.core.vectors import as_tensor, check_unit_vectors, full_float32
from grappa.metrics.whitening import MIN_VARIANCE, fit_whitening
from grappa.search import kmeans
from grappa.search.assignment import BLOCK_ELEMENTS, Progress
from grappa.search.kmeans import cluster, count_distinct

IMAGES_PER_CENTROID, MAX_CENTROIDS = 3, 4096
MIN_EIGENVALUE_SHARE, MIN_WHITENED_SHARE = 3e-2, 3e-3
MAX_SAMPLE, MAX_STEPS = 2048, 60  # embeddings on which the temperature is fitted, and steps to it at most
TEMPERATURE_TOLERANCE, MIN_SLOPE = 1e-10, 1e-12  # of its logarithm, and of the entropy along it
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-8, 1e2
MEAN_ROWS = 65536  # rows of a block whose sum is made at once


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
        for name, value in (("temperature", temperature), ("neighborhood_weight", neighborhood_weight)):
            _check_range(name, value)
        _check_range("perplexity", perplexity)
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


class WhitenedNeighborhoodHead(nn.Module):
    """PCA whitening, then a neighbourhood head that was fitted on the whitened train embeddings."""

    def __init__(self, whitening: WhiteningHead, neighborhood: NeighborhoodHead) -> None:
        super().__init__()
        self.whitening, self.neighborhood = whitening, neighborhood

    def form(self) -> dict[str, Any]:
        """Return what ``open_head`` needs beside the tensors, for JSON."""
        return self.neighborhood.form() | {"kind": "whitened_neighborhood"}

    def forward(self, embeddings_BD: Tensor) -> Tensor:
        """Return embeddings (B, D), L2-normalised, as (B, D), L2-normalised."""
        made: Tensor = self.neighborhood(self.whitening(embeddings_BD))
        return made

    def with_weight(self, neighborhood_weight: float) -> WhitenedNeighborhoodHead:
        """Return a head of the same tensors with another g."""
        form = self.neighborhood.form() | {"neighborhood_weight": neighborhood_weight}
        after = open_head(form, self.neighborhood.state_dict())
        assert isinstance(after, NeighborhoodHead)
        return WhitenedNeighborhoodHead(self.whitening, after)


Head = IdentityHead | WhiteningHead | NeighborhoodHead | WhitenedNeighborhoodHead


def open_head(form: Mapping[str, Any], state: Mapping[str, Tensor]) -> Head:
    """Return the head that had this ``form()`` and this state dict; ValueError or TypeError where the two disagree."""
    kind = form.get("kind")
    if kind not in _FORMS:
        raise ValueError(f"head kind is {shown(kind)}; expected one of {', '.join(_FORMS)}: update grappa")
    if set(form) != _FORMS[kind]:
        raise ValueError(f"the head of kind {kind} is {shown(dict(form))}; expected {', '.join(sorted(_FORMS[kind]))}")
    tensors: dict[str, Any] = dict(state)
    if kind == "none":
        return IdentityHead(**tensors)
    if kind == "whitening":
        return WhiteningHead(**tensors)
    settings = {name: form[name] for name in _FORMS[kind] - {"kind", "num_centroids"}}
    head: NeighborhoodHead | WhitenedNeighborhoodHead
    if kind == "neighborhood":
        head = last = NeighborhoodHead(**tensors, **settings)
    else:
        before, after = (below(tensors, f"{part}.") for part in ("whitening", "neighborhood"))
        if len(before) + len(after) != len(tensors):
            raise ValueError(
                f"the head has the tensors {shown(sorted(tensors))}; expected whitening.* and neighborhood.*"
            )
        last = NeighborhoodHead(**after, **settings)
        head = WhitenedNeighborhoodHead(WhiteningHead(**before), last)
    if form["num_centroids"] != len(last.centroids):
        raise ValueError(f"the head has {len(last.centroids)} centroids, not {shown(form['num_centroids'])}")
    return head


_NEIGHBORHOOD = {"kind", "num_centroids", "temperature", "neighborhood_weight", "perplexity"}
_FORMS = {
    "none": {"kind"},
    "whitening": {"kind"},
    "neighborhood": _NEIGHBORHOOD,
    "whitened_neighborhood": _NEIGHBORHOOD,
}
_RANGES = {"temperature": (MIN_TEMPERATURE / 2, 1e8), "neighborhood_weight": (0.0, 1e8), "perplexity": (0.0, 1e8)}


def _check_range(name: str, value: object) -> None:
    """Refuse what is no number, and a number by which a head would divide by zero; ValueError."""
    low, high = _RANGES[name]
    if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"the head's {name} is {shown(value)}; expected a number from {low:g} to {high:g}")


def apply_head(
    head: Head, embeddings: NDArray[np.float32], *, device: str = "cpu", out: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """Return the head's output for embeddings (N, D), L2-normalised: (N, D) float32, L2-normalised.

    ``out``: where it is written, such as a mapped file. ValueError when an embedding equals the means that the head
    subtracts: the rest is 0 and has no direction.
    """
    embeddings = check_unit_vectors("embeddings", embeddings)
    head, out = head.to(device), np.empty(embeddings.shape, np.float32) if out is None else out
    num_rows = block_rows(_num_columns(head, embeddings.shape[1]), device)
    with torch.inference_mode(), full_float32():
        for start in range(0, len(out), num_rows):
            rows = slice(start, start + num_rows)
            out[rows] = head(as_tensor(embeddings[rows], device)).cpu().numpy()
    lost = np.flatnonzero(~out.any(axis=1))
    if len(lost):
        raise ValueError(f"embeddings row {lost[0]} equals the mean of the train rows; it has no direction to keep")
    return out


def _num_columns(head: Head, width: int) -> int:
    last = head.neighborhood if isinstance(head, WhitenedNeighborhoodHead) else head
    return len(last.centroids) if isinstance(last, NeighborhoodHead) else width


def neighborhood_mean(centered_BD: Tensor, centroids_MD: Tensor, biases_M: Tensor, temperature: float) -> Tensor:
    """Return L - mean_z (B, D) of z - mean_z (B, D): the mean of the centroids, weighted by q."""
    return (closeness(centered_BD, centroids_MD, biases_M) / temperature).softmax(-1) @ centroids_MD


def closeness(centered_BD: Tensor, centroids_MD: Tensor, biases_M: Tensor) -> Tensor:
    """Return <z, c_m> - <z, mean_z> (B, M) of z - mean_z (B, D)."""
    return centered_BD @ centroids_MD.T + biases_M


def mean_perplexity(closeness_BM: Tensor, temperature: float) -> float:
    """Return the geometric mean over rows of exp(entropy of softmax(closeness / temperature)), in [1, M]."""
    return math.exp(_mean_entropy(closeness_BM, temperature)[0])


def _mean_entropy(closeness_BM: Tensor, temperature: float) -> tuple[float, float]:
    """Return the entropy (nats, mean over rows) of softmax(x), x = closeness / temperature, and its derivative by the
    temperature's logarithm, which is the variance of x under that softmax."""
    x_BM = closeness_BM / temperature
    x_BM -= x_BM.amax(-1, keepdim=True)
    weights_BM = x_BM.exp()
    total_B = weights_BM.sum(-1)
    mean_B = weights_BM.mul_(x_BM).sum(-1) / total_B
    square_B = weights_BM.mul_(x_BM).sum(-1) / total_B
    return float((total_B.log() - mean_B).mean()), float((square_B - mean_B.square()).mean())


def block_rows(num_columns: int, device: str) -> int:
    """Return how many rows a block of products with ``num_columns`` columns has on a device."""
    return max(1, BLOCK_ELEMENTS[torch.device(device).type] // num_columns)


def _check_shapes(width: int, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if set(tensor.shape) != {width} or tensor.ndim > 2:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, the head's width is {width}; fit the head again")


def fit_whitening_head(
    embeddings: NDArray[np.float32], ids: NDArray[np.uint64], *, power: float = 0.5, min_share: float = 0.0
) -> WhiteningHead:
    """Fit PCA whitening (``metrics.whitening``) on train embeddings (n, D), L2-normalised, with unique ids (n,)."""
    fitted = fit_whitening(_in_order(embeddings, ids), power=power, min_share=min_share)
    return WhiteningHead(torch.from_numpy(fitted.mean).float(), torch.from_numpy(fitted.matrix).float())


def automatic_num_centroids(embeddings: NDArray[np.float32]) -> int:
    """Return a third of the n embeddings (n, D), at most 4,096, never above n/2 or the number of different ones."""
    return max(2, min(automatic_most(len(embeddings)), count_distinct(embeddings, MAX_CENTROIDS)))


def automatic_most(number: int) -> int:
    """Return :func:`automatic_num_centroids` of so many different embeddings."""
    return max(2, min(round(number / IMAGES_PER_CENTROID), number // 2, MAX_CENTROIDS))


def memory_needed(num_images: int, num_train: int, width: int, num_centroids: int) -> int:
    """Return the bytes that fitting a neighborhood head and applying it take at their peak.

    Counted are the ``num_images`` embeddings before and after (none where both are mapped files), the train embeddings
    as given and clustered, and the sample on which the temperature is fitted.
    """
    sample = 5 * min(MAX_SAMPLE, num_train) * num_centroids * DOUBLE
    images = (2 * num_images + num_train) * width * FLOAT
    return images + kmeans.memory_needed(num_train, width, num_centroids) + sample + WORK


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

    Args:
        num_centroids: M; None: :func:`automatic_num_centroids`.
        perplexity: at most (M + 1) / 2, the middle of what M centroids allow; a larger one is lowered to that. Where
            embeddings hardly differ, even a temperature of 1e-8 leaves more. The perplexity reached stands in the head.
        progress: called as by :func:`grappa.search.kmeans.cluster`.

    Raises:
        ValueError: fewer than 4 embeddings, embeddings that do not differ, or a value out of its range.
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


def fit_whitened_neighborhood_head(
    embeddings: NDArray[np.float32],
    ids: NDArray[np.uint64],
    *,
    whitening_power: float = 0.5,
    device: str = "cpu",
    **neighborhood: Any,
) -> WhitenedNeighborhoodHead:
    """Fit whitening of ``whitening_power`` (0 none, 1 full), then a neighbourhood head on what it makes.

    Of the whitening, eigenvalues below ``MIN_WHITENED_SHARE`` of the largest are raised to that.

    Arguments, ``neighborhood`` and errors are those of :func:`fit_neighborhood_head`.
    """
    before = fit_whitening_head(embeddings, ids, power=whitening_power, min_share=MIN_WHITENED_SHARE)
    whitened = apply_head(before, embeddings, device=device)
    after = fit_neighborhood_head(whitened, ids, device=device, **neighborhood)
    return WhitenedNeighborhoodHead(before.cpu(), after)


def _fit_around(
    points_nD: Tensor, centroids_MD: Tensor, perplexity: float, power: float, weight: float
) -> NeighborhoodHead:
    """Return the head around the given centroids (float64); M centroids must allow the ``perplexity``."""
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
    """Return the temperature at which the embeddings have the wanted perplexity, and the perplexity reached.

    Entropy grows with the temperature, whose logarithm is sought by Newton's steps; where one leaves the range that is
    left, this is halved.
    """
    near_BM = closeness(centered_BD, centroids_MD, biases_M)
    low, high = math.log(MIN_TEMPERATURE), math.log(MAX_TEMPERATURE)
    place = math.log(min(max(float(near_BM.std(-1).mean()), MIN_TEMPERATURE), MAX_TEMPERATURE))
    for _ in range(MAX_STEPS):
        entropy, slope = _mean_entropy(near_BM, math.exp(place))
        missing = math.log(wanted) - entropy
        step = missing / max(slope, MIN_SLOPE)
        if abs(step) < TEMPERATURE_TOLERANCE or high - low < TEMPERATURE_TOLERANCE:
            break
        low, high = (place, high) if missing > 0 else (low, place)
        place = place + step if low < place + step < high else (low + high) / 2
    temperature = math.exp(place)
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
    """Return (S / largest eigenvalue) ** (-power / 2), symmetric, its eigenvalues between 1 and 33 ** (power / 2)."""
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
    return embeddings if (ids[1:] > ids[:-1]).all() else embeddings[np.argsort(ids, kind="stable")]


def _check_settings(num_centroids: int | None, perplexity: float, power: float, weight: float) -> None:
    if num_centroids is not None and num_centroids < 2:
        raise ValueError(f"num_centroids is {num_centroids}; expected at least 2")
    if not perplexity > 1.0:
        raise ValueError(f"perplexity is {perplexity}; expected more than 1 (neighbouring centroids an image)")
    if not 0.0 <= power <= 1.0:
        raise ValueError(f"deviation_power is {power}; expected a number between 0 (none) and 1 (full whitening)")
    _check_range("neighborhood_weight", weight)
