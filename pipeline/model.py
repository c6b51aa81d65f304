"""Stage ``model``: the self-contained adapted model, backbone + adaptor sets + fusion + head + preprocessing."""

from __future__ import annotations

from pipeline.context import StageContext
from pipeline.fused import open_fusion
from pipeline.inputs import open_backbone, open_head, open_sets


def run(context: StageContext) -> str:
    from grappa.model import load_model, save_model

    backbone, sets = open_backbone(context), open_sets(context, context.config.granularities)
    fusion = open_fusion(context, "neighbors", sets)
    head, cache_size = open_head(context, "fused"), context.config.images.cache_size
    save_model(context.path, backbone, sets, fusion, cache_size=cache_size, head=head)
    model = load_model(context.path)
    added, last = (sum(each.numel() for each in part.buffers()) / 1e6 for part in (model.residuals, model.head))
    size = f"{model.embedding_dim} dimensions, {added:.2f} M weights added, {last:.2f} M in the head"
    return f"{len(sets)} adaptor sets in one model of {size}"
