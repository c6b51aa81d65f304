"""The head of a model, chosen without labels: which weight g does an image's neighbourhood deserve (not the paper's)?

A head is fitted on train embeddings, and serves images of classes that may not be among them. On the images that it was
fitted on it looks better or worse than it is: their own centroids lie beside them. So the choice is cross-fitted, and
by whole *regions*, since retrieval is asked for classes that were never seen:

1. the train images are cut into regions of some 60 images (k-means of whitened embeddings), the regions into halves;
2. on each half a head is fitted, and each weight is judged on the other half's images by another view of them: how
   many of an image's neighbours the view has too (``grappa.metrics.indicators.neighbor_agreement``, a), and how far
   they stand out for it (``neighborhood_standout``, s), means over all images and three such cuts;
3. the weight with the largest a ** 2 s is taken. Alone, s gives too little weight where classes lie together (drawn
   images), and a too much where adaptation has drawn them together.

How well that chooses is measured in RESULTS.md ("The last step chooses itself").

Shapes: n train images, m of them with a view, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from grappa.core.randomness import key, shuffled, uniforms
from grappa.method.head import (
    WhitenedNeighborhoodHead,
    apply_head,
    fit_whitened_neighborhood_head,
    fit_whitening_head,
)
from grappa.metrics.indicators import neighbor_agreement, neighborhood_standout
from grappa.search.kmeans import cluster, count_distinct

WEIGHTS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.5, 2.0)
DEFAULT_WEIGHT = 0.4  # where there are too few images to choose
MIN_VIEWED, MIN_FITTED = 20, 40  # images of a half on which a weight is judged, and on which a head is fitted
IMAGES_PER_REGION, MIN_REGIONS, NUM_CUTS = 60, 6, 3
MAX_IMAGES = 16_384  # more train images than that are sampled: the choice is a mean, the head itself uses all

Fit = Callable[[NDArray[np.float32], NDArray[np.uint64]], WhitenedNeighborhoodHead]


@dataclass(frozen=True)
class WeightChoice:
    """The chosen g, and the score a ** 2 s by weight; no scores where there were too few images to choose."""

    weight: float
    scores: dict[float, float]


def choose_weight(
    embeddings: NDArray[np.float32],
    ids: NDArray[np.uint64],
    viewed: NDArray[np.int64],
    views: NDArray[np.float32],
    fit: Fit,
    *,
    seed: int = 0,
) -> WeightChoice:
    """Choose g among ``WEIGHTS`` for a head that ``fit(embeddings, ids)`` fits with any g.

    Args:
        embeddings: of the train images, (n, D), L2-normalised, with unique ids (n,).
        viewed: the rows (m,) of which there is a view; ``views``: its embedding (m, D), L2-normalised.
    """
    rows = _sampled(ids, viewed, seed)
    embeddings, ids, viewed = embeddings[rows], ids[rows], np.searchsorted(rows, viewed)
    found: dict[float, list[NDArray[np.float64]]] = {weight: [] for weight in WEIGHTS}
    for cut in range(NUM_CUTS):
        half = region_halves(embeddings, ids, seed=key(seed, "cut", cut) >> 33)
        for fitted, judged in ((~half, half), (half, ~half)):
            chosen = judged[viewed]
            if fitted.sum() < MIN_FITTED or chosen.sum() < MIN_VIEWED or count_distinct(embeddings[fitted], 4) < 4:
                return WeightChoice(DEFAULT_WEIGHT, {})
            head = fit(embeddings[fitted], ids[fitted])
            for weight, parts in found.items():
                parts.append(_indicators(head.with_weight(weight), embeddings[viewed[chosen]], views[chosen]))
    scores = {weight: _score(np.concatenate(parts, axis=1)) for weight, parts in found.items()}
    return WeightChoice(max(scores, key=lambda weight: scores[weight]), scores)


def standout_behind_head(
    fitted: NDArray[np.float32],
    ids: NDArray[np.uint64],
    images: NDArray[np.float32],
    views: NDArray[np.float32],
    *,
    device: str = "cpu",
) -> NDArray[np.float64]:
    """Return ``neighborhood_standout`` of images, (m,), behind a head that was fitted on others.

    fitted: embeddings (n, D) with unique ids (n,); images and views as there; all L2-normalised. Whatever is compared
    is judged behind a head of the same weight, ``DEFAULT_WEIGHT``.
    """
    head = fit_whitened_neighborhood_head(fitted, ids, neighborhood_weight=DEFAULT_WEIGHT, device=device)
    made = (apply_head(head, each, device=device) for each in (images, views))
    return neighborhood_standout(*made)


def region_halves(embeddings: NDArray[np.float32], ids: NDArray[np.uint64], *, seed: int) -> NDArray[np.bool_]:
    """Return which half each of the n images is in, (n,): regions of the whitened embeddings are never cut."""
    whitened = apply_head(fit_whitening_head(embeddings, ids), embeddings)
    most = count_distinct(whitened, len(whitened) // 2)
    number = max(2, min(max(MIN_REGIONS, len(ids) // IMAGES_PER_REGION), most))
    region = cluster(whitened, num_clusters=number, ids=ids, seed=seed).pseudo_labels
    order = np.argsort(uniforms(key(seed, "halves"), np.arange(number, dtype=np.uint64), 1)[:, 0])
    sizes = np.bincount(region, minlength=number)[order]
    first = np.zeros(number, dtype=bool)
    first[order[np.cumsum(sizes) - sizes / 2 < len(ids) / 2]] = True
    halves: NDArray[np.bool_] = first[region]
    return halves


def _sampled(ids: NDArray[np.uint64], viewed: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    if len(ids) <= MAX_IMAGES:
        return np.arange(len(ids))
    return np.union1d(shuffled(key(seed, "head choice"), ids)[:MAX_IMAGES], viewed)


def _indicators(
    head: WhitenedNeighborhoodHead, embeddings: NDArray[np.float32], views: NDArray[np.float32]
) -> NDArray[np.float64]:
    """Return agreement and standout of each image, (2, m)."""
    made = apply_head(head, embeddings), apply_head(head, views)
    return np.stack([neighbor_agreement(*made), neighborhood_standout(*made)])


def _score(indicators: NDArray[np.float64]) -> float:
    agreement, standout = indicators.mean(axis=1).tolist()
    return float(agreement**2 * max(standout, 0.0))
