"""How far two computations of one thing may be apart when they differ in nothing but the order of their sums.

Which order a product of matrices sums in depends on the CPU, the library behind torch and the shape of the batch. The
bounds here follow from the precision, the sizes and the number of steps, so they hold on every machine; a wrong
computation (a lost image, a wrong scale, another batch) is far outside of them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]


def sum_error(terms: int, dtype: torch.dtype = torch.float32) -> float:
    """Return the bound of a sum of ``terms`` numbers, relative to the sum of their absolute values.

    Each addition rounds once, by ``eps`` relative to the partial sum, so any two orders are within ``terms * eps``.
    """
    return terms * torch.finfo(dtype).eps


def assert_same_sums(
    found: Any, expected: Any, *, terms: int, dtype: torch.dtype = torch.float32, name: str = ""
) -> None:
    """Check that no entry of a tensor is off by more than ``sum_error(terms)`` of the tensor's largest entry.

    ``terms``: how many numbers an entry sums (images x tokens for the gradient of a weight), or how often it is rounded
    on its way where that is more. The largest entry stands for the sum of their absolute values: a small entry is what
    is left of terms that cancel.
    """
    one, other = (each.detach().numpy() if isinstance(each, torch.Tensor) else each for each in (found, expected))
    np.testing.assert_allclose(one, other, rtol=0, atol=sum_error(terms, dtype) * np.abs(other).max(), err_msg=name)


def assert_same_training(found: Floats, expected: Floats, *, path: float, terms: int, name: str = "") -> None:
    """Check that a tensor trained twice by Adam has gone the same way: the distance is small beside the path.

    ``path`` is the sum of the learning rates of all steps. Adam moves an entry by the learning rate whatever the size
    of its gradient g, so an error e = ``sum_error(terms)`` of the tensor's largest gradient G moves it by up to
    ``min(2, e G / |g|)`` rates: an entry whose gradient is all rounding may go anywhere. Such entries are few. With
    |g| / G spread evenly over 0..1 the mean square of that factor is ``4 e``, and the distance, as the root of the
    mean square over the entries, is ``path * 2 sqrt(e)``.
    """
    distance = float(np.sqrt(np.mean(np.square(found.astype(np.float64) - expected))))
    allowed = path * training_error(terms)
    assert distance <= allowed, f"{name}: {distance:.2g} apart (root of the mean square), {allowed:.2g} allowed"


def training_error(terms: int) -> float:
    """Return ``2 sqrt(e)`` of `assert_same_training`: also how far the metrics of such trainings may be, relatively."""
    return float(2 * np.sqrt(sum_error(terms)))


def normalized(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the rows (N, D) at length 1."""
    unit: NDArray[np.float32] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit
