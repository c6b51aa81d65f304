"""Targets: classes of (domain, label), proxies at the means of their features, whatever the order of the rows."""

from __future__ import annotations

import numpy as np
import pytest

from grappa.core.randomness import id_numbers
from grappa.training.targets import Targets, label_targets

DOMAINS = np.array(["birds", "birds", "cars", "cars", "cars", "birds"], dtype=object)
LABELS = np.array(["red", "blue", "red", "red", "blue", "red"], dtype=object)
IDS = id_numbers([str(number) for number in range(6)])


def _features() -> np.ndarray:
    vectors = np.random.default_rng(0).normal(size=(6, 5))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def test_a_class_is_a_domain_and_a_label_and_its_proxy_their_mean() -> None:
    features = _features()
    found = label_targets(features, DOMAINS, LABELS, IDS)
    assert found.labels.tolist() == [1, 0, 3, 3, 2, 1], "by domain, then by label"
    assert found.labels.dtype == np.int64
    mean = features[[0, 5]].astype(np.float64).mean(0)
    np.testing.assert_allclose(found.proxies[1], mean / np.linalg.norm(mean), rtol=1e-5)
    np.testing.assert_allclose(found.proxies[2], features[4], rtol=1e-5)
    assert found.proxies.shape == (4, 5)


def test_the_order_of_the_rows_changes_nothing() -> None:
    order = np.array([3, 0, 5, 2, 4, 1])
    first = label_targets(_features(), DOMAINS, LABELS, IDS)
    second = label_targets(_features()[order], DOMAINS[order], LABELS[order], IDS[order])
    np.testing.assert_array_equal(second.proxies, first.proxies)
    np.testing.assert_array_equal(second.labels, first.labels[order])


def test_one_class_is_refused() -> None:
    with pytest.raises(ValueError, match="the labels name 1 class; expected at least 2"):
        label_targets(_features(), np.full(6, "cars", dtype=object), np.full(6, "red", dtype=object), IDS)


@pytest.mark.parametrize("labels", [[0, 1, 2], [0, -1, 1]])
def test_a_label_without_a_proxy_is_refused(labels: list[int]) -> None:
    with pytest.raises(ValueError, match=r"labels go from .* but there are 2 proxies"):
        Targets(np.array(labels), np.zeros((2, 5), dtype=np.float32))
