"""The targets of training an adaptor set: classifications of the train rows, each with a proxy for every class.

Shapes: n train rows, D width, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from grappa.core.vectors import check_unit_vectors
from grappa.search.cluster_means import means


@dataclass(frozen=True)
class Targets:
    """One classification: labels (n,) int64 in 0..C-1, and the first value of every class's proxy, proxies (C, D)
    float32.
    """

    labels: NDArray[np.int64]
    proxies: NDArray[np.float32]

    def __post_init__(self) -> None:
        low, high = int(self.labels.min(initial=0)), int(self.labels.max(initial=0))
        if low < 0 or high >= len(self.proxies):
            raise ValueError(f"labels go from {low} to {high}, but there are {len(self.proxies)} proxies: one a class")


def label_targets(
    features: NDArray[np.float32],
    domains: NDArray[np.object_],
    labels: NDArray[np.object_],
    ids: NDArray[np.uint64],
) -> Targets:
    """Return the targets of labelled rows: a class is a (domain, label) pair, its proxy starts at its features' mean.

    features (n, D) L2-normalised; domains, labels and ids (n,), none of them null. Classes are numbered in the order of
    (domain, label), and features are added in the order of the ids, so the order of the rows does not change the
    proxies. ValueError when the labels name fewer than two classes.
    """
    features = check_unit_vectors("features", features)
    pairs = pd.MultiIndex.from_arrays([domains.astype(str), labels.astype(str)])
    numbers, classes = pd.factorize(pairs, sort=True)
    if len(classes) < 2:
        raise ValueError(f"the labels name {len(classes)} class; expected at least 2 to tell apart")
    return class_targets(features, numbers, ids)


def class_targets(features: NDArray[np.float32], classes: NDArray[np.int64], ids: NDArray[np.uint64]) -> Targets:
    """Return the targets of rows whose classes (n,) are numbers; numbers without a row are no class.

    A class's proxy starts at the L2-normalised mean of its rows' features (n, D), which are added in the order of the
    ids (n,): the order of the rows does not change the proxies.
    """
    order = np.argsort(ids, kind="stable")
    _, numbers = np.unique(classes, return_inverse=True)
    points, ordered = torch.from_numpy(features[order]), numbers[order]
    first = points[torch.from_numpy(np.unique(ordered, return_index=True)[1])]
    return Targets(numbers, means(points, torch.from_numpy(ordered), first).numpy())
