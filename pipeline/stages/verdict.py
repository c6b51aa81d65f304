"""Stage ``verdict``: whether adaptation helped, told without labels, and the model that ``model.source: auto`` deploys.

``verdict.json`` holds the verdict in a word, the evidence in two sentences, and each model's indicator with its
difference to the frozen backbone. The rule is in ``grappa.metrics.verdict``. Every model is judged as it is searched:
its final embeddings, and views of some images behind its own head. These are test images where there is a split, and
otherwise train images: those with a view through every model, among all that have one through the frozen backbone. No
label is read.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import reduce

import numpy as np
from numpy.typing import NDArray

from grappa.images.splits import test_rows
from grappa.method.head import apply_head
from grappa.metrics.indicators import neighborhood_standout
from grappa.metrics.judged import Judged
from grappa.metrics.verdict import Verdict, best_adapted, judge
from grappa.pipeline.engine.context import StageContext
from grappa.pipeline.graph.models import candidate_models, final_node, head_models
from grappa.pipeline.graph.stages import views_node
from grappa.pipeline.opening import open_head, read_images, settle_device

COSTLY = ("mean", "fused")  # all sets at every image; every other model costs one set or none


def run(context: StageContext) -> str:
    images = read_images(context.input("images"))
    tested, transductive = test_rows(images)
    models, where = candidate_models(context.config), "train" if transductive else "test"
    gallery = np.intersect1d(_viewed(context, models[0]), tested)
    judged = reduce(np.intersect1d, (_viewed(context, model) for model in models), gallery)
    if len(judged) < 4:
        return _write(context, Verdict("too few images", models[0], len(judged), ()), where)
    domains = images["domain"].to_numpy(dtype=object)[gallery]
    standouts, within = {}, {}
    with context.task("judging", len(models), unit="models") as advance:
        for model in models:
            standouts[model], within[model] = _standouts(context, model, gallery, judged, domains)
            advance(1)
    singles = [model for model in models[1:] if model not in ("student", *COSTLY)]
    verdict = judge(
        standouts,
        within=within if len(set(domains)) > 1 else None,
        by_cost=["student", *singles, *COSTLY],
        seed=context.config.views.seed,
    )
    return _write(context, verdict, where)


def _viewed(context: StageContext, model: str) -> NDArray[np.int64]:
    """Return the rows of the image table with a view through a model, ascending."""
    seen_by = views_node(model)
    rows: NDArray[np.int64] = np.load(context.input(seen_by.stage, seen_by.instance) / "rows.npy", allow_pickle=False)
    return rows


def _standouts(
    context: StageContext,
    model: str,
    gallery: NDArray[np.int64],
    judged: NDArray[np.int64],
    domains: NDArray[np.object_],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return how far the neighbours of the judged images stand out among the gallery, and in their own domain: (m,)."""
    final, seen_by = final_node(context.config, model), views_node(model)
    embeddings = np.load(context.input(final.stage, model) / "embeddings.npy", mmap_mode="r", allow_pickle=False)
    views = np.load(context.input(seen_by.stage, seen_by.instance) / "views.npy", allow_pickle=False)
    views = views[np.searchsorted(_viewed(context, model), judged)]
    if model in head_models(context.config):
        views = apply_head(open_head(context, model), views, device=str(settle_device(context)))
    rows, images = np.searchsorted(gallery, judged), np.asarray(embeddings[gallery])
    among_all = neighborhood_standout(images, views, rows=rows)
    return among_all, neighborhood_standout(images, views, rows=rows, domains=domains)


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
    frozen, highest = verdict.models[0], max(verdict.models[1:], key=lambda each: each.indicator)
    best = best_adapted(verdict.models) if verdict.word == "helped" else highest
    gain = _gain(best, abs(frozen.indicator))
    where = f"on {verdict.num_images:,} {judged} images, without labels"
    only = ", but not certainly within its domain" if best.low > 0 and not best.holds_within else ""
    return (
        f"The neighbours of an image stand out {gain} against the frozen backbone with "
        f"{best.model}, the best adapted model{only} ({where}). {last}"
    )


def _gain(model: Judged, reference: float) -> str:
    """Return a difference with its interval, as shares of the frozen indicator; as they are where that is 0."""
    shares = [value / reference if reference else value for value in (model.difference, model.low, model.high)]
    difference, low, high = (f"{each:+.1%}" if reference else f"{each:+.3f}" for each in shares)
    return f"{difference} [{low}, {high}]"
