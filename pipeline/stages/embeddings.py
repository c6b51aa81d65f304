"""Stages ``embeddings`` and ``views``: what a model of the result table makes of images, float32, L2-normalised.

``embeddings`` embeds all images, (N, D). ``frozen_views`` embeds an augmented view of some train and some test images,
(m, D), with their rows of the image table, (m,) int64 ascending; ``views`` the views of those of them by which models
are judged. Labels are not read.

``grappa.pipeline.graph.models`` names for each model the function that makes its embeddings. ``COMPUTED`` holds the
functions that need no pass through the backbone, ``OPENED`` those that open the adaptor sets of the backbone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from grappa.backbone.frozen import Adaptation, Backbone
from grappa.core.randomness import id_numbers, key, shuffled
from grappa.core.vectors import side_by_side
from grappa.images.pixels import ChosenRows
from grappa.images.splits import test_rows, train_rows
from grappa.method.adaptors import AdaptorSet, folded
from grappa.method.fusion import Fusion
from grappa.metrics.whitening import fit_whitening
from grappa.pipeline.config.schema import SampledViews
from grappa.pipeline.engine.context import StageContext
from grappa.pipeline.graph.models import CHOOSING_MODEL, Making, find_model, model_on_objects
from grappa.pipeline.learning import open_views
from grappa.pipeline.opening import (
    open_backbone,
    open_fused_sets,
    open_fusion,
    open_objects,
    open_pixels,
    open_sets,
    open_student,
    read_images,
)
from grappa.pipeline.stages.features import extract, join_rows, new_array, own_rows

FILE, VIEWS_FILE, ROWS_FILE = "embeddings.npy", "views.npy", "rows.npy"


@dataclass(frozen=True)
class Adapted:
    """The trained parts that adapt the backbone: one adaptor set, several sets and the fusion over them, or nothing."""

    sets: dict[str, AdaptorSet]
    fusion: Fusion | None = None

    def inference_form(self, backbone: Backbone) -> tuple[Backbone, Adaptation | None]:
        """Return the backbone and its adaptation, folded for inference; None for the frozen backbone."""
        if self.fusion is not None:
            return backbone, self.fusion.folded()
        if not self.sets:
            return backbone, None
        (only,) = self.sets.values()
        return folded(backbone, only)


def run(context: StageContext) -> str:
    name = str(context.instance)
    model = find_model(name)
    compute = COMPUTED.get(model.making)
    if compute:
        return compute(context) if context.leads else ""  # this takes seconds, so the leader does it alone
    pixels = open_objects(context) if "object_views" in model.parts else open_pixels(context)
    if context.ranges:
        num_rows, width = join_rows(context, FILE, pixels)
        return f"{num_rows} embeddings of {width} dimensions by {name}, joined from {len(context.ranges)} ranges"
    backbone, adaptation = open_model(context, name).inference_form(open_backbone(context))
    cache, precision = own_rows(context, pixels), context.config.embeddings.precision
    num_rows, width = extract(context, backbone, adaptation, FILE, precision, cache=cache)
    return f"{num_rows} embeddings of {width} dimensions by {name}"


def run_on_views(context: StageContext) -> str:
    """Run the stages ``views`` and ``frozen_views``."""
    name = str(context.instance or CHOOSING_MODEL)
    images, settings = read_images(context.input("images")), context.config.views
    ids, rows = id_numbers(images["image_id"].tolist()), _viewed_rows(images, settings, frozen=not context.instance)
    backbone = open_backbone(context)
    views = open_views(context, settings, backbone.spec)
    views = replace(views, cache=ChosenRows(open_pixels(context), rows), ids=ids[rows])
    backbone, adaptation = open_model(context, name).inference_form(backbone)
    drawn = key(settings.seed, "views")
    num_rows, width = extract(
        context,
        backbone,
        adaptation,
        VIEWS_FILE,
        context.config.embeddings.precision,
        cache=views.cache,
        view=lambda cache, chosen: views.draw(drawn, chosen),
    )
    if context.leads:
        np.save(context.path / ROWS_FILE, rows, allow_pickle=False)
    return f"{num_rows} embeddings of views, of {width} dimensions, by {name}"


def _viewed_rows(images: pd.DataFrame, settings: SampledViews, *, frozen: bool) -> NDArray[np.int64]:
    """Return at most ``num_images`` train rows and, where there is a split, as many test rows, drawn by their ids.

    Adapted models see the first ``num_judged`` of those that are judged: the test rows where there is a split.
    """
    tested, transductive = test_rows(images)
    parts, most = [train_rows(images)] if transductive else [train_rows(images), tested], settings.num_images
    if not frozen and settings.num_judged is not None:
        parts, most = parts[-1:], min(most, settings.num_judged)
    ids = id_numbers(images["image_id"].tolist())
    drawn = [rows[shuffled(key(settings.seed, "viewed"), ids[rows])[:most]] for rows in parts]
    return np.sort(np.concatenate(drawn))


def open_model(context: StageContext, name: str) -> Adapted:
    """Return the trained parts that adapt the backbone in a model of the result table."""
    making = find_model(name).making
    return Adapted({}) if making == "features" else OPENED[making](context, name)


def _set(context: StageContext, name: str) -> Adapted:
    return Adapted(open_sets(context, (name,)))


def _mean(context: StageContext, name: str) -> Adapted:
    sets = open_fused_sets(context)
    return Adapted(sets, Fusion(list(sets.values())))


def _fused(context: StageContext, name: str, *, pairs: str) -> Adapted:
    sets = open_fused_sets(context)
    return Adapted(sets, open_fusion(context, pairs, sets))


def _student(context: StageContext, name: str) -> Adapted:
    return Adapted({"student": open_student(context)})


def _on_objects(context: StageContext, name: str) -> Adapted:
    return open_model(context, model_on_objects(context.config))


def _unchanged(context: StageContext, *, stage: str) -> str:
    features = np.load(context.input(stage) / "features.npy", allow_pickle=False)
    np.save(context.path / FILE, features, allow_pickle=False)
    return f"{len(features)} features of {features.shape[1]} dimensions, unchanged"


def _whitened(context: StageContext) -> str:
    features = np.load(context.input("features") / "features.npy", allow_pickle=False)
    rows = train_rows(read_images(context.input("images")))
    power = context.config.embeddings.whitening_power
    np.save(context.path / FILE, fit_whitening(features[rows], power=power).apply(features), allow_pickle=False)
    return f"{len(features)} features of {features.shape[1]} dimensions, whitened with power {power:g}"


def _side_by_side(context: StageContext) -> str:
    names = context.config.granularities
    files = [context.input("embeddings", name) / FILE for name in names]
    parts = [np.load(file, mmap_mode="r", allow_pickle=False) for file in files]
    out = new_array(context.path / FILE, (len(parts[0]), sum(part.shape[1] for part in parts)))
    side_by_side(parts, out)
    out.flush()
    return f"{out.shape[0]} embeddings of {out.shape[1]} dimensions: those of {', '.join(names)} side by side"


COMPUTED: Mapping[Making, Callable[[StageContext], str]] = {
    "features": partial(_unchanged, stage="features"),
    "object_features": partial(_unchanged, stage="object_features"),
    "whitening": _whitened,
    "side_by_side": _side_by_side,
}
OPENED: Mapping[Making, Callable[[StageContext, str], Adapted]] = {
    "set": _set,
    "mean": _mean,
    "neighbors_fusion": partial(_fused, pairs="neighbors"),
    "views_fusion": partial(_fused, pairs="views"),
    "student": _student,
    "on_objects": _on_objects,
}
