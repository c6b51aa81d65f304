"""How strongly the frozen features are whitened before clusters and neighbours are sought, chosen without labels.

A few directions that all images share (DINOv2's first two hold two fifths of the variance) can decide which raw
features are near; damping them makes better clusters. Where the largest directions tell the domains and their classes
apart (drawn images), damping them makes worse ones. So the power is chosen by views: near images should stay near when
one of them is cropped, mirrored and recoloured. For each power, the neighbours of an image are compared with those of
its view (``grappa.metrics.indicators.neighbor_agreement``), and the power with the largest mean agreement is taken.

How well that chooses is measured in RESULTS.md ("Clusters of whitened features").

Shapes: n train images, m of them with a view, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from grappa.method.head import MIN_WHITENED_SHARE, Head, IdentityHead, apply_head, fit_whitening_head
from grappa.metrics.indicators import neighbor_agreement
from grappa.search.kmeans import count_distinct

POWERS = (0.0, 0.3, 0.5, 0.7)
MIN_VIEWED = 40  # images with a view by which a power is judged; with fewer, features stay raw


@dataclass(frozen=True)
class PowerChoice:
    """The chosen power, and the mean agreement (0-1) by power; no scores where there were too few images to choose."""

    power: float
    scores: dict[float, float]


def choose_power(
    features: NDArray[np.float32], ids: NDArray[np.uint64], viewed: NDArray[np.int64], views: NDArray[np.float32]
) -> PowerChoice:
    """Choose the power among ``POWERS``; of equally good ones the smallest.

    Args:
        features: of the train images, (n, D), L2-normalised, with unique ids (n,).
        viewed: the rows (m,) of which there is a view; ``views``: its features (m, D), L2-normalised.
    """
    if len(viewed) < MIN_VIEWED or count_distinct(features, 4) < 4:
        return PowerChoice(0.0, {})
    scores = {}
    for power in POWERS:
        head = fit_power(features, ids, power)
        made = (apply_head(head, each) for each in (features[viewed], views))
        scores[power] = float(neighbor_agreement(*made).mean())
    return PowerChoice(max(scores, key=lambda power: scores[power]), scores)


def fit_power(features: NDArray[np.float32], ids: NDArray[np.uint64], power: float) -> Head:
    """Return PCA whitening of a power in 0-1, fitted on train features (n, D) with unique ids (n,).

    A power of 0, and fewer than four different features, leave features as they are. Eigenvalues below
    ``MIN_WHITENED_SHARE`` of the largest are raised to that.
    """
    if not power or count_distinct(features, 4) < 4:
        return IdentityHead()
    return fit_whitening_head(features, ids, power=power, min_share=MIN_WHITENED_SHARE)
