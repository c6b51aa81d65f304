"""Stage ``model``: the self-contained adapted model, backbone + adaptor sets + fusion + preprocessing."""

from __future__ import annotations

from pipeline.context import StageContext
from pipeline.fused import open_fusion
from pipeline.inputs import open_backbone, open_sets


def run(context: StageContext) -> str:
    from grappa.model import load_model, save_model

    backbone, sets = open_backbone(context), open_sets(context, context.config.granularities)
    fusion = open_fusion(context, "neighbors", sets)
    save_model(context.path, backbone, sets, fusion, cache_size=context.config.images.cache_size)
    model = load_model(context.path)
    added = sum(value.numel() for value in model.residuals.state_dict().values()) / 1e6
    return f"{len(sets)} adaptor sets in one model of {model.embedding_dim} dimensions, {added:.2f} M weights added"
