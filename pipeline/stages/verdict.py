"""Stage ``verdict``: whether adaptation helped, told without labels, and the model that ``model.source: auto`` deploys.

``verdict.json`` holds the verdict in a word, the evidence in two sentences, and each model's indicator with its
difference to the frozen backbone. The rule is in ``grappa.metrics.verdict``. Test images are judged where there is a
split, and otherwise train images, behind heads that were fitted on other regions of the collection. No label is read.
"""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
from numpy.typing import NDArray

from grappa.core.randomness import id_numbers
from grappa.images.splits import test_rows, train_rows
from grappa.method.head import apply_head, fit_whitened_neighborhood_head
from grappa.method.head_choice import DEFAULT_WEIGHT, region_halves
from grappa.metrics.indicators import neighborhood_standout
from grappa.metrics.verdict import Verdict, judge
from grappa.pipeline.engine.context import StageContext
from grappa.pipeline.graph.models import candidate_models
from grappa.pipeline.graph.stages import views_node
from grappa.pipeline.opening import read_images, settle_device
from grappa.search.kmeans import count_distinct

Fold = tuple[NDArray[np.int64], NDArray[np.int64]]  # the rows on which heads are fitted, and the rows that are judged
COSTLY = ("mean", "fused")  # all sets at every image; every other model costs one set or none


def run(context: StageContext) -> str:
    images = read_images(context.input("images"))
    ids, device = id_numbers(images["image_id"].tolist()), str(settle_device(context))
    train, (tested, transductive) = train_rows(images), test_rows(images)
    viewed = np.load(context.input("frozen_views") / "rows.npy", allow_pickle=False)
    where = "train" if transductive else "test"
    folds = _folds(context, ids, train, viewed) if transductive else [(train, np.intersect1d(viewed, tested))]
    models = candidate_models(context.config)
    if min(len(judged) for _, judged in folds) < 4 or min(len(fitted) for fitted, _ in folds) < 4:
        return _write(context, Verdict("too few images", models[0], sum(len(judged) for _, judged in folds), ()), where)
    with context.task("judging", len(models), unit="models") as advance:
        standouts = {}
        for model in models:
            standouts[model] = _standout(context, model, folds, ids, viewed, device)
            advance(1)
    singles = [model for model in models[1:] if model not in ("student", *COSTLY)]
    verdict = judge(standouts, by_cost=["student", *singles, *COSTLY], seed=context.config.views.seed)
    return _write(context, verdict, where)


def _folds(
    context: StageContext, ids: NDArray[np.uint64], train: NDArray[np.int64], viewed: NDArray[np.int64]
) -> list[Fold]:
    """Return two folds of the train rows, by regions of the frozen embeddings: equal for all models."""
    frozen = np.asarray(_embeddings(context, "zero_shot")[train])
    if len(train) < 8 or count_distinct(frozen, 8) < 8:
        return [(train, np.empty(0, dtype=np.int64))]
    half = region_halves(frozen, ids[train], seed=context.config.views.seed)
    return [(train[~part], np.intersect1d(viewed, train[part])) for part in (half, ~half)]


def _standout(
    context: StageContext,
    model: str,
    folds: list[Fold],
    ids: NDArray[np.uint64],
    viewed: NDArray[np.int64],
    device: str,
) -> NDArray[np.float64]:
    embeddings = _embeddings(context, model)
    seen_by = views_node(model)
    views = np.load(context.input(seen_by.stage, seen_by.instance) / "views.npy", allow_pickle=False)
    parts = []
    for fitted, judged in folds:
        head = fit_whitened_neighborhood_head(
            embeddings[fitted], ids[fitted], neighborhood_weight=DEFAULT_WEIGHT, device=device
        )
        seen = views[np.searchsorted(viewed, judged)]
        made = (apply_head(head, each, device=device) for each in (embeddings[judged], seen))
        parts.append(neighborhood_standout(*made))
    return np.concatenate(parts)


def _embeddings(context: StageContext, model: str) -> NDArray[np.float32]:
    mapped: NDArray[np.float32] = np.load(
        context.input("embeddings", model) / "embeddings.npy", mmap_mode="r", allow_pickle=False
    )
    return mapped


def _write(context: StageContext, verdict: Verdict, judged: str) -> str:
    evidence = _evidence(verdict, judged)
    record = {
        "verdict": verdict.word,
        "evidence": evidence,
        "choice": verdict.choice,
        "images": judged,
        "num_images": verdict.num_images,
        "models": [asdict(each) for each in verdict.models],
    }
    (context.path / "verdict.json").write_text(json.dumps(record, indent=2) + "\n")
    return f"{verdict.word}: {evidence}"


def _evidence(verdict: Verdict, judged: str) -> str:
    """Return two sentences: what was measured, and what follows."""
    last = f"The choice is {verdict.choice}."
    if verdict.word == "too few images":
        return f"Only {verdict.num_images} images could be judged, too few to tell a gain from chance. {last}"
    frozen, best = verdict.models[0], max(verdict.models[1:], key=lambda each: each.indicator)
    share, low, high = (value / abs(frozen.indicator) for value in (best.difference, best.low, best.high))
    where = f"on {verdict.num_images:,} {judged} images, without labels"
    return (
        f"The neighbours of an image stand out {share:+.1%} [{low:+.1%}, {high:+.1%}] against the frozen backbone with "
        f"{best.model}, the best adapted model ({where}). {last}"
    )
