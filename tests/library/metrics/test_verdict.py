"""The verdict without labels: the word, the interval behind it, and which model is chosen."""

from __future__ import annotations

import numpy as np
import pytest

from grappa.metrics.indicators import neighbor_agreement, neighborhood_standout
from grappa.metrics.verdict import MIN_IMAGES, judge
from tests.helpers.rounding import normalized

RNG = np.random.default_rng(0)
FROZEN = 3 + RNG.normal(size=400)
ORDER = ["student", "k00004", "mean", "fused"]


def _better(by: float, spread: float = 0.3) -> np.ndarray:
    return FROZEN + by + spread * np.random.default_rng(1).normal(size=len(FROZEN))


@pytest.mark.parametrize(
    ("by", "word"),
    [(0.5, "helped"), (-0.5, "hurt"), (0.0, "no certain difference"), (0.05, "no certain difference")],
)
def test_the_word_follows_the_interval_and_the_size(by: float, word: str) -> None:
    found = judge({"zero_shot": FROZEN, "fused": _better(by)}, by_cost=["fused"])
    assert found.word == word
    assert found.choice == ("fused" if word == "helped" else "zero_shot")
    frozen, fused = found.models
    assert (frozen.difference, frozen.low, frozen.high) == (0, 0, 0)
    assert fused.low <= fused.difference <= fused.high and fused.difference == pytest.approx(by, abs=0.05)


def test_a_wide_interval_is_no_certain_difference() -> None:
    noise = judge({"zero_shot": FROZEN, "fused": _better(0.3, spread=8.0)}, by_cost=["fused"])
    assert (noise.word, noise.choice) == ("no certain difference", "zero_shot")


def test_few_images_give_no_verdict() -> None:
    some = slice(MIN_IMAGES - 1)
    found = judge({"zero_shot": FROZEN[some], "fused": _better(2.0)[some]}, by_cost=["fused"])
    assert (found.word, found.choice, found.num_images) == ("too few images", "zero_shot", MIN_IMAGES - 1)


def test_the_cheapest_of_equals_is_chosen_and_a_certainly_better_one_before_it() -> None:
    close = {"zero_shot": FROZEN, "mean": _better(0.5), "student": _better(0.49), "fused": _better(0.51)}
    assert judge(close, by_cost=ORDER).choice == "student"
    assert judge(close | {"student": _better(0.2)}, by_cost=ORDER).choice == "mean"


def test_neighbours_stand_out_where_views_keep_them() -> None:
    groups = np.random.default_rng(2).normal(size=(20, 16)).repeat(10, axis=0)
    noise = np.random.default_rng(3).normal(size=(2, *groups.shape))
    near, far = (normalized((groups + share * noise[0]).astype(np.float32)) for share in (0.3, 3.0))
    seen_near, seen_far = (normalized((groups + share * noise[1]).astype(np.float32)) for share in (0.3, 3.0))
    kept, lost = neighborhood_standout(near, seen_near), neighborhood_standout(far, seen_far)
    assert kept.shape == (200,) and kept.mean() > 2 > 1 > abs(lost.mean())
    agreed, parted = neighbor_agreement(near, seen_near), neighbor_agreement(far, seen_far)
    assert agreed.shape == (200,) and agreed.mean() > 0.5 > parted.mean() and 0 <= parted.min() <= agreed.max() <= 1
    np.testing.assert_array_equal(neighbor_agreement(near, near), 1)
    order = np.random.default_rng(4).permutation(200)
    np.testing.assert_allclose(neighborhood_standout(near[order], seen_near[order]), kept[order], atol=1e-4)


def test_equal_images_stand_out_by_nothing_and_a_lone_few_are_refused() -> None:
    same = normalized(np.ones((8, 4), np.float32))
    assert np.abs(neighborhood_standout(same, same)).max() < 1e3
    with pytest.raises(ValueError, match="at least 4 rows"):
        neighborhood_standout(same[:3], same[:3])
