"""Did adaptation help? A verdict without labels, and the model to deploy.

Every model is judged by ``grappa.metrics.indicators.neighborhood_standout`` of the same images, each behind a head of
one and the same weight that was fitted on *other* images: the indicator ranks models only within one kind of space. The
difference to the frozen backbone is paired by image, its interval a bootstrap over images.

What it said of twenty collections with labels is in RESULTS.md, "The verdict without labels"; the three constants below
are chosen, not fitted.
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
CLOSE_SHARE = 0.01  # of the best model's indicator: a cheaper model that is nearer to the best than this is preferred


@dataclass(frozen=True)
class Verdict:
    """The outcome for a run: the word, the model to deploy, and the models in the order in which they were given."""

    word: Word
    choice: str
    num_images: int
    models: tuple[Judged, ...]


def judge(standouts: Mapping[str, NDArray[np.float64]], *, by_cost: Sequence[str], seed: int = 0) -> Verdict:
    """Return the verdict on the models of ``standouts``, (m,) of the same images each; the first is the frozen one.

    ``by_cost``: the adapted models, the cheapest at retrieval first. The frozen model is chosen unless the best adapted
    model is certainly better: then the cheapest model that is as good as the best one.
    """
    (frozen, *adapted) = standouts
    judged = [_judged(name, found, standouts[frozen], seed) for name, found in standouts.items()]
    number = len(standouts[frozen])
    best = max(judged[1:], key=lambda each: each.indicator)
    word = _word(best, judged[0], number)
    if word != "helped":
        return Verdict(word, frozen, number, tuple(judged))
    enough = best.indicator - CLOSE_SHARE * abs(best.indicator)
    good = {each.model for each in judged[1:] if each.indicator >= enough and each.low > 0}
    choice = next(name for name in (*by_cost, *adapted) if name in good)
    return Verdict(word, choice, number, tuple(judged))


def _judged(name: str, found: NDArray[np.float64], frozen: NDArray[np.float64], seed: int) -> Judged:
    difference = found - frozen
    low, high = paired_bootstrap(difference, seed=seed)
    return Judged(name, float(found.mean()), float(difference.mean()), low, high)


def _word(best: Judged, frozen: Judged, number: int) -> Word:
    if number < MIN_IMAGES:
        return "too few images"
    margin = MIN_SHARE * abs(frozen.indicator)
    if best.low > 0 and best.difference > margin:
        return "helped"
    return "hurt" if best.high < 0 and best.difference < -margin else "no certain difference"
