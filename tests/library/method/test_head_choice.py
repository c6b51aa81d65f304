"""The weight of an image's neighbourhood, chosen by views: which cases it tells apart, and what must not change it."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from numpy.typing import NDArray

from grappa.method.head import WhitenedNeighborhoodHead, apply_head, fit_whitened_neighborhood_head
from grappa.method.head_choice import DEFAULT_WEIGHT, WEIGHTS, choose_weight, region_halves
from tests.helpers.rounding import normalized

FIT = partial(fit_whitened_neighborhood_head, num_iterations=5)
Floats = NDArray[np.float32]


def _collection(of_place: float, num_groups: int = 60, size: int = 8) -> tuple[Floats, Floats, NDArray[np.uint64]]:
    """Return images in groups, and views that keep the group's place but not (or hardly) what lies around it."""
    rng = np.random.default_rng(0)
    places = rng.normal(size=(num_groups, 24)).repeat(size, axis=0)
    own = rng.normal(size=places.shape)
    points = places * of_place + own
    views = points + 0.3 * rng.normal(size=points.shape)
    unit = [normalized(each.astype(np.float32)) for each in (points, views)]
    return unit[0], unit[1], np.arange(len(points), dtype=np.uint64)


def test_the_weight_with_the_best_score_on_other_regions_is_chosen() -> None:
    points, views, ids = _collection(1.0)
    choice = choose_weight(points, ids, np.arange(len(points)), views, FIT)
    assert tuple(choice.scores) == WEIGHTS
    assert choice.scores[choice.weight] == max(choice.scores.values()) > 0


def test_the_order_of_the_rows_changes_nothing() -> None:
    points, views, ids = _collection(1.0)
    viewed = np.arange(0, len(points), 2)
    order = np.random.default_rng(1).permutation(len(points))
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    moved = np.sort(place[viewed])
    plain = choose_weight(points, ids, viewed, views[viewed], FIT)
    other = choose_weight(points[order], ids[order], moved, views[order][moved], FIT)
    assert other.weight == plain.weight
    np.testing.assert_allclose(list(other.scores.values()), list(plain.scores.values()), rtol=1e-4)


def test_few_images_get_the_middle_weight() -> None:
    points, views, ids = _collection(1.0, num_groups=6)
    choice = choose_weight(points, ids, np.arange(len(points)), views, FIT)
    assert (choice.weight, choice.scores) == (DEFAULT_WEIGHT, {})


def test_halves_are_of_like_size_and_keep_regions_whole() -> None:
    points, _, ids = _collection(20.0)
    half = region_halves(points, ids, seed=3)
    assert 0.3 < half.mean() < 0.7
    groups = half.reshape(-1, 8)
    assert (groups.all(axis=1) | ~groups.any(axis=1)).mean() > 0.9


def test_a_heads_weight_can_be_changed_and_nothing_else() -> None:
    points, _, ids = _collection(1.0)
    head = FIT(points, ids)
    again, zero = head.with_weight(1.0), head.with_weight(0.0)
    np.testing.assert_array_equal(apply_head(head, points), apply_head(again, points))
    assert zero.form() == head.form() | {"neighborhood_weight": 0.0}
    assert all((zero.state_dict()[name] == value).all() for name, value in head.state_dict().items())
    assert not np.allclose(apply_head(zero, points), apply_head(head, points), atol=1e-3)


def test_it_is_the_neighbourhood_head_behind_whitening() -> None:
    points, _, ids = _collection(1.0)
    head = FIT(points, ids)
    assert isinstance(head, WhitenedNeighborhoodHead)
    by_steps = apply_head(head.neighborhood, apply_head(head.whitening, points))
    np.testing.assert_allclose(apply_head(head, points), by_steps, atol=1e-5)


def test_wrong_settings_are_refused() -> None:
    points, _, ids = _collection(1.0)
    with pytest.raises(ValueError, match="perplexity is 1"):
        FIT(points, ids, perplexity=1.0)
