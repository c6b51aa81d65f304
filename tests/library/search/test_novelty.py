from __future__ import annotations

import numpy as np
import pytest

from grappa.search.novelty import drift, outlier_ratios, wilson_interval


def test_an_image_apart_is_an_outlier_whether_its_surroundings_are_dense_or_sparse() -> None:
    dense, sparse = np.full((5, 2), 0.01, np.float32), np.full((5, 2), 0.3, np.float32)
    distances = np.concatenate([dense, sparse, np.full((1, 2), 0.05, np.float32)])
    neighbors = np.concatenate([np.tile([0, 1], (5, 1)), np.tile([5, 6], (5, 1)), [[0, 1]]])
    np.testing.assert_allclose(outlier_ratios(neighbors, distances), [1] * 10 + [5], rtol=1e-5)


def test_copies_without_any_distance_give_a_finite_ratio() -> None:
    assert outlier_ratios(np.array([[1], [0]]), np.zeros((2, 1), np.float32)).tolist() == [1, 1]


def test_drift_counts_what_lies_beyond_99_of_100_learned_distances() -> None:
    learned = np.linspace(0, 1, 101, dtype=np.float32)
    found = drift(np.array([0.5, 0.99, 0.995, 2.0], np.float32), learned)
    assert (found.num_images, found.num_far, found.share) == (4, 2, 0.5)
    assert found.limit == pytest.approx(0.99)
    assert found.low < 0.5 < found.high and found.worth_adapting


def test_images_like_the_learned_ones_are_not_worth_adapting_to() -> None:
    random = np.random.default_rng(0)
    found = drift(random.random(500).astype(np.float32), random.random(5000).astype(np.float32))
    assert found.share == pytest.approx(0.01, abs=0.02) and not found.worth_adapting


def test_few_images_prove_little() -> None:
    learned = np.linspace(0, 1, 101, dtype=np.float32)
    assert not drift(np.array([0.1, 0.1, 0.1, 0.1, 2.0], np.float32), learned).worth_adapting
    with pytest.raises(ValueError, match="0 new and 101 learned"):
        drift(np.empty(0, np.float32), learned)


def test_the_interval_is_that_of_wilson() -> None:
    assert wilson_interval(5, 30) == pytest.approx((0.0734, 0.3356), abs=1e-4)
    assert wilson_interval(0, 10)[0] == 0.0 and wilson_interval(10, 10)[1] == pytest.approx(1.0)
