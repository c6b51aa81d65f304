"""Tables that help to keep a collection clean: near-duplicates, outliers, a balanced sample. ``Run`` gives them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from grappa.core.randomness import id_numbers
from grappa.search.sampling import balanced_order

if TYPE_CHECKING:
    from numpy.typing import NDArray

PLACE = ("domain", "path")
PAIR_COLUMNS = ("image_id", "other_id", "similarity", "exact", "group")


def different_rows(images: pd.DataFrame) -> NDArray[np.int64]:
    """Return the rows of images that are no copy of another image of the table, (n,) int64."""
    return np.flatnonzero(~images["duplicate_of"].isin(images.index).to_numpy()).astype(np.int64)


def duplicate_pairs(
    images: pd.DataFrame,
    embeddings: NDArray[np.float32],
    threshold: float,
    *,
    progress: Callable[[int], None] | None = None,
) -> pd.DataFrame:
    """Return the pairs of copies and near-duplicates; see ``Run.duplicates``.

    images: index image_id, with domain, path and duplicate_of. embeddings: (N, D), L2-normalised, its rows.
    ``progress`` is called with the number of ``different_rows`` newly compared.
    """
    from grappa.search.duplicates import groups, near_duplicates

    ids, originals, different = images.index.to_numpy(dtype=object), images["duplicate_of"], different_rows(images)
    pairs = near_duplicates(np.asarray(embeddings[different]), threshold=threshold, progress=progress)
    copies = np.setdiff1d(np.arange(len(ids)), different)
    first = np.concatenate([images.index.get_indexer(pd.Index(originals.iloc[copies])), different[pairs.first]])
    second = np.concatenate([copies, different[pairs.second]])
    table = pd.DataFrame({"image_id": ids[second], "other_id": ids[first]})
    table["similarity"] = np.concatenate([np.ones(len(copies), np.float32), pairs.similarities])
    table["exact"] = np.arange(len(table)) < len(copies)
    table["group"] = np.unique(groups(first, second, len(ids))[first], return_inverse=True)[1].astype(np.int64)
    for column in PLACE:
        values = images[column].to_numpy(dtype=object)
        table[column], table[f"other_{column}"] = values[second], values[first]
    return table


def sampled(images: pd.DataFrame, partitions: Sequence[NDArray[np.int64]], number: int, *, seed: int) -> pd.DataFrame:
    """Return ``number`` rows of ``images`` spread over the partitions (coarse first); copies are left out.

    ValueError where there are fewer different images.
    """
    different = different_rows(images)
    if not 1 <= number <= len(different):
        copies = len(images) - len(different)
        rest = f" (and {copies} {'copy' if copies == 1 else 'copies'})" if copies else ""
        raise ValueError(
            f"n is {number}, but there are {len(different)} different images{rest}; give 1 to {len(different)}"
        )
    ids = id_numbers(images.index[different].tolist())
    order = balanced_order([labels[different] for labels in partitions], ids, seed=seed)
    return images.iloc[different[order[:number]]]
