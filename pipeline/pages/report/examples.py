"""Examples of a report: test queries with their nearest images, before and after, right and wrong."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from grappa.core.randomness import id_numbers, key, shuffled
from grappa.images.splits import test_rows
from grappa.pipeline.graph.models import MODELS
from grappa.pipeline.graph.node import Node
from grappa.pipeline.opening import published_pixels, read_images
from grappa.pipeline.store.artifacts import RunFolder, published

PICTURED = tuple(model.name for model in MODELS if model.pictured)
NUM_NEAREST = 8
MAX_DOMAINS = 12
THUMBNAIL_SIDE = 104
BLOCK_ROWS = 65536


@dataclass(frozen=True)
class Shown:
    """A thumbnail of ``row`` of the image table; ``right``: whether it has the query's class, None where not known."""

    row: int
    domain: str
    label: str
    path: str
    similarity: float | None = None
    right: bool | None = None

    @property
    def file(self) -> str:
        return f"{self.row:07d}.jpg"


@dataclass(frozen=True)
class Ranking:
    """The images nearest to a query by a model, and the average precision where it is known."""

    model: str
    average_precision: float | None
    nearest: list[Shown]


@dataclass(frozen=True)
class Example:
    """A query, why it is shown, and its rankings."""

    why: str
    query: Shown
    rankings: list[Ranking]


def load_examples(
    run: RunFolder, models: Mapping[str, Node], per_query: pd.DataFrame, *, seed: int = 0
) -> list[Example]:
    """Return the examples of a run: for each domain one query drawn at random, and with labels two more queries.

    These two have the largest gain and the largest loss of average precision from the first to the second of
    ``models``. ``models`` maps a model to the node of its embeddings. The gallery is merged: all test images except the
    query.
    """
    images = read_images(published(run, "images", "images.parquet"))
    labels = pd.read_parquet(published(run, "images", "labels.parquet") / "labels.parquet")["label"]
    rows, _ = test_rows(images)
    table = images.iloc[rows].assign(row=rows, label=labels.iloc[rows].to_numpy(dtype=object)).reset_index(drop=True)
    precision = _precision(table, list(models), per_query)
    chosen = choose(table, precision, seed=seed)
    places = [place for _, place in chosen]
    found = {model: _nearest(published(run, source), rows, np.array(places)) for model, source in models.items()}
    return [_example(table, precision, found, why, place, number) for number, (why, place) in enumerate(chosen)]


def choose(table: pd.DataFrame, precision: pd.DataFrame, *, seed: int = 0) -> list[tuple[str, int]]:
    """Return (reason, position in ``table``) of the queries to show, by domain, without repeated images.

    ``precision``: the average precision of the images by model, in the order of ``table``; NaN without a label.
    """
    order = shuffled(key(seed, "report"), id_numbers(table["image_id"].tolist()))
    scored = precision.notna().all(axis=1).to_numpy() if len(precision.columns) else np.zeros(len(table), dtype=bool)
    chosen: list[tuple[str, int]] = []
    for domain in sorted(table["domain"].unique())[:MAX_DOMAINS]:
        own = [int(place) for place in order if table["domain"].iloc[place] == domain]
        known = [place for place in own if scored[place]]
        picks = [("drawn at random", (known or own)[0])]
        if known and len(precision.columns) > 1:
            gain = (precision.iloc[:, 1] - precision.iloc[:, 0]).to_numpy()
            best, worst = known[int(gain[known].argmax())], known[int(gain[known].argmin())]
            picks += [("the largest gain", best)] if gain[best] > 0 else []
            picks += [("the largest loss", worst)] if gain[worst] < 0 else []
        places = [place for _, place in picks]
        chosen += [pick for number, pick in enumerate(picks) if pick[1] not in places[:number]]
    return chosen


def write_thumbnails(run: RunFolder, examples: Sequence[Example], folder: Path) -> None:
    """Write a JPEG of every image that is shown, from the pixel cache."""
    everyone = [shown for each in examples for shown in (each.query, *(x for r in each.rankings for x in r.nearest))]
    cache = published_pixels(run, [shown.row for shown in everyone])
    for row, file in sorted({(shown.row, shown.file) for shown in everyone}):
        image = Image.fromarray(np.array(cache.image(row)))
        image.thumbnail((2 * THUMBNAIL_SIDE, THUMBNAIL_SIDE))
        buffer = io.BytesIO()
        image.save(buffer, format="JPEG", quality=85)
        (folder / file).write_bytes(buffer.getvalue())


def _precision(table: pd.DataFrame, models: Sequence[str], per_query: pd.DataFrame) -> pd.DataFrame:
    """Return the average precision in the merged gallery: rows are the images of ``table``, columns the models."""
    if "average_precision" not in per_query:
        return pd.DataFrame(index=table.index)
    own = per_query[per_query["gallery"] == "merged"]
    wide = own[own["model"].isin(models)].pivot(index="image_id", columns="model", values="average_precision")
    return wide.reindex(index=table["image_id"], columns=[each for each in models if each in wide]).reset_index(
        drop=True
    )


def _nearest(
    folder: Path, rows: NDArray[np.int64], places: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return the nearest images of Q queries: positions in ``rows`` (Q, k) and cosines (Q, k), largest first.

    ``rows``: rows of the image table that are searched; ``places``: the positions of the queries in ``rows``.
    """
    embeddings = np.load(folder / "embeddings.npy", mmap_mode="r", allow_pickle=False)
    queries = np.asarray(embeddings[rows[places]])
    blocks = [np.asarray(embeddings[rows[at : at + BLOCK_ROWS]]) for at in range(0, len(rows), BLOCK_ROWS)]
    similarities = np.concatenate([queries @ block.T for block in blocks], axis=1)
    similarities[np.arange(len(places)), places] = -np.inf
    nearest = np.argsort(-similarities, axis=1, kind="stable")[:, : min(NUM_NEAREST, len(rows) - 1)]
    return nearest, np.take_along_axis(similarities, nearest, axis=1)


def _example(
    table: pd.DataFrame,
    precision: pd.DataFrame,
    found: dict[str, tuple[NDArray[np.int64], NDArray[np.float32]]],
    why: str,
    place: int,
    number: int,
) -> Example:
    rankings = []
    for model, (nearest, similarities) in found.items():
        shown = [
            _shown(table, int(other), place, float(similarity))
            for other, similarity in zip(nearest[number], similarities[number], strict=True)
        ]
        value = float(precision[model].iloc[place]) if model in precision else float("nan")
        rankings.append(Ranking(model, None if np.isnan(value) else value, shown))
    return Example(why, _shown(table, place), rankings)


def _shown(table: pd.DataFrame, place: int, query: int | None = None, similarity: float | None = None) -> Shown:
    line = table.iloc[place]
    right = None
    if query is not None and not pd.isna(line["label"]) and not pd.isna(table["label"].iloc[query]):
        right = bool(line["label"] == table["label"].iloc[query] and line["domain"] == table["domain"].iloc[query])
    label = "" if pd.isna(line["label"]) else str(line["label"]).removeprefix(f"{line['domain']}/")
    return Shown(int(line["row"]), str(line["domain"]), label, str(line["path"]), similarity, right)
