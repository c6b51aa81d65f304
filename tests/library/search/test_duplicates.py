from __future__ import annotations

import numpy as np
import pytest

from grappa.search import duplicates
from grappa.search.duplicates import groups, near_duplicates


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def material(number: int = 300, width: int = 16) -> np.ndarray:
    """Points of which every tenth has a slightly changed copy."""
    random = np.random.default_rng(0)
    points = random.normal(size=(number, width))
    return unit(np.concatenate([points, points[::10] + 0.05 * random.normal(size=(number // 10, width))]))


def expected(points: np.ndarray, threshold: float) -> set[tuple[int, int]]:
    exact = points.astype(np.float64) @ points.astype(np.float64).T
    first, second = np.nonzero(np.triu(exact >= threshold, 1))
    return set(zip(first.tolist(), second.tolist(), strict=True))


@pytest.mark.parametrize("threshold", [0.5, 0.9, 0.97])
@pytest.mark.parametrize("block", [7, 1000])
def test_all_pairs_above_the_threshold_are_found_in_whatever_blocks(
    threshold: float, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duplicates, "ROW_BLOCK", block)
    monkeypatch.setattr(duplicates, "COLUMN_BLOCK", 3 * block)
    points = material()
    found = near_duplicates(points, threshold=threshold)
    assert set(zip(found.first.tolist(), found.second.tolist(), strict=True)) == expected(points, threshold)
    assert (np.diff(found.similarities) <= 0).all() and (found.first < found.second).all()


def test_the_same_vector_has_the_cosine_1() -> None:
    points = unit(np.random.default_rng(1).normal(size=(1, 50)).repeat(3, 0))
    found = near_duplicates(points, threshold=1.0)
    assert list(zip(found.first, found.second, strict=True)) == [(0, 1), (0, 2), (1, 2)]
    assert found.similarities.tolist() == [1.0, 1.0, 1.0]


def test_a_threshold_that_finds_too_much_or_makes_no_sense_is_refused() -> None:
    points = unit(np.ones((50, 4)))
    with pytest.raises(ValueError, match="more than 100 pairs reach the threshold 0.9; give a larger one"):
        near_duplicates(points, threshold=0.9, max_pairs=100)
    for threshold in (0.0, -1.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="give a cosine above 0, at most 1"):
            near_duplicates(points, threshold=threshold)


def test_groups_are_what_pairs_connect() -> None:
    assert groups(np.array([4, 1, 0]), np.array([5, 4, 3]), 7).tolist() == [0, 1, 2, 0, 1, 1, 3]
    assert groups(np.empty(0, np.int64), np.empty(0, np.int64), 3).tolist() == [0, 1, 2]
