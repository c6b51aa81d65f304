"""Stages ``features`` and ``object_features``: the frozen backbone's L2-normalised embeddings of all images, and of
all object views, (N, D) float32."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from grappa.backbone.features import Batch, Read, extract_features
from grappa.backbone.frozen import Adaptation, Backbone, embed
from grappa.core import memory
from grappa.images.pixels import ImageRows
from grappa.pipeline.engine.context import StageContext
from grappa.pipeline.opening import (
    need_for_batches,
    open_backbone,
    open_objects,
    open_pixels,
    settle_device,
    settle_precision,
    shape_of,
)
from grappa.pipeline.store.checkpoints import RowCheckpoint


def run(context: StageContext) -> str:
    num_rows, width = extract(context, open_backbone(context), None, "features.npy", context.config.features.precision)
    return f"{num_rows} features of {width} dimensions"


def run_on_objects(context: StageContext) -> str:
    """Run the stage ``object_features``."""
    precision, cache = context.config.features.precision, open_objects(context)
    num_rows, width = extract(context, open_backbone(context), None, "features.npy", precision, cache=cache)
    return f"{num_rows} features of object views, of {width} dimensions"


def extract(
    context: StageContext,
    backbone: Backbone,
    adaptation: Adaptation | None,
    file: str,
    precision: str,
    *,
    cache: ImageRows | None = None,
    view: Batch | None = None,
    read: Read | None = None,
    row_shape: tuple[int, ...] | None = None,
) -> tuple[int, ...]:
    """Write the embeddings of all cached images into ``file``, resuming an interrupted try; return their shape (N, D).

    ``cache``: the pixels to embed, by default those of the images artifact. ``view`` replaces the crop that the
    backbone sees, ``read`` the embedding that is written (see ``grappa.backbone.features``). ``row_shape`` is the
    shape of one image's value, by default (D,).
    """
    cache, device = open_pixels(context) if cache is None else cache, settle_device(context)
    settled = settle_precision(context, precision, device)
    batch_size = context.resolve("inference_batch_size", context.config.compute.inference_batch_size)
    most = min(batch_size, len(cache))
    need_for_batches(context, device, memory.embedding(shape_of(backbone, [adaptation]), most, settled))
    shape, path = (len(cache), *(row_shape or (backbone.embedding_dim,))), context.path / file
    checkpoint = RowCheckpoint(context.path, seconds=context.config.compute.checkpoint_seconds)
    out, found = open_rows(context, checkpoint, path, shape) if context.leads else (None, 0)
    start = context.team.agree("start", found)
    with context.task("embedding", len(cache), done=start) as advance:
        done = start

        def written(number: int) -> None:
            nonlocal done
            done += number
            advance(number)
            if out is not None:
                checkpoint.offer(done, out)

        extract_features(
            backbone,
            cache,
            out,
            adaptation=adaptation,
            read=read or embed,
            view=view,
            start=start,
            batch_size=batch_size,
            device=device,
            precision=settled,
            num_workers=context.num_workers,
            progress=written,
            processes=context.processes,
        )
    if out is not None:
        out.flush()
    return shape


def open_rows(
    context: StageContext, checkpoint: RowCheckpoint, path: Path, shape: tuple[int, ...]
) -> tuple[np.memmap[Any, Any], int]:
    """Open the array file of unfinished work, or make a new one; return it and the number of rows it holds already."""
    start = context.trusted(checkpoint.path, lambda: checkpoint.load(path, shape), 0)
    return np.lib.format.open_memmap(path, mode="r+") if start else new_array(path, shape), start


def new_array(path: Path, shape: tuple[int, ...]) -> np.memmap[Any, Any]:
    """Create a memory-mapped float32 file and reserve its space now: a full disk is then an error, not a SIGBUS."""
    out = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    with path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return out
