"""Stages ``adaptors`` and ``selection``: the adaptor sets, and which of them are fused.

``adaptors`` trains a set for each pseudo-granularity, on its pseudo-labels and on the frozen backbone.

Two further sets are competitors in the result table, if ``evaluation.extra_rows`` names them; their settings, such as
the number of epochs, are those of the other sets. ``multi_head`` is one set that is trained on the pseudo-labels of all
granularities at once (one table of proxies for each granularity, the mean of their losses); several sets must be better
than this single one. ``supervised`` is trained on the labels of the train images (a class is a domain and a label;
unlabelled images are left out); it shows what labels would bring. Of the other stages only the evaluation reads labels.

``selection`` embeds train images, and a view of half of them, by every set. ``selection.json`` says how far each set is
below the best by ``grappa.metrics.indicators.neighborhood_standout``, without labels, and which sets are kept.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from functools import partial

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from grappa.backbone.features import extract_features
from grappa.backbone.frozen import Backbone
from grappa.core import memory
from grappa.core.randomness import id_numbers, key, shuffled
from grappa.images.pixels import ChosenRows
from grappa.images.splits import train_rows
from grappa.method.adaptor_training import (
    AdaptorLoss,
    Perception,
    new_adaptor_set,
    sharded_proxies,
    train_adaptor_set,
)
from grappa.method.adaptors import AdaptorSet, folded
from grappa.method.head_choice import MIN_FITTED, MIN_VIEWED, region_halves, standout_behind_head
from grappa.method.set_choice import MIN_JUDGED, JudgedSet, choose_sets
from grappa.pipeline.config.trainings import Adaptors
from grappa.pipeline.engine.context import StageContext
from grappa.pipeline.graph.models import taught_by
from grappa.pipeline.graph.stages import centroids_are_features
from grappa.pipeline.learning import open_views, optimization, sizes_of_set, training_task, write_metrics
from grappa.pipeline.opening import (
    open_backbone,
    open_backgrounds,
    open_objects,
    open_sets,
    read_images,
    settle_device,
    settle_passes,
    shape_of,
)
from grappa.pipeline.store.artifacts import SCRATCH_FOLDER
from grappa.pipeline.store.checkpoints import ArrayCheckpoint, refuse_if_stopped, write_tensors
from grappa.search.kmeans import count_distinct
from grappa.training.targets import Targets, class_targets, label_targets


def run(context: StageContext) -> str:
    settings, backbone = context.config.adaptors, open_backbone(context)
    rows, targets, what = _targets(context)
    views = open_views(context, settings, backbone.spec)
    start, perception = _start(context, backbone), _perception(context)
    shape, held = shape_of(backbone, [start]), sharded_proxies(targets, perception, context.processes)

    def need(batch_size: int, precision: str) -> int:
        return memory.training(shape, batch_size * perception.num_kinds, precision, held.num_own)

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
    if centroids_are_features(context.config):
        return Targets(labels, np.load(clusters / "centroids.npy", mmap_mode="r", allow_pickle=False))
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


@dataclass(frozen=True)
class Trial:
    """The train images by which sets are judged: their rows (n,) ascending and ids, the places (m,) of those that are
    seen by a view too, and the half (n,) bool of the collection in which each lies."""

    rows: NDArray[np.int64]
    ids: NDArray[np.uint64]
    seen: NDArray[np.int64]
    half: NDArray[np.bool_]


def select(context: StageContext) -> str:
    """Run the stage ``selection``."""
    settings, names, trial = context.config.selection, context.config.granularities, _trial(context)
    if trial is None:
        return _write_selection(context, tuple(JudgedSet(name, 0.0, 0.0, 0.0, 0.0, kept=True) for name in names), 0)
    device, standouts = str(settle_device(context)), {}
    for name in names:
        standouts[name] = _standouts(trial, *_tried(context, name, trial), device)
    seed = context.config.views.seed
    return _write_selection(context, choose_sets(standouts, max_loss=settings.max_loss, seed=seed), len(trial.seen))


def _trial(context: StageContext) -> Trial | None:
    """Draw the images; None where they are too few, or too alike, to be cut into two halves of regions."""
    images, seed = read_images(context.input("images")), context.config.views.seed
    ids, train = id_numbers(images["image_id"].tolist()), train_rows(images)
    most = context.config.selection.num_images
    drawn = train[shuffled(key(seed, "selection"), ids[train])[:most]]
    rows, seen = np.sort(drawn), np.sort(drawn[: (most + 1) // 2])
    features = np.load(context.input("features") / "features.npy", mmap_mode="r", allow_pickle=False)
    frozen = np.asarray(features[rows])
    if len(seen) < MIN_JUDGED or count_distinct(frozen, 8) < 8:
        return None
    trial = Trial(rows, ids[rows], np.searchsorted(rows, seen), region_halves(frozen, ids[rows], seed=seed))
    return trial if all(_serves(frozen, trial, half) for half in (trial.half, ~trial.half)) else None


def _serves(frozen: NDArray[np.float32], trial: Trial, half: NDArray[np.bool_]) -> bool:
    """Tell whether enough images are judged in a half, and enough different ones left to fit a head on."""
    judged, fitted = int(half[trial.seen].sum()), frozen[~half]
    return judged >= MIN_VIEWED and len(fitted) >= MIN_FITTED and count_distinct(fitted, 4) == 4


def _tried(context: StageContext, name: str, trial: Trial) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return what a set makes of the images, (n, D), and of the views, (m, D); a later try need not make it again."""
    kept = ArrayCheckpoint(context.path / SCRATCH_FOLDER / f"{name}.npy")
    both = context.trusted(kept.path, kept.load, None)
    if both is None:
        kept.path.parent.mkdir(exist_ok=True)
        both = _embedded(context, name, trial)
        kept.save(both)
    refuse_if_stopped()
    return both[: len(trial.rows)], both[len(trial.rows) :]


def _embedded(context: StageContext, name: str, trial: Trial) -> NDArray[np.float32]:
    """Return the embeddings of the images and then of the views by a set, (n + m, D)."""
    (adaptors,) = open_sets(context, (name,)).values()
    backbone, form = folded(open_backbone(context), adaptors)
    settings, wanted = context.config.views, context.config.embeddings.precision
    device, precision, batch_size = settle_passes(context, backbone, form, wanted, len(trial.rows))
    views, drawn = open_views(context, settings, backbone.spec), key(settings.seed, "views")
    seen = replace(views, cache=ChosenRows(views.cache, trial.rows[trial.seen]), ids=trial.ids[trial.seen])
    out = np.empty((len(trial.rows) + len(trial.seen), backbone.embedding_dim), dtype=np.float32)
    with context.task(f"embedding by {name}", len(out)) as advance:
        run = partial(
            extract_features,
            backbone,
            adaptation=form,
            batch_size=batch_size,
            device=device,
            precision=precision,
            num_workers=context.num_workers,
            progress=advance,
        )
        run(ChosenRows(views.cache, trial.rows), out[: len(trial.rows)])
        run(seen.cache, out[len(trial.rows) :], view=lambda cache, rows: seen.draw(drawn, rows))
    return out


def _standouts(
    trial: Trial, images: NDArray[np.float32], views: NDArray[np.float32], device: str
) -> NDArray[np.float64]:
    """Return how far the neighbours of each judged image stand out, behind a head of the other half: (m,)."""
    parts = []
    for half in (trial.half, ~trial.half):
        judged = half[trial.seen]
        part = (images[~half], trial.ids[~half], images[trial.seen[judged]], views[judged])
        parts.append(standout_behind_head(*part, device=device))
    return np.concatenate(parts)


def _write_selection(context: StageContext, judged: tuple[JudgedSet, ...], num_images: int) -> str:
    record = {"num_images": num_images, "sets": [asdict(each) for each in judged]}
    (context.path / "selection.json").write_text(json.dumps(record, indent=2) + "\n")
    kept = [each.name for each in judged if each.kept]
    if not num_images:
        return f"{', '.join(kept)} are fused: too few images to choose among sets"
    left = [_loss(each) for each in judged if not each.kept]
    what = f"{', '.join(kept)} are fused"
    return f"{what}; left out as certainly weaker: {', '.join(left)}" if left else f"{what}: no set is certainly weaker"


def _loss(judged: JudgedSet) -> str:
    """Return ``k00045 (-6.0% [-6.8%, -5.2%])``."""
    return f"{judged.name} ({-judged.loss:+.1%} [{-judged.high:+.1%}, {-judged.low:+.1%}])"
