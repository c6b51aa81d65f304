"""Stage ``model``: the self-contained adapted model, backbone + what adapts it + head + preprocessing.

What adapts it is the adaptor sets and their fusion, the student's one set, or the only set: ``model.source`` says.
"""

from __future__ import annotations

from grappa.method.adaptors import AdaptorSet
from grappa.method.fusion import Fusion
from grappa.model import load_model, save_model
from grappa.pipeline.engine.context import StageContext
from grappa.pipeline.graph.models import deployed_row
from grappa.pipeline.opening import open_backbone, open_fusion, open_head, open_sets
from grappa.pipeline.stages.student import open_student


def run(context: StageContext) -> str:
    row, cache_size = deployed_row(context.config), context.config.images.cache_size
    sets, fusion = _adapted(context)
    save_model(
        context.path,
        open_backbone(context),
        sets,
        fusion,
        cache_size=cache_size,
        head=open_head(context, row),
    )
    model = load_model(context.path)
    added, last = (
        sum(len(each.flatten()) for each in part.state_dict().values()) / 1e6 for part in (model.adaptation, model.head)
    )
    size = f"{model.embedding_dim} dimensions, {added:.2f} M weights added, {last:.2f} M in the head"
    return f"{row}: {len(sets)} adaptor {'set' if len(sets) == 1 else 'sets'} in one model of {size}"


def _adapted(context: StageContext) -> tuple[dict[str, AdaptorSet], Fusion | None]:
    source, row = context.config.model.source, deployed_row(context.config)
    if source == "student":
        return {"student": open_student(context)}, None
    if source == "single":
        return open_sets(context, (row,)), None
    sets = open_sets(context, context.config.granularities)
    return sets, open_fusion(context, "neighbors", sets)
