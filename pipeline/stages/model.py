"""Stage ``model``: the self-contained adapted model: backbone, adaptation, head and preprocessing.

``model.source`` chooses the adaptation, or leaves the choice to the verdict: the adaptor sets and their fusion, the
student's set, one set, or none (the frozen backbone with its head).
"""

from __future__ import annotations

from grappa.model import load_model, save_model
from grappa.pipeline.engine.context import StageContext
from grappa.pipeline.graph.models import head_models
from grappa.pipeline.opening import open_backbone, open_deployed, open_head
from grappa.pipeline.stages.embeddings import open_model


def run(context: StageContext) -> str:
    name = open_deployed(context)
    adapted = open_model(context, name)
    save_model(
        context.path,
        open_backbone(context),
        adapted.sets,
        adapted.fusion,
        cache_size=context.config.images.shorter_side,
        head=open_head(context, name) if name in head_models(context.config) else None,
    )
    model = load_model(context.path, context.config.backbone.module)
    added, last = (
        sum(len(each.flatten()) for each in part.state_dict().values()) / 1e6 if part is not None else 0.0
        for part in (model.adaptation, model.head)
    )
    size = f"{model.embedding_dim} dimensions, {added:.2f} M weights added, {last:.2f} M in the head"
    number = len(adapted.sets)
    what = f"{number} adaptor {'set' if number == 1 else 'sets'}" if number else "the frozen backbone"
    return f"{name}: {what} in one model of {size}"
