"""Stage ``adaptors``: one adaptor set for each pseudo-granularity, trained on its pseudo-labels on the frozen backbone.

Two further sets are competitors in the result table, if ``evaluation.extra_rows`` names them; their settings, such as
the number of epochs, are those of the other sets. ``multi_head`` is one set that is trained on the pseudo-labels of all
granularities at once (one table of proxies for each granularity, the mean of their losses); several sets must be better
than this single one. ``supervised`` is trained on the labels of the train images (a class is a domain and a label;
unlabelled images are left out); it shows what labels would bring. Of the other stages only the evaluation reads labels.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from grappa.backbone.frozen import Backbone
from grappa.core import memory
from grappa.core.randomness import id_numbers
from grappa.images.splits import train_rows
from grappa.method.adaptor_training import AdaptorLoss, Perception, new_adaptor_set, train_adaptor_set
from grappa.method.adaptors import AdaptorSet
from grappa.pipeline.config.trainings import Adaptors
from grappa.pipeline.engine.context import StageContext
from grappa.pipeline.graph.models import taught_by
from grappa.pipeline.learning import open_views, optimization, sizes_of_set, training_task, write_metrics
from grappa.pipeline.opening import (
    open_backbone,
    open_backgrounds,
    open_objects,
    read_images,
    shape_of,
)
from grappa.pipeline.store.checkpoints import write_tensors
from grappa.training.targets import Targets, class_targets, label_targets


def run(context: StageContext) -> str:
    settings, backbone = context.config.adaptors, open_backbone(context)
    rows, targets, what = _targets(context)
    views = open_views(context, settings, backbone.spec)
    start, perception = _start(context, backbone), _perception(context)
    shape, num_classes = shape_of(backbone, [start]), sum(len(each.proxies) for each in targets)

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
            adaptor_loss=adaptor_loss(settings),
            proxy_learning_rate=settings.proxy_learning_rate,
            optimization=optimization(settings),
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
    settings = context.config.adaptors
    bottleneck_dim, rank = sizes_of_set(settings, backbone.embedding_dim)
    return new_adaptor_set(
        backbone, bottleneck_dim, in_context_rank=rank, name=str(context.instance), seed=settings.seed
    )


def adaptor_loss(settings: Adaptors) -> AdaptorLoss:
    return AdaptorLoss(
        temperature=settings.temperature,
        object_weight=settings.object_weight,
        transfer_weight=settings.transfer_weight,
        softening=settings.softening,
        cosine_weight=settings.cosine_weight,
        transfer_from=settings.transfer_from,
        background_weight=settings.background_weight,
    )


def _perception(context: StageContext) -> Perception:
    """Return the object views and background views whose weight in the settings is not 0."""
    settings = context.config.adaptors
    return Perception(
        objects=open_objects(context) if settings.object_weight or settings.transfer_weight else None,
        backgrounds=open_backgrounds(context) if settings.background_weight else None,
    )


def _targets(context: StageContext) -> tuple[NDArray[np.int64], list[Targets], str]:
    """Return the rows to train on, their targets, and the targets' name; only ``supervised`` reads labels."""
    images = read_images(context.input("images"))
    granularities = taught_by(context.config, str(context.instance))
    if not granularities:
        rows, target = _labelled(context, images)
        return rows, [target], f"{len(rows)} labels, label"
    rows = train_rows(images)
    return rows, [_pseudo_labels(context, name, images, rows) for name in granularities], "pseudo-label"


def _pseudo_labels(context: StageContext, granularity: str, images: pd.DataFrame, rows: NDArray[np.int64]) -> Targets:
    clusters = context.input("clusters", granularity)
    labels = pd.read_parquet(clusters / "assignments.parquet")["pseudo_label"].to_numpy()[rows]
    if not context.config.features.whitening_power:
        return Targets(labels, np.load(clusters / "centroids.npy", allow_pickle=False))
    features = np.load(context.input("features") / "features.npy", mmap_mode="r", allow_pickle=False)
    ids = id_numbers(images["image_id"].iloc[rows].tolist())
    return class_targets(np.asarray(features[rows]), labels, ids)


def _labelled(context: StageContext, images: pd.DataFrame) -> tuple[NDArray[np.int64], Targets]:
    """Return the train rows that have a label, and the targets that these labels make."""
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
