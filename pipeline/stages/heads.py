"""Stage ``heads``: an embedding head for each model, fitted without labels on the train rows, applied to all rows; and
stage ``whitening``, which does the same with the features in which clusters and neighbours are sought.

``embeddings.npy`` (N, D) float32, L2-normalised, holds the final embeddings of the model, which are evaluated and
searched. ``head.json`` describes the fitted head. Where its weight is chosen (``heads.kind: auto``), that is done on
the frozen backbone's embeddings, once for all models: ``heads/zero_shot/choice.json`` holds the weights that were tried
and their scores. The equations are in ``grappa.method.head``, the choice is in ``grappa.method.head_choice``; both are
ours, not the paper's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from safetensors.torch import save_file

from grappa.core.memory import FLOAT, WORK
from grappa.core.vectors import read_rows
from grappa.images.splits import train_rows_by_id
from grappa.method.head import (
    MIN_WHITENED_SHARE,
    Head,
    IdentityHead,
    NeighborhoodHead,
    WhitenedNeighborhoodHead,
    apply_head,
    automatic_most,
    automatic_num_centroids,
    fit_neighborhood_head,
    fit_whitened_neighborhood_head,
    fit_whitening_head,
    memory_needed,
)
from grappa.method.head_choice import Fit, choose_weight
from grappa.method.whitening_choice import choose_power, fit_power
from grappa.pipeline.engine.context import StageContext
from grappa.pipeline.graph.models import CHOOSING_MODEL
from grappa.pipeline.opening import read_images, settle_device
from grappa.pipeline.stages.features import new_array
from grappa.search.assignment import Progress
from grappa.search.kmeans import count_distinct, num_assignments

CHOICE_FILE = "choice.json"


def run(context: StageContext) -> str:
    file = context.input("embeddings", context.instance) / "embeddings.npy"
    images, device = read_images(context.input("images")), str(settle_device(context))
    head = _fit(context, file, images, device)
    _write_head(context, head)
    number = _apply(context, head, file, "embeddings.npy", device)
    return f"{number} embeddings, {_described(head.form())}"


def run_on_features(context: StageContext) -> str:
    """Run the stage ``whitening``: the features in which clusters and neighbours are sought, (N, D) float32, and the
    head that makes them, for further images.

    A few directions that all images share can hold most of the variance of a backbone's features; in the raw ones they
    decide which images are near. Features of fewer than four different train images are passed on unchanged.
    """
    rows, ids = train_rows_by_id(read_images(context.input("images")))
    device, power = str(settle_device(context)), context.config.features.whitening_power
    power = _choose_power(context, ids, rows) if power == "auto" else power
    file = context.input(str(context.instance)) / "features.npy"
    head = fit_power(_train(context, file, rows), ids, power)
    _write_head(context, head)
    number = _apply(context, head, file, "features.npy", device)
    return f"{number} features, {_described(head.form())} with power {power:g}"


def _train(context: StageContext, file: Path, rows: NDArray[np.int64], num_centroids: int = 0) -> NDArray[np.float32]:
    """Return the train rows of a file of vectors, where there is memory for what is fitted on them: whitening, and a
    neighbourhood's head where it has centroids. All vectors stay in the file.
    """
    width = np.load(file, mmap_mode="r", allow_pickle=False).shape[1]
    alone = len(rows) * width * FLOAT + WORK
    context.need_memory(memory_needed(0, len(rows), width, num_centroids) if num_centroids else alone)
    return read_rows(file, rows)


def _apply(context: StageContext, head: Head, file: Path, name: str, device: str) -> int:
    """Write what a head makes of the vectors of a file, and return their number."""
    vectors = np.load(file, mmap_mode="r", allow_pickle=False)
    out = new_array(context.path / name, vectors.shape)
    apply_head(head, vectors, device=device, out=out)
    out.flush()
    return len(vectors)


def _choose_power(context: StageContext, ids: NDArray[np.uint64], rows: NDArray[np.int64]) -> float:
    places, views = _train_views(context, rows)
    choice = choose_power(_train(context, context.input("features") / "features.npy", rows), ids, places, views)
    _write_choice(context, choice.power, choice.scores)
    return choice.power


def _train_views(context: StageContext, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return which of the train rows have a view, as places among ``rows``, and their views through the backbone."""
    folder = context.input("frozen_views")
    views, viewed = (np.load(folder / name, allow_pickle=False) for name in ("views.npy", "rows.npy"))
    learned, order = np.isin(viewed, rows), np.argsort(rows)
    return order[np.searchsorted(rows, viewed[learned], sorter=order)], views[learned]


def _write_head(context: StageContext, head: Head) -> None:
    form = head.form()
    save_file(head.state_dict(), context.path / "head.safetensors", {"head": json.dumps(form, sort_keys=True)})
    (context.path / "head.json").write_text(json.dumps(form, indent=2) + "\n")


def _fit(context: StageContext, file: Path, images: pd.DataFrame, device: str) -> Head:
    settings, (rows, ids) = context.config.heads, train_rows_by_id(images)
    if settings.kind == "none":
        return IdentityHead()
    alone = settings.kind == "whitening" or (settings.kind == "auto" and len(rows) == len(images))
    most = automatic_most(len(rows)) if settings.num_centroids == "auto" else settings.num_centroids
    train = _train(context, file, rows, 0 if alone else most)
    if settings.kind == "auto":
        return _fit_all(context, train, ids) if alone else _fit_chosen(context, train, ids, rows)
    if settings.kind == "whitening":
        return fit_whitening_head(train, ids, power=settings.deviation_power)
    return _fit_neighborhood(context, train, ids, device)


def _fit_all(context: StageContext, train: NDArray[np.float32], ids: NDArray[np.uint64]) -> Head:
    """Return the head of a run without a test split, where the images that it is fitted on are searched: whitening.

    A neighbourhood's head serves images that it was not fitted on. Among those that it was, each has a centroid beside
    it, which takes away what it has in common with its class.
    """
    _write_choice(context, None, {})
    if count_distinct(train, 4) < 4:
        return IdentityHead()
    power = context.config.heads.deviation_power
    return fit_whitening_head(train, ids, power=power, min_share=MIN_WHITENED_SHARE)


def _fit_chosen(
    context: StageContext, train: NDArray[np.float32], ids: NDArray[np.uint64], rows: NDArray[np.int64]
) -> Head:
    """Return a neighbourhood's head whose weight was chosen by views of train images."""
    settings, device = context.config.heads, str(settle_device(context))
    if count_distinct(train, 4) < 4:
        _write_choice(context, None, {})
        return IdentityHead()
    centroids = settings.num_centroids
    number = automatic_num_centroids(train) if centroids == "auto" else centroids

    def fit(
        points: NDArray[np.float32], point_ids: NDArray[np.uint64], progress: Progress | None = None
    ) -> WhitenedNeighborhoodHead:
        return fit_whitened_neighborhood_head(
            points,
            point_ids,
            whitening_power=settings.deviation_power,
            num_centroids=None if centroids == "auto" else min(centroids, len(points) // 2),
            perplexity=settings.perplexity,
            deviation_power=settings.deviation_power,
            num_iterations=settings.num_iterations,
            seed=settings.seed,
            device=device,
            progress=progress,
        )

    weight = _choose(context, train, ids, rows, fit) if context.instance == CHOOSING_MODEL else _chosen(context)
    total = num_assignments(len(ids), [number], settings.num_iterations)
    with context.task("clustering", total, unit="assignments") as advance:
        return fit(train, ids, advance).with_weight(weight)


def _choose(
    context: StageContext, train: NDArray[np.float32], ids: NDArray[np.uint64], rows: NDArray[np.int64], fit: Fit
) -> float:
    places, views = _train_views(context, rows)
    choice = choose_weight(train, ids, places, views, fit, seed=context.config.heads.seed)
    _write_choice(context, choice.weight, choice.scores)
    return choice.weight


def _write_choice(context: StageContext, weight: float | None, scores: Mapping[float, float]) -> None:
    if context.instance in (CHOOSING_MODEL, "features"):
        record = {"chosen": weight, "score": {f"{each:g}": score for each, score in scores.items()}}
        (context.path / CHOICE_FILE).write_text(json.dumps(record, indent=2) + "\n")


def _chosen(context: StageContext) -> float:
    return float(json.loads((context.input("heads", CHOOSING_MODEL) / CHOICE_FILE).read_text())["chosen"])


def _fit_neighborhood(
    context: StageContext, embeddings: NDArray[np.float32], ids: NDArray[np.uint64], device: str
) -> NeighborhoodHead:
    settings = context.config.heads
    number = settings.num_centroids
    number = automatic_num_centroids(embeddings) if number == "auto" else number
    total = num_assignments(len(ids), [number], settings.num_iterations)
    with context.task("clustering", total, unit="assignments") as advance:
        return fit_neighborhood_head(
            embeddings,
            ids,
            num_centroids=number,
            perplexity=settings.perplexity,
            deviation_power=settings.deviation_power,
            neighborhood_weight=settings.neighborhood_weight,
            num_iterations=settings.num_iterations,
            seed=settings.seed,
            device=device,
            progress=advance,
        )


def _described(form: dict[str, Any]) -> str:
    if form["kind"] not in ("neighborhood", "whitened_neighborhood"):
        return {"none": "unchanged", "whitening": "whitened"}[form["kind"]]
    number, temperature, perplexity = form["num_centroids"], form["temperature"], form["perplexity"]
    near = f"{number} centroids at temperature {temperature:.4g}, of which {perplexity:.3g} are near an image"
    return f"{near}, at weight {form['neighborhood_weight']:g}"
