"""Did adaptation help? A verdict without labels, and the model to deploy.

Every model is judged as it would be deployed, behind its own head, by
``grappa.metrics.indicators.neighborhood_standout`` of the same images. The difference to the frozen backbone is paired
by image, its interval a bootstrap over images. A gain has to be certain twice: among all images, and among those of an
image's own domain, since a model that only draws domains apart lets neighbours stand out too.

What it said of collections with labels is in RESULTS.md, "The verdict without labels"; the constants below are chosen,
not fitted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from grappa.metrics.judged import Judged, Word
from grappa.metrics.retrieval import paired_bootstrap

MIN_IMAGES = 100  # with fewer judged images nothing is said
MIN_SHARE = 0.02  # of the frozen backbone's indicator: a smaller difference counts as none
CLOSE_SHARE = 0.01  # of the best model's indicator: a cheaper model this near, and not certainly below, is preferred


@dataclass(frozen=True)
class Verdict:
    """The outcome for a run: the word, the model to deploy, and the models in the order in which they were given."""

    word: Word
    choice: str
    num_images: int
    models: tuple[Judged, ...]


def judge(
    standouts: Mapping[str, NDArray[np.float64]],
    *,
    within: Mapping[str, NDArray[np.float64]] | None = None,
    by_cost: Sequence[str],
    seed: int = 0,
) -> Verdict:
    """Return the verdict on the models of ``standouts``, (m,) of the same images each; the first is the frozen one.

    ``within``: the same among the images of each image's own domain; None where there is one domain only. ``by_cost``:
    the adapted models, the cheapest at retrieval first. The frozen model is chosen unless the best adapted model (of
    those that are certainly better within domains, where there are some) is certainly better: then the cheapest model
    that is as good as the best one.
    """
    (frozen, *adapted) = standouts
    judged = [_judged(name, standouts, within, frozen, seed) for name in standouts]
    number = len(standouts[frozen])
    best = best_adapted(judged)
    word = _word(best, judged, number)
    if word != "helped":
        return Verdict(word, frozen, number, tuple(judged))
    good = {each.model for each in judged[1:] if each is best or _as_good(each, best, judged[0], standouts, seed)}
    choice = next(name for name in (*by_cost, *adapted) if name in good)
    return Verdict(word, choice, number, tuple(judged))


def _as_good(
    model: Judged, best: Judged, frozen: Judged, standouts: Mapping[str, NDArray[np.float64]], seed: int
) -> bool:
    """Tell whether a model is a gain, near to the best one and not certainly below it."""
    if model.indicator < best.indicator - CLOSE_SHARE * abs(best.indicator) or not _gains(model, frozen):
        return False
    return paired_bootstrap(standouts[best.model] - standouts[model.model], seed=seed)[0] <= 0


def _gains(model: Judged, frozen: Judged) -> bool:
    return model.low > 0 and model.difference > MIN_SHARE * abs(frozen.indicator) and model.holds_within


def best_adapted(judged: Sequence[Judged]) -> Judged:
    """Return the adapted model with the largest indicator, of those that hold within domains where there are some."""
    return max(judged[1:], key=lambda each: (each.holds_within, each.indicator))


def _judged(
    name: str,
    standouts: Mapping[str, NDArray[np.float64]],
    within: Mapping[str, NDArray[np.float64]] | None,
    frozen: str,
    seed: int,
) -> Judged:
    difference = standouts[name] - standouts[frozen]
    low, high = paired_bootstrap(difference, seed=seed)
    low_within = None if within is None else paired_bootstrap(within[name] - within[frozen], seed=seed)[0]
    return Judged(name, float(standouts[name].mean()), float(difference.mean()), low, high, low_within)


def _word(best: Judged, judged: Sequence[Judged], number: int) -> Word:
    if number < MIN_IMAGES:
        return "too few images"
    if _gains(best, judged[0]):
        return "helped"
    highest = max(judged[1:], key=lambda each: each.indicator)
    certain = highest.high < 0 and highest.difference < -MIN_SHARE * abs(judged[0].indicator)
    return "hurt" if certain else "no certain difference"
