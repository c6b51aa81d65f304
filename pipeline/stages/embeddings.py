"""Stage ``embeddings``: every image's embedding by each model of the result table, (N, D) float32, L2-normalised."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from grappa.backbone.vit import Adaptation, Backbone
from grappa.core.vectors import side_by_side
from grappa.images.splits import train_rows
from grappa.method.adaptors import folded
from grappa.method.fusion import Fusion
from grappa.metrics.whitening import fit_whitening
from grappa.pipeline.engine.context import StageContext
from grappa.pipeline.graph.models import FROZEN_ROWS, ON_OBJECTS, adaptor_sets, fusion_instance
from grappa.pipeline.opening import open_backbone, open_fusion, open_objects, open_sets, read_images
from grappa.pipeline.stages.features import extract, new_array
from grappa.pipeline.stages.student import open_student

FILE = "embeddings.npy"


def run(context: StageContext) -> str:
    row = str(context.instance)
    if not context.leads and row in (*FROZEN_ROWS, "concat"):
        return ""  # seconds of work
    if row in FROZEN_ROWS:
        return _from_features(context, whitened=row == "zero_shot_whitened")
    if row == "concat":
        return _side_by_side(context)
    cache = open_objects(context) if row.endswith(ON_OBJECTS) else None
    backbone, adaptation = _adapted(context, row.removesuffix(ON_OBJECTS))
    precision = context.config.embeddings.precision
    num_rows, width = extract(context, backbone, adaptation, FILE, precision, cache=cache)
    return f"{num_rows} embeddings of {width} dimensions by {row}"


def _adapted(context: StageContext, row: str) -> tuple[Backbone, Adaptation]:
    """Return the backbone and what adapts it, in their inference form."""
    backbone = open_backbone(context)
    if row == "student":
        return folded(backbone, open_student(context))
    if row in adaptor_sets(context.config):
        return folded(backbone, open_sets(context, (row,))[row])
    sets = open_sets(context, context.config.granularities)
    fusion = Fusion(list(sets.values())) if row == "mean" else open_fusion(context, fusion_instance(row), sets)
    return backbone, fusion.folded()


def _side_by_side(context: StageContext) -> str:
    names = context.config.granularities
    files = [context.input("embeddings", name) / FILE for name in names]
    parts = [np.load(file, mmap_mode="r", allow_pickle=False) for file in files]
    out = new_array(context.path / FILE, (len(parts[0]), sum(part.shape[1] for part in parts)))
    side_by_side(parts, out)
    out.flush()
    return f"{out.shape[0]} embeddings of {out.shape[1]} dimensions: those of {', '.join(names)} side by side"


def _from_features(context: StageContext, *, whitened: bool) -> str:
    source = "object_features" if context.instance == "zero_shot_objects" else "features"
    features = np.load(context.input(source) / "features.npy", allow_pickle=False)
    kept = _whiten(context, features) if whitened else features
    np.save(context.path / FILE, kept, allow_pickle=False)
    how = f"whitened with power {context.config.embeddings.whitening_power:g}" if whitened else "unchanged"
    return f"{len(features)} features of {features.shape[1]} dimensions, {how}"


def _whiten(context: StageContext, features: NDArray[np.float32]) -> NDArray[np.float32]:
    rows = train_rows(read_images(context.input("images")))
    return fit_whitening(features[rows], power=context.config.embeddings.whitening_power).apply(features)
