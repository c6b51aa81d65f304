"""Which images are learned from and which are tested: the rows of the image table by its column ``split``."""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from grappa.core.randomness import id_numbers


def train_rows(images: pd.DataFrame) -> NDArray[np.int64]:
    """Return the rows that are learned from: all but the test rows, or all rows where nothing is split."""
    return np.flatnonzero((images["split"] != "test").to_numpy())


def train_rows_by_id(images: pd.DataFrame) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
    """Return the rows that are learned from, (n,), sorted by their images' id numbers, and these, (n,): in this order
    k-means and heads copy no features.
    """
    rows = train_rows(images)
    ids = id_numbers(images["image_id"].iloc[rows].tolist())
    order = np.argsort(ids, kind="stable")
    return rows[order], ids[order]


def test_rows(images: pd.DataFrame) -> tuple[NDArray[np.int64], bool]:
    """Return the rows that are evaluated, and whether they are the train rows too (nothing is split: transductive)."""
    rows = np.flatnonzero((images["split"] == "test").to_numpy())
    return (rows, False) if len(rows) else (np.arange(len(images)), True)


def chosen_rows(images: pd.DataFrame, which: str) -> NDArray[np.int64]:
    """Return the rows that are evaluated ("test"), learned from ("train"), or "all" of them."""
    if which not in ("test", "train", "all"):
        raise ValueError(f"rows is {which!r}; expected test, train or all")
    if which == "train":
        return train_rows(images)
    return test_rows(images)[0] if which == "test" else np.arange(len(images))
