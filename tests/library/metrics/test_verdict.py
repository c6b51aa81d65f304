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
    fused = _better(0.51)
    near = {name: fused - 0.01 + 0.3 * np.random.default_rng(5).normal(size=400) for name in ("mean", "student")}
    close = {"zero_shot": FROZEN, "fused": fused, **near}
    assert judge(close, by_cost=ORDER).choice == "student"
    assert judge(close | {"student": _better(0.2)}, by_cost=ORDER).choice == "mean"
    noise = 0.3 * np.random.default_rng(5).normal(size=400)
    little = {"zero_shot": FROZEN, "fused": _better(0.07, 0.1), "student": FROZEN + 0.055 + noise - noise.mean()}
    assert judge(little, by_cost=ORDER).choice == "fused"  # what the student gains counts as none
    certainly_below = dict.fromkeys(near, fused - 0.01)
    assert judge(close | certainly_below, by_cost=ORDER).choice == "fused"


def _space(*, classes: float, domains: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return images of 30 classes in three domains, their views and their domains: how far both lie apart is given."""
    rng = np.random.default_rng(0)
    label = np.arange(300) // 10
    lie = classes * rng.normal(size=(30, 32))[label] + 0.8 * rng.normal(size=(300, 32))
    lie += domains * rng.normal(size=(3, 32))[label % 3]
    seen = lie + 0.8 * rng.normal(size=(300, 32))
    images, views = (normalized(each.astype(np.float32)) for each in (lie, seen))
    return images, views, (label % 3).astype(str).astype(object)


def test_a_model_that_only_draws_domains_apart_is_not_said_to_help() -> None:
    spaces = {"zero_shot": _space(classes=0.5, domains=0.0), "apart": _space(classes=0.5, domains=0.7)}
    spaces["better"] = _space(classes=0.7, domains=0.0)
    whole = {name: neighborhood_standout(images, views) for name, (images, views, _) in spaces.items()}
    within = {name: neighborhood_standout(*space[:2], domains=space[2]) for name, space in spaces.items()}

    def said(*models: str) -> tuple[str, str]:
        found = judge(
            {name: whole[name] for name in models}, within={name: within[name] for name in models}, by_cost=models[1:]
        )
        return found.word, found.choice

    lone = judge({name: whole[name] for name in ("zero_shot", "apart")}, by_cost=["apart"])
    assert lone.word == "helped"  # by all images alone it would be
    assert said("zero_shot", "apart") == ("no certain difference", "zero_shot")
    assert said("zero_shot", "better") == said("zero_shot", "apart", "better") == ("helped", "better")


def test_in_one_domain_and_in_small_ones_images_stand_out_among_all() -> None:
    images, views, domains = _space(classes=0.5, domains=0.3)
    whole = neighborhood_standout(images, views)
    one = np.full(len(images), "a", dtype=object)
    many = np.array([str(row // 10) for row in range(len(images))], dtype=object)
    for each in (one, many):
        np.testing.assert_array_equal(neighborhood_standout(images, views, domains=each), whole)
    rows = np.array([3, 50, 200])
    found = neighborhood_standout(images, views[rows], rows=rows, domains=domains)
    np.testing.assert_allclose(found, neighborhood_standout(images, views, domains=domains)[rows], rtol=1e-5)
    assert (found != whole[rows]).all()


def test_where_all_models_are_certainly_worse_adaptation_hurt() -> None:
    models = {"zero_shot": FROZEN, "mean": _better(-0.3), "fused": _better(-0.6)}
    within = {"zero_shot": FROZEN, "mean": _better(-0.3), "fused": _better(0.2)}
    assert judge(models, within=within, by_cost=ORDER).word == "hurt"
    assert judge(models | {"mean": _better(0.3)}, within=within, by_cost=ORDER).word == "no certain difference"


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
