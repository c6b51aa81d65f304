"""Vectors that are compared: checks of arguments, rows of a file, tensors of arrays, and full float32 products.

torch is imported by what needs it: an index is searched without.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

NORM_TOLERANCE = 1e-2
BLOCK_ROWS = 8192


def check_unit_vectors(name: str, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return ``vectors`` as (N, D) float32; ValueError unless 2-D, finite and L2-normalised (within 1 %)."""
    checked = check_vectors(name, vectors)
    norms = np.sqrt(np.einsum("nd,nd->n", checked, checked))
    wrong = np.flatnonzero(np.abs(norms - 1.0) > NORM_TOLERANCE)
    if len(wrong):
        raise ValueError(
            f"{name}: {len(wrong)} rows are not of length 1 (row {wrong[0]}: {norms[wrong[0]]:.4g}); L2-normalise them"
        )
    return checked


def check_vectors(name: str, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return ``vectors`` as contiguous (N, D) float32; ValueError unless 2-D, not empty and finite."""
    checked = np.ascontiguousarray(vectors, dtype=np.float32)
    if checked.ndim != 2 or checked.shape[0] == 0 or checked.shape[1] == 0:
        raise ValueError(f"{name} has shape {np.shape(vectors)}; expected (rows, width) with at least one of each")
    wrong = np.flatnonzero(~np.isfinite(np.einsum("nd->n", checked)))
    if len(wrong):
        raise ValueError(f"{name}: {len(wrong)} rows hold NaN or infinity (first: row {wrong[0]}); extract them again")
    return checked


def read_rows(file: Path, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return the rows (n,) of an ``.npy`` file (N, D), in their order, as float32 (n, D).

    The file is mapped for one part of its rows at a time: no more than this part is held beside the result.
    """
    number, width = np.load(file, mmap_mode="r", allow_pickle=False).shape
    found = np.empty((len(rows), width), dtype=np.float32)
    order = np.argsort(rows, kind="stable")
    starts = range(0, number, BLOCK_ROWS)
    for places in np.split(order, np.searchsorted(rows[order], starts[1:])):
        found[places] = np.load(file, mmap_mode="r", allow_pickle=False)[rows[places]]
    return found


def side_by_side(parts: Sequence[NDArray[np.float32]], out: NDArray[np.float32]) -> None:
    """Write the G parts (N, D), each L2-normalised, next to each other into ``out`` (N, G * D), L2-normalised as a
    whole.

    A product of two such rows is the mean of the parts' cosines. ValueError unless the parts have the same N, at
    least one, and rows of length 1.
    """
    lengths = {len(part) for part in parts}
    if len(lengths) != 1:
        raise ValueError(f"the parts have {sorted(lengths)} rows; expected one number of rows for all")
    for start in range(0, len(out), BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        units = [_unit(check_unit_vectors("embeddings", part[rows])) for part in parts]
        out[rows] = _unit(np.concatenate(units, axis=1))


def _unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    scaled: NDArray[np.float32] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return scaled


def as_tensor(array: NDArray[np.float32], device: str) -> torch.Tensor:
    """Return a float32 tensor on ``device``; a read-only array (a memory map) is copied, a CPU shares the memory of
    others.
    """
    import torch

    return torch.from_numpy(array if array.flags.writeable else array.copy()).to(device)


@contextmanager
def full_float32() -> Iterator[None]:
    """Switch reduced-precision float32 products (TF32, bfloat16) off inside the block: exact results need full ones."""
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
