"""Which sets are fused: those that are not certainly weaker than the best."""

from __future__ import annotations

import numpy as np

from grappa.method.set_choice import choose_sets


def standouts(**means: float) -> dict[str, np.ndarray]:
    """Indicators of 400 images: what an image makes of all sets alike, and a little noise."""
    rng = np.random.default_rng(0)
    common = rng.normal(0, 0.5, 400)
    return {name: mean + common + rng.normal(0, 0.05, 400) for name, mean in means.items()}


def kept(found: dict[str, np.ndarray], max_loss: float = 0.03) -> list[str]:
    return [each.name for each in choose_sets(found, max_loss=max_loss) if each.kept]


def test_a_set_that_is_certainly_weaker_is_left_out() -> None:
    assert kept(standouts(k00010=2.7, k00030=3.0, k00100=2.98, k00300=2.95)) == ["k00030", "k00100", "k00300"]


def test_a_set_whose_interval_reaches_the_bound_stays() -> None:
    found = standouts(k00010=2.905, k00030=3.0, k00100=2.98)
    (first, *_) = choose_sets(found, max_loss=0.03)
    assert first.low <= 0.03 < first.high and first.kept


def test_two_sets_stay_whatever_they_are_worth() -> None:
    assert kept(standouts(k00010=1.0, k00030=3.0, k00100=2.0)) == ["k00030", "k00100"]


def test_losses_are_shares_of_the_best_with_intervals() -> None:
    best, other, last = choose_sets(standouts(k00010=3.0, k00030=2.7, k00100=2.4), max_loss=0.03)
    assert (best.loss, best.low, best.high) == (0, 0, 0)
    assert other.low < other.loss < other.high and abs(other.loss - 0.1) < 0.01 and abs(last.loss - 0.2) < 0.01
