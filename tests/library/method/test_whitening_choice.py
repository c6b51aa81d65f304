"""The power of the whitening of frozen features, chosen by views: it damps what all images share, and nothing else."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from grappa.method.head import IdentityHead, apply_head
from grappa.method.whitening_choice import MIN_VIEWED, POWERS, choose_power, fit_power
from tests.helpers.rounding import normalized

Floats = NDArray[np.float32]
Collection = tuple[Floats, NDArray[np.uint64], NDArray[np.int64], Floats]


def _collection(*, nuisance: float, classes: float, num_classes: int = 40, size: int = 8) -> Collection:
    """Return images of classes that lie ``classes`` apart in 16 directions, and views that redraw 2 other directions of
    spread ``nuisance``."""
    rng = np.random.default_rng(0)
    place = classes * rng.normal(size=(num_classes, 16)).repeat(size, axis=0)
    seen = []
    for _ in range(2):
        own = place + 0.5 * rng.normal(size=place.shape)
        shared = nuisance * rng.normal(size=(len(place), 2))
        seen.append(normalized(np.concatenate([own, shared], axis=1).astype(np.float32)))
    number = len(place)
    return seen[0], np.arange(number, dtype=np.uint64), np.arange(number), seen[1]


def _nearest_of_class(features: Floats, size: int = 8) -> float:
    similarity = features @ features.T
    np.fill_diagonal(similarity, -2)
    return float((similarity.argmax(axis=1) // size == np.arange(len(features)) // size).mean())


def test_directions_that_all_images_share_are_damped() -> None:
    features, ids, viewed, views = _collection(nuisance=6.0, classes=1.0)
    choice = choose_power(features, ids, viewed, views)
    assert tuple(choice.scores) == POWERS
    assert choice.power >= 0.5 and choice.scores[choice.power] == max(choice.scores.values())
    whitened = apply_head(fit_power(features, ids, choice.power), features)
    assert _nearest_of_class(whitened) > _nearest_of_class(features) + 0.1


def test_directions_that_tell_classes_apart_are_kept() -> None:
    rng = np.random.default_rng(1)
    place = np.concatenate([3 * rng.normal(size=(40, 4)), np.zeros((40, 20))], axis=1).repeat(8, axis=0)
    features, views = (normalized((place + 0.5 * rng.normal(size=place.shape)).astype(np.float32)) for _ in range(2))
    assert choose_power(features, np.arange(320, dtype=np.uint64), np.arange(320), views).power == 0


def test_the_order_of_the_rows_changes_nothing() -> None:
    features, ids, viewed, views = _collection(nuisance=6.0, classes=1.0)
    order = np.random.default_rng(2).permutation(len(features))
    again = choose_power(features[order], ids[order], viewed, views[order])
    first = choose_power(features, ids, viewed, views)
    assert again.power == first.power
    np.testing.assert_allclose(list(again.scores.values()), list(first.scores.values()), atol=2e-3)


def test_few_or_equal_images_keep_their_features() -> None:
    features, ids, viewed, views = _collection(nuisance=6.0, classes=1.0)
    few = MIN_VIEWED - 1
    assert choose_power(features, ids, viewed[:few], views[:few]).power == 0
    equal = np.repeat(features[:1], len(features), axis=0)
    assert choose_power(equal, ids, viewed, equal).power == 0
    assert isinstance(fit_power(equal, ids, 0.5), IdentityHead)
