from __future__ import annotations

import numpy as np
import pytest

from grappa.metrics.whitening import fit_whitening


def stretched(number: int = 500, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    return (random.normal(size=(number, 6)) * [5, 3, 2, 1, 0.5, 0.1] + 2.0).astype(np.float32)


def test_full_whitening_gives_the_identity_covariance() -> None:
    features = stretched()
    whitening = fit_whitening(features, power=1.0)
    whitened = (features - whitening.mean) @ whitening.matrix
    np.testing.assert_allclose(np.cov(whitened.T, bias=True), np.eye(6), atol=1e-4)


def test_power_zero_keeps_distances_and_half_takes_the_root() -> None:
    features = stretched()
    rotation = fit_whitening(features, power=0.0)
    np.testing.assert_allclose(rotation.matrix @ rotation.matrix.T, np.eye(6), atol=1e-9)
    half = fit_whitening(features)
    variances = np.var((features - half.mean) @ half.matrix, axis=0)
    plain = np.var((features - rotation.mean) @ rotation.matrix, axis=0)
    np.testing.assert_allclose(variances, np.sqrt(plain), rtol=1e-4)


def test_apply_is_the_formula_and_of_unit_length() -> None:
    features, others = stretched(), stretched(seed=1)
    whitening = fit_whitening(features)
    expected = (others - whitening.mean) @ whitening.matrix
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    found = whitening.apply(others)
    assert found.dtype == np.float32 and found.shape == others.shape
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_axes_without_variance_are_dropped_not_blown_up() -> None:
    features = stretched(number=4)
    whitening = fit_whitening(features, power=1.0)
    assert (np.abs(whitening.matrix).sum(axis=0) > 0).sum() == 3
    assert np.isfinite(whitening.apply(stretched(seed=1))).all()


def test_refuses_what_makes_no_sense() -> None:
    with pytest.raises(ValueError, match="power is 2"):
        fit_whitening(stretched(), power=2.0)
    with pytest.raises(ValueError, match="do not differ"):
        fit_whitening(np.ones((5, 3), dtype=np.float32))
    with pytest.raises(ValueError, match="do not differ"):
        fit_whitening(stretched(number=1))
    with pytest.raises(ValueError, match="fit it again"):
        fit_whitening(stretched()).apply(np.ones((2, 3), dtype=np.float32))
    centered = np.array([[1, 0], [-1, 0], [0, 1], [0, -1]], dtype=np.float32)
    with pytest.raises(ValueError, match="row 1 equals the mean"):
        fit_whitening(centered).apply(np.array([[1, 1], [0, 0]], dtype=np.float32))
