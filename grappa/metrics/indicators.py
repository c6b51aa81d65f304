"""A label-free indicator of retrieval quality: how often two images choose each other as neighbours.

Where neighbourhoods agree, most of an image's K nearest have it among their own K nearest; hubs, images near to
everything, break this. It needs no label, so it can rank configurations where no image has one. That it does is an
observation, not a law: README "Choosing without labels" says on what. It compares spaces of like kind and says nothing
of how images lie within a class.

Shapes: N images, D width, K neighbours.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from grappa.search.neighbors import nearest_neighbors

NUM_NEIGHBORS = 10
BLOCK_ROWS = 65536
MEAN_DOMAIN = "_mean"


def reciprocity(embeddings: NDArray[np.float32], *, num_neighbors: int = NUM_NEIGHBORS) -> NDArray[np.float64]:
    """Return for each row of embeddings (N, D), L2-normalised, the share of its K nearest that have it among theirs.

    (N,) in [0, 1]. Fewer than K + 1 rows: all the others are neighbours, and everything is mutual; NaN for a lone row.
    """
    own = np.arange(len(embeddings))
    number = min(num_neighbors, len(own) - 1)
    if number < 1:
        return np.full(len(own), np.nan)
    neighbors, _ = nearest_neighbors(embeddings, embeddings, num_neighbors=number, query_ids=own, candidate_ids=own)
    shares = np.empty(len(own))
    for start in range(0, len(own), BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        shares[rows] = (neighbors[neighbors[rows]] == own[rows, None, None]).any(axis=2).mean(axis=1)
    return shares


def reciprocity_table(
    embeddings: NDArray[np.float32], domains: NDArray[np.object_], *, gallery: str, num_neighbors: int = NUM_NEIGHBORS
) -> pd.DataFrame:
    """Return the mean reciprocity of each domain's images: domain, reciprocity; ``_mean`` over domains last.

    domains (N,); ``gallery`` as in ``grappa.metrics.retrieval``: neighbours of the image's own domain ("domain") or of
    all ("merged").
    """
    names = sorted(set(domains))
    if gallery == "merged":
        shares = reciprocity(embeddings, num_neighbors=num_neighbors)
        means = [float(shares[domains == name].mean()) for name in names]
    else:
        means = [float(reciprocity(embeddings[domains == name], num_neighbors=num_neighbors).mean()) for name in names]
    return pd.DataFrame({"domain": [*names, MEAN_DOMAIN], "reciprocity": [*means, float(np.nanmean(means))]})
