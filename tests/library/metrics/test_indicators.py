"""Reciprocity of neighbours, against its definition and on spaces whose quality is known."""

from __future__ import annotations

import numpy as np
import pytest

from grappa.metrics.indicators import neighborhood_standout, reciprocity, reciprocity_table


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def test_it_is_the_share_of_neighbors_that_choose_back() -> None:
    points = unit(np.random.default_rng(0).normal(size=(60, 5)))
    products = points.astype(np.float64) @ points.T
    np.fill_diagonal(products, -2)
    nearest = [set(np.argsort(-row)[:4]) for row in products]
    expected = [np.mean([i in nearest[j] for j in nearest[i]]) for i in range(60)]
    np.testing.assert_allclose(reciprocity(points, num_neighbors=4), expected)


def test_a_hub_lowers_it() -> None:
    pairs = np.concatenate([np.eye(6), np.eye(6) + 0.01])
    assert reciprocity(unit(pairs), num_neighbors=1).tolist() == [1.0] * 12
    found = reciprocity(unit(np.concatenate([pairs, np.ones((1, 6))])), num_neighbors=2)
    assert (found[:12] >= 0.5).all(), "the other one of the pair is near"
    assert found[:12].mean() < 0.7, "the hub is every image's second neighbor, and has two itself"


def test_a_table_has_the_domains_and_their_mean_in_both_galleries() -> None:
    points = unit(np.random.default_rng(0).normal(size=(40, 5)))
    domains = np.array(["b"] * 15 + ["a"] * 24 + ["alone"], dtype=object)
    own = reciprocity_table(points, domains, gallery="domain").set_index("domain")["reciprocity"]
    assert list(own.index) == ["a", "alone", "b", "_mean"]
    assert own["b"] == pytest.approx(reciprocity(points[:15]).mean())
    assert np.isnan(own["alone"]) and own["_mean"] == pytest.approx((own["a"] + own["b"]) / 2)
    merged = reciprocity_table(points, domains, gallery="merged").set_index("domain")["reciprocity"]
    assert merged["a"] == pytest.approx(reciprocity(points)[15:39].mean())
    assert reciprocity(points[:3]).tolist() == [1.0, 1.0, 1.0]


def test_of_some_rows_it_is_what_it_is_of_all() -> None:
    points = unit(np.random.default_rng(0).normal(size=(80, 5)))
    rows = np.array([3, 10, 11, 40, 79])
    np.testing.assert_array_equal(
        reciprocity(points, num_neighbors=4, rows=rows), reciprocity(points, num_neighbors=4)[rows]
    )
    domains = np.array(["a"] * 20 + ["b"] * 60, dtype=object)
    own = reciprocity_table(points, domains, gallery="domain", rows=rows).set_index("domain")["reciprocity"]
    assert own["a"] == pytest.approx(reciprocity(points[:20])[[3, 10, 11]].mean())
    merged = reciprocity_table(points, domains, gallery="merged", rows=rows).set_index("domain")["reciprocity"]
    assert merged["b"] == pytest.approx(reciprocity(points)[[40, 79]].mean())
    unseen = reciprocity_table(points, domains, gallery="merged", rows=rows[:3]).set_index("domain")["reciprocity"]
    assert np.isnan(unseen["b"]) and unseen["_mean"] == unseen["a"]


def test_views_of_some_images_stand_out_as_they_do_among_views_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    points = random.normal(size=(90, 6))
    images, views = unit(points), unit(points + 0.3 * random.normal(size=(90, 6)))
    rows = np.array([2, 3, 50, 51, 89])
    whole = neighborhood_standout(images, views)
    monkeypatch.setattr("grappa.metrics.indicators.STANDOUT_ROWS", 2)
    np.testing.assert_allclose(neighborhood_standout(images, views[rows], rows=rows), whole[rows], rtol=1e-5)
    with pytest.raises(ValueError, match="found 90 views of 5 images"):
        neighborhood_standout(images, views, rows=rows)
