"""Which products of unit vectors can matter, by bfloat16: half the time of float32 products, and none is missed.

A product of rounded vectors is off by at most a known error. A pair whose product cannot reach a floor, even with this
error, is left out; the caller computes the products of the other pairs again in float32. The results are those of
float32 alone, up to the rounding of float32.
"""

# B rows of a block, C columns, D width, P pairs that are left

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from grappa.core.devices import has_bfloat16_products

Pairs = tuple[torch.Tensor, torch.Tensor]
MIN_COLUMNS = 256
MAX_SHARE = 64
PAIR_BLOCK = 512
MANTISSA_BITS = 8
_wanted = True
SLACK = 1e-4  # a product is summed up in float32; this is far above the rounding of these sums


@dataclass(frozen=True)
class Rounded:
    """Vectors in bfloat16, and the largest Euclidean distance from a vector to its rounded form."""

    vectors: torch.Tensor
    moved: float


def worthwhile(device: torch.device, num_columns: int) -> bool:
    """Tell whether screening saves time: the CPU multiplies bfloat16 in hardware, and there are columns enough."""
    return _wanted and device.type == "cpu" and num_columns >= MIN_COLUMNS and has_bfloat16_products()


@contextmanager
def without_screening() -> Iterator[None]:
    """Compute all products in float32 meanwhile: for work on matrices of very many shapes.

    oneDNN keeps the kernel that it makes for each shape of bfloat16 matrices, some 2 MB for each part of a clustering.
    """
    global _wanted
    before, _wanted = _wanted, False
    try:
        yield
    finally:
        _wanted = before


def rounded(vectors_CD: torch.Tensor) -> Rounded:
    """Round float32 vectors to bfloat16."""
    vectors = vectors_CD.bfloat16()
    parts = zip(vectors_CD.split(PAIR_BLOCK), vectors.split(PAIR_BLOCK), strict=True)
    return Rounded(vectors, max(float((exact - near).norm(dim=1).max()) for exact, near in parts))


class Screen:
    """Finds the pairs of a point and one of the columns (C, D) whose product can be the point's largest."""

    def __init__(self, columns_CD: torch.Tensor, num_rows: int) -> None:
        self.columns = rounded(columns_CD)
        self._products = torch.empty(num_rows, len(columns_CD), dtype=torch.bfloat16)

    def larger(self, points_BD: torch.Tensor, before_B: torch.Tensor) -> Pairs | None:
        """Return rows and columns (P,) of all products that may be larger than ``before_B`` (B,) float32.

        At most ``num_rows`` points; None when so many products are close that float32 products of all cost less.
        """
        products_BC, error = self.products(points_BD)
        return reaching(products_BC, before_B - error - half_step(row_maxima(products_BC)))

    def largest(self, points_BD: torch.Tensor, before_B: torch.Tensor) -> Pairs | None:
        """Return the pairs of ``larger`` whose product may be the largest of its row."""
        products_BC, error = self.products(points_BD)
        largest_B = row_maxima(products_BC)
        step_B = half_step(largest_B)
        floors_B = torch.maximum(largest_B - 2.0 * (error + step_B), before_B - error - step_B)
        return reaching(products_BC, floors_B)

    def products(self, points_BD: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Return bfloat16 products (B, C), and how far a product may lie from the true one before it is rounded."""
        points = rounded(points_BD)
        products_BC = self._products[: len(points_BD)]
        torch.mm(points.vectors, self.columns.vectors.T, out=products_BC)
        return products_BC, error_of(points, self.columns)


def error_of(left: Rounded, right: Rounded) -> float:
    """Bound how far a float32 sum of products of rounded vectors, about 1 long, lies from the true one."""
    return 1.02 * (left.moved + right.moved) + SLACK


def pair_products(left_BD: torch.Tensor, right_CD: torch.Tensor, pairs: Pairs) -> torch.Tensor:
    """Return the float32 products (P,) of pairs; on a CPU the pairs are ordered by their row."""
    if left_BD.device.type == "cpu":
        return _sampled_products(left_BD, right_CD, pairs)
    parts = zip(*(each.split(PAIR_BLOCK) for each in pairs), strict=True)
    return torch.cat([torch.linalg.vecdot(left_BD[rows], right_CD[columns]) for rows, columns in parts])


def _sampled_products(left_BD: torch.Tensor, right_CD: torch.Tensor, pairs: Pairs) -> torch.Tensor:
    """Return the same by the pairs' places in a sparse matrix: no vector is copied, a fifth of the time."""
    rows, columns = pairs
    ends = torch.bincount(rows, minlength=len(left_BD)).cumsum(0)
    starts = torch.cat([ends.new_zeros(1), ends])
    with warnings.catch_warnings():  # torch says once in each process that its sparse matrices may change
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        places = torch.sparse_csr_tensor(
            starts, columns, torch.zeros(len(rows)), (len(left_BD), len(right_CD)), check_invariants=False
        )
    found: torch.Tensor = torch.sparse.sampled_addmm(places, left_BD, right_CD.T, beta=0.0).values()
    return found


def half_step(values: torch.Tensor) -> torch.Tensor:
    """Return by how much bfloat16 rounding may have moved each of these values, or any smaller one."""
    return torch.ldexp(torch.ones_like(values), torch.frexp(values).exponent - (MANTISSA_BITS + 1))


def row_maxima(products_BC: torch.Tensor) -> torch.Tensor:
    """Return the largest bfloat16 product of each row as float32; a row without a positive one gets some negative."""
    return products_BC.view(torch.int16).amax(1).view(torch.bfloat16).float()


def reaching(products_BC: torch.Tensor, floors_B: torch.Tensor) -> Pairs | None:
    """Return rows and columns (P,) of the bfloat16 products that reach their row's floor, by row, then column.

    Positive numbers are ordered like their bits, which are compared as integers. Where the floor is not positive the
    whole row is returned. None when more than one product in MAX_SHARE reaches.
    """
    floors = floors_B.bfloat16()
    bits = floors.view(torch.int16) - (floors.float() > floors_B).short()
    bits = torch.where(floors_B > 0, bits, torch.iinfo(torch.int16).min)
    found = (products_BC.view(torch.int16).numpy() >= bits.numpy()[:, None]).reshape(-1).nonzero()[0]
    if len(found) > products_BC.numel() // MAX_SHARE:
        return None
    pairs = torch.from_numpy(found)
    rows = pairs // products_BC.shape[1]
    return rows, pairs - rows * products_BC.shape[1]
