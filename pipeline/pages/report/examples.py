"""Examples of a report: test queries with their nearest images, before and after adaptation, right and wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from grappa.core.randomness import id_numbers, key, shuffled
from grappa.images.splits import test_rows
from grappa.pipeline.graph.node import Node
from grappa.pipeline.open_run import open_run
from grappa.pipeline.pages.explore.collection import Space
from grappa.pipeline.pages.report.pictures import Shown
from grappa.pipeline.store.artifacts import RunFolder, published

NUM_NEAREST = 8
MAX_QUERIES = 12
MAX_BY_DOMAIN = 3


@dataclass(frozen=True)
class Ranking:
    """The images nearest to a query by a model, and the average precision where it is known."""

    model: str
    average_precision: float | None
    nearest: list[Shown]

    @property
    def score(self) -> str:
        """How many of the nearest images are of the query's class, such as ``5 of 8 right``; "" without labels."""
        known = [each.right for each in self.nearest if each.right is not None]
        return f"{sum(known)} of {len(known)} right" if known else ""


@dataclass(frozen=True)
class Example:
    """A query, why it is shown, and its rankings."""

    why: str
    query: Shown
    rankings: list[Ranking]


def load_examples(
    run: RunFolder, models: Mapping[str, Node], per_query: pd.DataFrame, *, seed: int = 0
) -> list[Example]:
    """Return the examples of a run: for each domain a query drawn at random, then, with labels, two more queries.

    These two have the largest gain and the largest loss of average precision from the first to the second of
    ``models``; without labels further ones are drawn. ``models`` maps a model to the node of its embeddings. The
    gallery is merged: all test images except the query.
    """
    images = open_run(run.root).assignments()
    rows, _ = test_rows(images)
    tested = images.iloc[rows].reset_index()
    precision = _precision(tested, list(models), per_query)
    chosen = [(why, int(rows[place])) for why, place in choose(tested, precision, seed=seed)]
    allowed = np.zeros(len(images), dtype=bool)
    allowed[rows] = True
    spaces = [_space(run, model, node) for model, node in models.items()]
    known = precision.set_axis(rows, axis=0)
    return [_example(images, spaces, known, allowed, why, row) for why, row in chosen]


def choose(table: pd.DataFrame, precision: pd.DataFrame, *, seed: int = 0) -> list[tuple[str, int]]:
    """Return (reason, position in ``table``) of at most ``MAX_QUERIES`` queries to show, by domain, none twice.

    Every domain gets its first query before one gets a second; with more domains than queries, the last ones by name
    have none.
    ``precision``: the average precision of the images by model, in the order of ``table``; NaN without a label.
    """
    order = np.asarray(shuffled(key(seed, "report"), id_numbers(table["image_id"].tolist())))
    scored = precision.notna().all(axis=1).to_numpy() if len(precision.columns) else np.zeros(len(table), dtype=bool)
    gain = (precision.iloc[:, -1] - precision.iloc[:, 0]).to_numpy() if len(precision.columns) > 1 else None
    domains, found = table["domain"].to_numpy(dtype=object)[order], []
    for domain in sorted(set(domains))[:MAX_QUERIES]:
        picks = _picks(order[domains == domain], scored, gain)
        found += [(number, domain, pick) for number, pick in enumerate(picks)]
    first = sorted(found, key=lambda each: each[:2])[:MAX_QUERIES]
    return [pick for _, _, pick in sorted(first, key=lambda each: (each[1], each[0]))]


def _picks(own: NDArray[np.int64], scored: NDArray[np.bool_], gain: NDArray[Any] | None) -> list[tuple[str, int]]:
    """Return (reason, position) of the queries of a domain, the most wanted first; own (n,): its images, shuffled."""
    known = own[scored[own]]
    if not len(known):
        return [("drawn at random", int(place)) for place in own[:MAX_BY_DOMAIN]]
    picks = {int(known[0]): "drawn at random"}
    if gain is not None:
        best, worst = known[gain[known].argmax()], known[gain[known].argmin()]
        if gain[best] > 0:
            picks.setdefault(int(best), "the largest gain")
        if gain[worst] < 0:
            picks.setdefault(int(worst), "the largest loss")
    return [(why, place) for place, why in picks.items()]


def _precision(table: pd.DataFrame, models: list[str], per_query: pd.DataFrame) -> pd.DataFrame:
    """Return the average precision in the merged gallery: rows are the images of ``table``, columns the models."""
    if "average_precision" not in per_query:
        return pd.DataFrame(index=table.index)
    own = per_query[per_query["gallery"] == "merged"]
    wide = own[own["model"].isin(models)].pivot(index="image_id", columns="model", values="average_precision")
    known = [each for each in models if each in wide]
    return wide.reindex(index=table["image_id"], columns=known).reset_index(drop=True)


def _space(run: RunFolder, model: str, node: Node) -> Space:
    file = published(run, node, "embeddings.npy") / "embeddings.npy"
    return Space(model, np.load(file, mmap_mode="r", allow_pickle=False))


def _example(
    images: pd.DataFrame, spaces: list[Space], precision: pd.DataFrame, allowed: NDArray[np.bool_], why: str, row: int
) -> Example:
    rankings: list[Ranking] = []
    others = allowed.copy()
    others[row] = False
    for space in spaces:
        found = space.nearest(np.asarray(space.embeddings[row]), NUM_NEAREST, others)
        before = {each.row for each in rankings[0].nearest} if rankings else None
        nearest = [
            _neighbor(images, int(other), row, float(similarity), before)
            for other, similarity in zip(*found, strict=True)
        ]
        value = float(precision[space.model].loc[row]) if space.model in precision else float("nan")
        rankings.append(Ranking(space.model, None if np.isnan(value) else value, nearest))
    return Example(why, Shown.of(images, row), rankings)


def _neighbor(images: pd.DataFrame, row: int, query: int, similarity: float, before: set[int] | None) -> Shown:
    own, other = images.iloc[row], images.iloc[query]
    known = not pd.isna(own["label"]) and not pd.isna(other["label"])
    right = bool(own["label"] == other["label"] and own["domain"] == other["domain"]) if known else None
    return Shown.of(images, row, similarity=similarity, right=right, new=before is not None and row not in before)
