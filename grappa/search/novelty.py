"""How far images lie from others: outliers of a collection, and the drift of new images away from what was learned."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LEARNED_SHARE = 0.99
MIN_DISTANCE = 1e-6  # copies have the distance 0: a ratio to it would be infinite
NORMAL = 1.959964  # of a 95 % interval
MUCH_DRIFT = 0.10  # see Drift.worth_adapting


def outlier_ratios(neighbors: NDArray[np.int64], distances: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return how much farther each image lies from its neighbours than they lie from theirs, (N,) float32.

    neighbors: (N, K) int64 rows. distances: (N, K) float32, 1 - cosine. About 1 for an image like others, whether its
    surroundings are dense or sparse; 2 for one that lies apart twice as far. It is the mean distance of an image over
    the mean of these means of its neighbours: the local outlier factor (Breunig et al., SIGMOD 2000) in the simplified
    form of Schubert et al. (DAMI 2014), with mean distances in place of that to the K-th neighbour.
    """
    means = np.maximum(distances.mean(axis=1, dtype=np.float64), MIN_DISTANCE)
    ratios: NDArray[np.float32] = (means / means[neighbors].mean(axis=1)).astype(np.float32)
    return ratios


@dataclass(frozen=True)
class Drift:
    """How many of ``num_images`` new images lie farther from what was learned than 99 % of the learned images.

    limit: the distance (1 - cosine) that 99 % of the learned images do not exceed. low, high: the 95 % interval
    (Wilson) of the share. Images like the learned ones have a share of 0.01.
    """

    num_images: int
    num_far: int
    limit: float
    low: float
    high: float

    @property
    def share(self) -> float:
        """The share of new images beyond the limit, 0 to 1."""
        return self.num_far / self.num_images

    @property
    def worth_adapting(self) -> bool:
        """Whether so many are far that adapting again with them is worth a try: certainly more than a tenth.

        Measured on six domains of photographs (ViT-Tiny at 128 px): images of unseen classes of known domains had
        shares of 0.002 to 0.06, those of a domain that was left out 0.14 to 0.995.
        """
        return self.low > MUCH_DRIFT

    def to_json(self) -> dict[str, float]:
        """Return the numbers, for a file."""
        return {
            "num_images": self.num_images,
            "num_far": self.num_far,
            "limit": self.limit,
            "low": self.low,
            "high": self.high,
        }


def drift(distances: NDArray[np.float32], learned: NDArray[np.float32]) -> Drift:
    """Compare new images with learned ones by the distance (1 - cosine) to the nearest learned image.

    distances: (n,) of the new images. learned: (m,) of the learned images, each to the nearest *other* one, so that
    both are measured alike (the distance to a centroid would not be: an image pulls its own centroid to itself).
    ValueError where either is empty.
    """
    if not len(distances) or not len(learned):
        raise ValueError(f"found {len(distances)} new and {len(learned)} learned images; give at least one of each")
    limit = float(np.quantile(learned.astype(np.float64), LEARNED_SHARE, method="higher"))
    num_far = int((distances > limit).sum())
    low, high = wilson_interval(num_far, len(distances))
    return Drift(len(distances), num_far, limit, low, high)


def wilson_interval(num_hits: int, number: int) -> tuple[float, float]:
    """Return the 95 % interval of a share by Wilson's score (1927)."""
    share, spread = num_hits / number, NORMAL**2 / number
    middle = (share + spread / 2) / (1 + spread)
    half = NORMAL / (1 + spread) * math.sqrt(share * (1 - share) / number + spread / (4 * number))
    return max(0.0, middle - half), min(1.0, middle + half)
