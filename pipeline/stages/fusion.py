"""Stage ``fusion``: attention over the adaptor sets, trained by attention propagation between neighbours."""

from __future__ import annotations

import json
import math

import numpy as np
from numpy.typing import NDArray

from grappa.core import memory
from grappa.images.splits import train_rows
from grappa.method.fusion_training import PropagationLoss, train_fusion
from grappa.pipeline.config.trainings import Fusion
from grappa.pipeline.engine.context import StageContext
from grappa.pipeline.learning import open_views, optimization, training_task, write_metrics
from grappa.pipeline.opening import open_backbone, open_fused_sets, read_images, shape_of
from grappa.pipeline.store.checkpoints import write_tensors


def run(context: StageContext) -> str:
    settings = context.config.fusion
    backbone, sets = open_backbone(context), open_fused_sets(context)
    rows = train_rows(read_images(context.input("images")))
    views = open_views(context, settings, backbone.spec)
    shape = shape_of(backbone, sets.values())

    def need(batch_size: int, precision: str) -> int:
        return memory.training(shape, 2 * batch_size, precision)

    with training_task(context, settings, len(rows), need, unit="pairs") as training:
        fusion, result = train_fusion(
            backbone,
            list(sets.values()),
            views,
            rows,
            _partners(context, rows),
            level=settings.attention_level,
            attention_temperature=settings.attention_temperature,
            propagation=propagation_loss(settings),
            initial_std=settings.initial_std,
            optimization=optimization(settings),
            seed=settings.seed,
            run=training,
        )
    if not context.leads:
        return ""
    form = {"level": settings.attention_level, "temperature": settings.attention_temperature}
    # The metadata have only one entry: safetensors writes several entries in an order that differs between processes.
    write_tensors(context.path / "fusion.safetensors", fusion.trained_state(), {"fusion": json.dumps(form)})
    write_metrics(context, result)
    last = result.metrics[-1]
    spread = f"attention entropy {last['entropy']:.3f} of {math.log(len(sets)):.3f}"
    return f"{settings.num_epochs} epochs, loss {last['loss']:.3f}, {spread}"


def _partners(context: StageContext, rows: NDArray[np.int64]) -> NDArray[np.int64] | None:
    if context.instance == "views":
        return None
    neighbors = np.load(context.input("neighbors") / "neighbors.npy", allow_pickle=False)
    nearest: NDArray[np.int64] = neighbors[rows, : context.config.fusion.num_neighbors]
    return nearest


def propagation_loss(settings: Fusion) -> PropagationLoss:
    return PropagationLoss(
        attention_loss=settings.attention_loss,
        marginal_weight=settings.marginal_weight,
        sharpness=settings.sharpness,
        barlow_weight=settings.barlow_weight,
        barlow_off_diagonal=settings.barlow_off_diagonal,
    )
