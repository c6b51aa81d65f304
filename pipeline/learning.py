"""Helpers of the stages that train: the library's options from a section of the configuration, and one training."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

from grappa.backbone.spec import BackboneSpec
from grappa.core.randomness import id_numbers
from grappa.images.transforms import Augmentation
from grappa.method.adaptors import adaptor_set_sizes, automatic_rank
from grappa.pipeline.config.trainings import AdaptorSetSettings, Augmented, Trained
from grappa.pipeline.engine.context import StageContext
from grappa.pipeline.opening import need_for_batches, open_pixels, read_images, settle_device, settle_precision
from grappa.pipeline.store.checkpoints import FileCheckpoint, SharedCheckpoint
from grappa.pipeline.store.storage import atomic_write_text
from grappa.pipeline.store.trackers import Tracked, identity_of, tracked
from grappa.pipeline.store.work import Work
from grappa.training.batches import Runtime, Views
from grappa.training.loop import FitResult, Optimization


def optimization(settings: Trained) -> Optimization:
    """Return the options of the optimization of a training: its length, batches and rates."""
    return Optimization(
        num_epochs=settings.num_epochs,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        warmup=settings.warmup,
    )


def augmentation(settings: Augmented) -> Augmentation:
    """Return the options of the augmentation: how strongly a view differs from its image."""
    return Augmentation(
        min_crop=settings.min_crop,
        flip=settings.flip,
        brightness=settings.brightness,
        contrast=settings.contrast,
        saturation=settings.saturation,
        grayscale=settings.grayscale,
    )


def sizes_of_set(settings: AdaptorSetSettings, width: int) -> tuple[int, int]:
    """Return bottleneck and in-context rank of an adaptor set for a backbone's width; 0 for adaptors that it lacks."""
    rank = automatic_rank(width) if settings.in_context_rank == "auto" else settings.in_context_rank
    return adaptor_set_sizes(settings.kind, settings.bottleneck_dim, rank)


def open_views(context: StageContext, settings: Augmented, spec: BackboneSpec) -> Views:
    """Return the views of the cached images that a training of the backbone draws augmented images from."""
    return Views(
        cache=open_pixels(context),
        ids=id_numbers(read_images(context.input("images"))["image_id"].tolist()),
        image_size=spec.image_size,
        augmentation=augmentation(settings),
        num_workers=context.num_workers,
        crop_mode=spec.crop_mode,
        interpolation=spec.interpolation,
    )


@contextmanager
def training_task(
    context: StageContext, settings: Trained, num_train: int, need: Callable[[int, str], int], unit: str = "images"
) -> Iterator[Runtime]:
    """Yield device, precision, checkpoint, progress and processes of a training.

    An epoch has only whole batches; images that do not fill a batch are left out. ``need(batch_size, precision)``
    returns the bytes that the training needs on a CPU.
    """
    device = settle_device(context)
    precision = settle_precision(context, settings.precision, device)
    file = FileCheckpoint(context.path, seconds=context.config.compute.checkpoint_seconds)
    checkpoint = file if context.team.size == 1 else SharedCheckpoint(file, context.processes)
    batch = min(settings.batch_size, num_train)
    need_for_batches(context, device, need(batch, precision))
    total = settings.num_epochs * (num_train // batch) * batch
    done = context.trusted(file.path, file.steps_done, 0) if context.leads else 0
    with context.task("training", total, unit, done=done * batch) as advance, _trackers(context) as recorded:
        yield Runtime(device, precision, checkpoint, lambda steps: advance(steps * batch), context.processes, recorded)


def _trackers(context: StageContext) -> AbstractContextManager[Callable[[Mapping[str, float]], None] | None]:
    """Return the trackers of ``compute.trackers``; only the process that leads has some."""
    names = context.config.compute.trackers if isinstance(context.work, Work) else ()
    fingerprint = context.work.fingerprint if isinstance(context.work, Work) else {}
    settings = dict(fingerprint.get("config", {}))
    training = Tracked(context.run.root, context.name, settings, identity_of(fingerprint))
    return tracked(names, training, context.progress.say)


def write_metrics(context: StageContext, result: FitResult) -> None:
    """Write the metrics of the steps as JSON lines; they hold deterministic values only."""
    atomic_write_text(context.path / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in result.metrics))
