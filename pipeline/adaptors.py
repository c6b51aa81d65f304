"""Stage ``adaptors``: one adaptor set a pseudo-granularity, trained on its pseudo-labels over the frozen backbone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pipeline.checkpoints import FileCheckpoint, write_tensors
from pipeline.context import StageContext
from pipeline.inputs import open_backbone, open_views, read_images, settle_device, settle_precision, train_rows
from pipeline.storage import atomic_write_text

if TYPE_CHECKING:
    from grappa.fitting import FitResult, Optimization
    from grappa.training import Run


def run(context: StageContext) -> str:
    import numpy as np
    import pandas as pd

    from grappa.training import train_adaptor_set

    settings, clusters = context.config.adaptors, context.input("clusters", context.instance)
    backbone = open_backbone(context)
    rows = train_rows(read_images(context.input("images")))
    pseudo_labels = pd.read_parquet(clusters / "assignments.parquet")["pseudo_label"].to_numpy()[rows]
    views = open_views(context, settings, backbone.spec.image_size)
    with training_task(context, settings, len(rows)) as training:
        adaptors, result = train_adaptor_set(
            backbone,
            views,
            rows,
            pseudo_labels,
            np.load(clusters / "centroids.npy", allow_pickle=False),
            name=str(context.instance),
            bottleneck_dim=settings.bottleneck_dim,
            temperature=settings.temperature,
            proxy_learning_rate=settings.proxy_learning_rate,
            optimization=optimization(settings),
            seed=settings.seed,
            run=training,
        )
    write_tensors(context.path / "adaptors.safetensors", adaptors.state_dict())
    write_metrics(context, result)
    last = result.metrics[-1]
    return f"{settings.num_epochs} epochs, loss {last['loss']:.3f}, pseudo-label accuracy {last['accuracy']:.1%}"


def optimization(settings: Any) -> Optimization:
    """Return the library's options from a training section of the configuration."""
    from grappa.fitting import Optimization

    return Optimization(
        num_epochs=settings.num_epochs,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        warmup=settings.warmup,
    )


@contextmanager
def training_task(context: StageContext, settings: Any, num_train: int, unit: str = "images") -> Iterator[Run]:
    """Yield where a training runs, its checkpoint and its progress; an epoch is whole batches, the rest is left out."""
    from grappa.training import Run

    device = settle_device(context)
    precision = settle_precision(context, settings.precision, device)
    checkpoint = FileCheckpoint(context.path, seconds=context.config.compute.checkpoint_seconds)
    batch = min(settings.batch_size, num_train)
    total = settings.num_epochs * (num_train // batch) * batch
    with context.task("training", total, unit, done=checkpoint.steps_done() * batch) as advance:
        yield Run(device, precision, checkpoint, lambda steps: advance(steps * batch))


def write_metrics(context: StageContext, result: FitResult) -> None:
    """Write the metrics along the steps as JSON lines: deterministic values only."""
    import json

    atomic_write_text(context.path / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in result.metrics))
