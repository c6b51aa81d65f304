"""Which adaptor sets are worth fusing, told without labels (not the paper's: there every set is fused).

Equal attention gives a weak set as much say as a strong one, and learned attention differs little from it. A set of
very coarse clusters then costs all sets together more than it adds: RESULTS.md, "Weak sets are left out". So every set
is judged before the fusion is trained: how far the neighbours of train images stand out for another view of them
(``grappa.metrics.indicators.neighborhood_standout``), behind heads that were fitted on other regions of the collection.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from grappa.metrics.retrieval import paired_bootstrap

MIN_JUDGED = 100  # of fewer images nothing certain is told, and all sets are fused
MIN_KEPT = 2  # a fusion is of two sets or more


@dataclass(frozen=True)
class JudgedSet:
    """A set beside the best one: ``loss`` is what its indicator is below the best's, as a share of it.

    ``low``, ``high``: the 95 % interval of the loss, by paired bootstrap over images; all three are 0 for the best.
    """

    name: str
    indicator: float
    loss: float
    low: float
    high: float
    kept: bool


def choose_sets(
    standouts: Mapping[str, NDArray[np.float64]], *, max_loss: float, seed: int = 0
) -> tuple[JudgedSet, ...]:
    """Return the sets of ``standouts``, (m,) of the same images each, in their order, and which of them are kept.

    A set is left out where its loss is certainly above ``max_loss``: the whole interval. The two best always stay.
    """
    means = {name: float(found.mean()) for name, found in standouts.items()}
    ranked = sorted(means, key=lambda name: -means[name])
    best = ranked[0]
    judged = []
    for name, found in standouts.items():
        loss = (standouts[best] - found) / max(abs(means[best]), 1e-12)
        low, high = paired_bootstrap(loss, seed=seed)
        kept = name in ranked[:MIN_KEPT] or low <= max_loss
        judged.append(JudgedSet(name, means[name], float(loss.mean()), low, high, kept))
    return tuple(judged)
