"""Stage ``adaptors``: one adaptor set a pseudo-granularity, trained on its pseudo-labels over the frozen backbone.

Two further sets are competitors of the result table, if ``evaluation.extra_rows`` names them; the settings, and so the
number of epochs, are those of one set. ``multi_head`` is one set trained on the pseudo-labels of all granularities at
once (one table of proxies a granularity, the mean of their losses): what several sets must beat at the cost of one.
``supervised`` is trained on the labels of the train images (a class is a domain and a label, unlabelled images are left
out): what labels would have bought. No other stage but the evaluation reads a label.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from grappa.pipeline.engine.context import StageContext
from grappa.pipeline.opening import (
    need_for_batches,
    open_backbone,
    open_backgrounds,
    open_objects,
    open_views,
    options,
    read_images,
    settle_device,
    settle_precision,
    train_rows,
    vit_shape,
)
from grappa.pipeline.store.checkpoints import FileCheckpoint, SharedCheckpoint, write_tensors
from grappa.pipeline.store.storage import atomic_write_text

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

    from grappa.backbone.vit import Backbone
    from grappa.method.adaptor_training import Perception
    from grappa.method.adaptors import AdaptorSet
    from grappa.training.batches import Run
    from grappa.training.loop import FitResult
    from grappa.training.targets import Targets


def run(context: StageContext) -> str:
    from grappa.core import memory
    from grappa.method.adaptor_training import AdaptorLoss, train_adaptor_set
    from grappa.training.loop import Optimization

    settings, backbone = context.config.adaptors, open_backbone(context)
    rows, targets, what = _targets(context)
    views = open_views(context, settings, backbone.spec.image_size)
    start, perception = _start(context, backbone), _perception(context)
    shape, num_classes = vit_shape(backbone, [start]), sum(len(each.proxies) for each in targets)

    def need(batch_size: int, precision: str) -> int:
        return memory.training(shape, batch_size * perception.num_kinds, precision, num_classes)

    with training_task(context, settings, len(rows), need) as training:
        adaptors, result = train_adaptor_set(
            backbone,
            views,
            rows,
            targets,
            name=str(context.instance),
            start=start,
            adaptor_loss=options(AdaptorLoss, settings),
            proxy_learning_rate=settings.proxy_learning_rate,
            optimization=options(Optimization, settings),
            seed=settings.seed,
            run=training,
            perception=perception,
        )
    if not context.leads:
        return ""
    write_tensors(context.path / "adaptors.safetensors", adaptors.state_dict())
    write_metrics(context, result)
    last = result.metrics[-1]
    return f"{settings.num_epochs} epochs, loss {last['loss']:.3f}, {what} accuracy {last['accuracy']:.1%}"


def _start(context: StageContext, backbone: Backbone) -> AdaptorSet:
    from grappa.method.adaptor_training import new_adaptor_set

    settings = context.config.adaptors
    bottleneck_dim, rank = set_sizes(settings, backbone.width)
    return new_adaptor_set(
        backbone, bottleneck_dim, in_context_rank=rank, name=str(context.instance), seed=settings.seed
    )


def set_sizes(settings: Any, width: int) -> tuple[int, int]:
    """Return bottleneck and in-context rank of a set on a backbone of a width; 0 for what its kind has not."""
    from grappa.method import adaptors

    rank = adaptors.automatic_rank(width) if settings.in_context_rank == "auto" else settings.in_context_rank
    return adaptors.adaptor_set_sizes(settings.kind, settings.bottleneck_dim, rank)


def _perception(context: StageContext) -> Perception:
    """Return the further views that the settings give a weight to."""
    from grappa.method.adaptor_training import Perception

    settings = context.config.adaptors
    return Perception(
        objects=open_objects(context) if settings.object_weight or settings.transfer_weight else None,
        backgrounds=open_backgrounds(context) if settings.background_weight else None,
    )


def _targets(context: StageContext) -> tuple[NDArray[np.int64], list[Targets], str]:
    """Return the rows to train on, what is told apart there, and its name: only ``supervised`` reads labels."""
    images = read_images(context.input("images"))
    if context.instance == "supervised":
        rows, target = _labelled(context, images)
        return rows, [target], f"{len(rows)} labels, label"
    names = context.config.granularities if context.instance == "multi_head" else (str(context.instance),)
    rows = train_rows(images)
    return rows, [_pseudo_labels(context, name, rows) for name in names], "pseudo-label"


def _pseudo_labels(context: StageContext, granularity: str, rows: NDArray[np.int64]) -> Targets:
    import numpy as np
    import pandas as pd

    from grappa.training.targets import Targets

    clusters = context.input("clusters", granularity)
    labels = pd.read_parquet(clusters / "assignments.parquet")["pseudo_label"].to_numpy()[rows]
    return Targets(labels, np.load(clusters / "centroids.npy", allow_pickle=False))


def _labelled(context: StageContext, images: pd.DataFrame) -> tuple[NDArray[np.int64], Targets]:
    """Return the train rows that have a label, and these as targets."""
    import numpy as np
    import pandas as pd

    from grappa.core.randomness import id_numbers
    from grappa.training.targets import label_targets

    labels = pd.read_parquet(context.input("images") / "labels.parquet")["label"].to_numpy()
    rows = train_rows(images)
    rows = rows[pd.notna(labels[rows])]
    if not len(rows):
        raise ValueError(
            "evaluation.extra_rows asks for `supervised`, but no train image has a label; give labels, or leave it out"
        )
    features = np.load(context.input("features") / "features.npy", allow_pickle=False)
    chosen = images.iloc[rows]
    ids = id_numbers(chosen["image_id"].tolist())
    return rows, label_targets(features[rows], chosen["domain"].to_numpy(), labels[rows], ids)


@contextmanager
def training_task(
    context: StageContext, settings: Any, num_train: int, need: Callable[[int, str], int], unit: str = "images"
) -> Iterator[Run]:
    """Yield where a training runs, its checkpoint and its progress; an epoch is whole batches, the rest is left out.

    ``need``: the bytes it takes on a CPU with a batch of so many images, at a precision.
    """
    from grappa.training.batches import Run

    device = settle_device(context)
    precision = settle_precision(context, settings.precision, device)
    kept = FileCheckpoint(context.path, seconds=context.config.compute.checkpoint_seconds)
    checkpoint = kept if context.team.size == 1 else SharedCheckpoint(kept, context.processes)
    batch = min(settings.batch_size, num_train)
    need_for_batches(context, device, need(batch, precision))
    total = settings.num_epochs * (num_train // batch) * batch
    with context.task("training", total, unit, done=kept.steps_done() * batch if context.leads else 0) as advance:
        yield Run(device, precision, checkpoint, lambda steps: advance(steps * batch), context.processes)


def write_metrics(context: StageContext, result: FitResult) -> None:
    """Write the metrics along the steps as JSON lines: deterministic values only."""
    import json

    atomic_write_text(context.path / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in result.metrics))
