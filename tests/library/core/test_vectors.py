"""Vectors: embeddings side by side are unit rows whose products are the means of the parts' cosines."""

from __future__ import annotations

import numpy as np
import pytest

from grappa.core import vectors
from grappa.core.vectors import side_by_side


def _units(seed: int, width: int) -> np.ndarray:
    drawn = np.random.default_rng(seed).normal(size=(7, width))
    return (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)


def test_side_by_side_means_the_cosines_also_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [_units(0, 4), _units(1, 4), _units(2, 4)]
    whole, blocks = np.empty((7, 12), np.float32), np.empty((7, 12), np.float32)
    side_by_side(parts, whole)
    np.testing.assert_allclose(whole @ whole.T, sum(part @ part.T for part in parts) / 3, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(whole, axis=1), 1, atol=1e-6)
    monkeypatch.setattr(vectors, "BLOCK_ROWS", 3)
    side_by_side(parts, blocks)
    np.testing.assert_array_equal(blocks, whole)


def test_side_by_side_refuses_parts_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"the parts have \[6, 7\] rows"):
        side_by_side([_units(0, 4), _units(1, 4)[:6]], np.empty((7, 8), np.float32))
    with pytest.raises(ValueError, match="rows are not of length 1"):
        side_by_side([_units(0, 4), 2 * _units(1, 4)], np.empty((7, 8), np.float32))
