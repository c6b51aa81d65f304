"""Stage ``verdict``: whether adaptation helped, told without labels, and the model that ``model.source: auto`` deploys.

``verdict.json`` holds the verdict in a word, the evidence in two sentences, and each model's indicator with its
difference to the frozen backbone. The rule is in ``grappa.metrics.verdict``. Test images are judged where there is a
split, and otherwise train images, behind heads that were fitted on other regions of the collection: those with a view
through every model, among all that have one through the frozen backbone. No label is read.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import reduce

import numpy as np
from numpy.typing import NDArray

from grappa.core.randomness import id_numbers
from grappa.images.splits import test_rows, train_rows
from grappa.method.head_choice import region_halves, standout_behind_head
from grappa.metrics.verdict import Verdict, judge
from grappa.pipeline.engine.context import StageContext
from grappa.pipeline.graph.models import candidate_models
from grappa.pipeline.graph.stages import views_node
from grappa.pipeline.opening import read_images, settle_device
from grappa.search.kmeans import count_distinct

COSTLY = ("mean", "fused")  # all sets at every image; every other model costs one set or none


@dataclass(frozen=True)
class Fold:
    """Rows of the image table: heads are fitted on one part, and images of another judged among the ``gallery``."""

    fitted: NDArray[np.int64]
    gallery: NDArray[np.int64]
    judged: NDArray[np.int64]


def run(context: StageContext) -> str:
    images = read_images(context.input("images"))
    ids, device = id_numbers(images["image_id"].tolist()), str(settle_device(context))
    train, (tested, transductive) = train_rows(images), test_rows(images)
    models, where = candidate_models(context.config), "train" if transductive else "test"
    drawn, viewed = _viewed(context, models[0]), reduce(np.intersect1d, (_viewed(context, model) for model in models))
    folds = []
    for fitted, others in _parts(context, ids, train) if transductive else [(train, tested)]:
        gallery = np.intersect1d(drawn, others)
        folds.append(Fold(fitted, gallery, np.intersect1d(viewed, gallery)))
    if min(min(len(fold.judged), len(fold.fitted)) for fold in folds) < 4:
        return _write(context, Verdict("too few images", models[0], sum(len(fold.judged) for fold in folds), ()), where)
    with context.task("judging", len(models), unit="models") as advance:
        standouts = {}
        for model in models:
            standouts[model] = _standout(context, model, folds, ids, device)
            advance(1)
    singles = [model for model in models[1:] if model not in ("student", *COSTLY)]
    verdict = judge(standouts, by_cost=["student", *singles, *COSTLY], seed=context.config.views.seed)
    return _write(context, verdict, where)


def _parts(
    context: StageContext, ids: NDArray[np.uint64], train: NDArray[np.int64]
) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Return the train rows cut in two, both ways round, by regions of the frozen embeddings: equal for all models."""
    frozen = np.asarray(_embeddings(context, "zero_shot")[train])
    if len(train) < 8 or count_distinct(frozen, 8) < 8:
        return [(train, np.empty(0, dtype=np.int64))]
    half = region_halves(frozen, ids[train], seed=context.config.views.seed)
    return [(train[~part], train[part]) for part in (half, ~half)]


def _viewed(context: StageContext, model: str) -> NDArray[np.int64]:
    """Return the rows of the image table with a view through a model, ascending."""
    seen_by = views_node(model)
    rows: NDArray[np.int64] = np.load(context.input(seen_by.stage, seen_by.instance) / "rows.npy", allow_pickle=False)
    return rows


def _standout(
    context: StageContext, model: str, folds: list[Fold], ids: NDArray[np.uint64], device: str
) -> NDArray[np.float64]:
    embeddings, viewed = _embeddings(context, model), _viewed(context, model)
    seen_by = views_node(model)
    views = np.load(context.input(seen_by.stage, seen_by.instance) / "views.npy", allow_pickle=False)
    parts = []
    for fold in folds:
        found = standout_behind_head(
            embeddings[fold.fitted],
            ids[fold.fitted],
            embeddings[fold.gallery],
            views[np.searchsorted(viewed, fold.judged)],
            rows=np.searchsorted(fold.gallery, fold.judged),
            device=device,
        )
        parts.append(found)
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
