"""The closed-set protocol of fine-grained retrieval: queries and gallery are further images of known classes."""

from __future__ import annotations

import pandas as pd

from grappa.core.randomness import id_numbers, key, shuffled
from grappa.images.table import ImageTableError


def closed_set(listing: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Split the labelled train images of a listing anew: half of each class, drawn at random, become test images.

    A class is a (domain, label) pair; of an odd number of images the larger half is learned from, of a single one
    nothing is tested. The draw belongs to (seed, domain, path). Given test images, the open-set protocol's, are left
    out; unlabelled train images stay train.

    Args:
        listing: what ``grappa.images.table.list_images`` gave; ``attrs`` are kept.

    Raises:
        ImageTableError: no class has two labelled train images.
    """
    kept = listing[listing["split"] != "test"].reset_index(drop=True)
    kept.attrs = listing.attrs
    split = pd.Series("train", index=kept.index, dtype=object)
    for _, rows in kept[kept["label"].notna()].groupby(["domain", "label"], sort=True):
        ids = id_numbers([f"{domain}/{path}" for domain, path in zip(rows["domain"], rows["path"], strict=True)])
        order = shuffled(key(seed, "closed set"), ids)
        split[rows.index[order[: len(rows) // 2]]] = "test"
    if not (split == "test").any():
        raise ImageTableError(
            "images.protocol is closed_set, but no class has two labelled train images; give labels "
            "(DOMAIN/CLASS/file, or a table with the column `label`), or set images.protocol=as_given"
        )
    kept["split"] = split
    return kept
