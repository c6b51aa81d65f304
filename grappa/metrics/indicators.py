"""Label-free indicators of retrieval quality.

``reciprocity`` tells how often two images choose each other as neighbours; ``neighborhood_standout`` how far an image's
neighbours stand out for another view of it, among all images or among those of its own domain; ``neighbor_agreement``
how many of them the view has too. Heads are chosen by these two, the deployed model by the former.

Where neighbourhoods agree, most of an image's K nearest neighbours have the image among their K nearest; hubs, images
that are near to everything, break this. The indicator needs no label, so it can rank configurations where no image has
one. That it ranks them well is an observation, not a law: RESULTS.md, "Choosing without labels", names the data. It
compares spaces of one kind, and says nothing about how images lie within a class.

Shapes: N or m images, D width, K neighbours.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from grappa.core.names import MEAN
from grappa.search.neighbors import nearest_neighbors

NUM_NEIGHBORS = 10
BLOCK_ROWS = 65536
STANDOUT_ROWS, MIN_DEVIATION = 1024, 1e-9
IMAGES_PER_STANDING, MIN_STANDING = 40, 3
MIN_OF_DOMAIN, SMALL = 20, -1  # images of a domain whose mean and deviation are taken; the number of a smaller domain


def reciprocity(
    embeddings: NDArray[np.float32],
    *,
    num_neighbors: int = NUM_NEIGHBORS,
    rows: NDArray[np.int64] | None = None,
    device: str = "cpu",
) -> NDArray[np.float64]:
    """Return for rows of embeddings (N, D), L2-normalised, the share of their K neighbours that have them as a
    neighbour.

    ``rows`` (n,), by default all: of whom it is told; neighbours are sought among all N, for these rows and their
    neighbours only. Returns (n,) in [0, 1]. With fewer than K + 1 rows all other rows are neighbours, and every share
    is 1; NaN for a lone row.
    """
    own = np.arange(len(embeddings))
    asked = own if rows is None else rows
    number = min(num_neighbors, len(own) - 1)
    if number < 1 or not len(asked):
        return np.full(len(asked), np.nan)

    def neighbors_of(chosen: NDArray[np.int64]) -> NDArray[np.int64]:
        return nearest_neighbors(
            embeddings[chosen], embeddings, num_neighbors=number, query_ids=chosen, candidate_ids=own, device=device
        )[0]

    if rows is None:
        known, theirs = own, neighbors_of(own)
        mine = theirs
    else:
        mine = neighbors_of(asked)
        known = np.unique(mine)
        theirs = neighbors_of(known)
    shares = np.empty(len(asked))
    for start in range(0, len(asked), BLOCK_ROWS):
        part = slice(start, start + BLOCK_ROWS)
        back = theirs[np.searchsorted(known, mine[part])]
        shares[part] = (back == asked[part, None, None]).any(axis=2).mean(axis=1)
    return shares


def reciprocity_table(
    embeddings: NDArray[np.float32],
    domains: NDArray[np.object_],
    *,
    gallery: str,
    num_neighbors: int = NUM_NEIGHBORS,
    rows: NDArray[np.int64] | None = None,
    device: str = "cpu",
) -> pd.DataFrame:
    """Return the mean reciprocity of each domain's images: domain, reciprocity; ``_mean`` over domains last.

    domains (N,); ``gallery`` as in ``grappa.metrics.retrieval``: neighbours of the image's own domain ("domain") or of
    all ("merged"). ``rows`` (n,), ascending: the images over which the mean is, by default all.
    """
    names = sorted(set(domains))
    chosen = np.ones(len(domains), dtype=bool) if rows is None else np.isin(np.arange(len(domains)), rows)
    means = []
    merged = _shares(embeddings, chosen, num_neighbors, device) if gallery == "merged" else np.empty(0)
    for name in names:
        own = domains == name
        found = merged[own[chosen]] if len(merged) else _shares(embeddings[own], chosen[own], num_neighbors, device)
        means.append(float(found.mean()) if len(found) else np.nan)
    return pd.DataFrame({"domain": [*names, MEAN], "reciprocity": [*means, float(np.nanmean(means))]})


def _shares(
    embeddings: NDArray[np.float32], chosen: NDArray[np.bool_], num_neighbors: int, device: str
) -> NDArray[np.float64]:
    rows = None if chosen.all() else np.flatnonzero(chosen)
    return reciprocity(embeddings, num_neighbors=num_neighbors, rows=rows, device=device)


def neighborhood_standout(
    embeddings: NDArray[np.float32],
    views: NDArray[np.float32],
    *,
    rows: NDArray[np.int64] | None = None,
    domains: NDArray[np.object_] | None = None,
    num_neighbors: int | None = None,
) -> NDArray[np.float64]:
    """Return for images how far their neighbours stand out for another view of them, in standard deviations: (n,).

    embeddings (m, D): images, L2-normalised; views (n, D): of ``rows`` (n,), by default of all, one augmented view
    each, likewise. Of an image's similarities to all other images, those of its view are taken: the mean over the K
    nearest of the *image*, minus the mean over all, over the standard deviation over all. What holds the neighbourhood
    together must so survive a change of crop and colours; a space in which an image is only near itself scores low, and
    so does one with hubs.

    K is a 40th of the images (at least 3), so that the same collection gives the same picture whatever the size of the
    sample; it is at most a third of the other images. ValueError for fewer than 4 images or shapes that do not fit.

    A space that tells domains apart lets neighbours stand out, which helps nobody who searches within a domain. With
    ``domains`` (m,) the neighbours are the same, but the mean and the deviation are those over the other images of the
    image's own domain; over all where the domain has fewer than ``MIN_OF_DOMAIN`` images.
    """
    judged = np.arange(len(embeddings)) if rows is None else rows
    if len(judged) != len(views):
        raise ValueError(f"found {len(views)} views of {len(judged)} images; expected one of each")
    nearest = _num_compared(embeddings, views, num_neighbors)
    codes = np.zeros(len(embeddings), dtype=np.int64) if domains is None else _codes(domains)
    found = np.empty(len(views))
    for start in range(0, len(views), STANDOUT_ROWS):
        part = slice(start, start + STANDOUT_ROWS)
        own, seen = (each @ embeddings.T for each in (embeddings[judged[part]], views[part]))
        own[np.arange(len(own)), judged[part]] = -np.inf
        around = np.argpartition(-own, nearest, axis=1)[:, :nearest]
        near = np.take_along_axis(seen, around, axis=1).mean(axis=1, dtype=np.float64)
        seen[np.arange(len(seen)), judged[part]] = np.nan
        own_code = codes[judged[part], None]
        seen[(own_code != codes) & (own_code != SMALL)] = np.nan
        deviation = np.nanstd(seen, axis=1, dtype=np.float64)
        found[part] = (near - np.nanmean(seen, axis=1, dtype=np.float64)) / np.maximum(deviation, MIN_DEVIATION)
    return found


def _codes(domains: NDArray[np.object_]) -> NDArray[np.int64]:
    """Return a number for each image's domain, (m,): ``SMALL`` for those of few images."""
    codes = pd.factorize(domains)[0].astype(np.int64)
    return np.where(np.bincount(codes)[codes] < MIN_OF_DOMAIN, SMALL, codes)


def neighbor_agreement(
    embeddings: NDArray[np.float32], views: NDArray[np.float32], *, num_neighbors: int | None = None
) -> NDArray[np.float64]:
    """Return for each image the share of its K nearest images that its view has among its own K nearest: (m,), 0 to 1.

    Arguments, K and errors are those of :func:`neighborhood_standout`, with a view of every image; the image itself is
    in neither list.
    """
    if embeddings.shape != views.shape:
        raise ValueError(f"embeddings have shape {embeddings.shape} and views {views.shape}; expected the same")
    number, nearest = len(embeddings), _num_compared(embeddings, views, num_neighbors)
    found = np.empty(number)
    for start in range(0, number, STANDOUT_ROWS):
        rows = np.arange(start, min(start + STANDOUT_ROWS, number))
        lists = []
        for each in (embeddings, views):
            similarity = each[rows] @ embeddings.T
            similarity[np.arange(len(rows)), rows] = -np.inf
            lists.append(np.argpartition(-similarity, nearest, axis=1)[:, :nearest])
        found[rows] = (lists[0][:, :, None] == lists[1][:, None, :]).any(axis=2).mean(axis=1)
    return found


def _num_compared(embeddings: NDArray[np.float32], views: NDArray[np.float32], wanted: int | None) -> int:
    number = len(embeddings)
    if number < 4 or embeddings.shape[1] != views.shape[1]:
        raise ValueError(
            f"embeddings have shape {embeddings.shape} and views {views.shape}; expected one width and at least 4 rows"
        )
    default = max(MIN_STANDING, round(number / IMAGES_PER_STANDING))
    return min(default if wanted is None else wanted, (number - 1) // 3)
