"""Stages ``features`` and ``object_features``: the frozen backbone's L2-normalised embeddings of all images, and of
all object views, (N, D) float32; and stage ``given_features``: those that a model of another run made of the images.

The first two, and the stage ``embeddings``, can be computed by ranges of their rows, each on a machine of its own
(``own_rows``); the stage then joins the rows that the ranges hold (``join_rows``). The bytes are those of one pass.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import DTypeLike, NDArray

from grappa.backbone.features import Batch, Read, extract_features
from grappa.backbone.frozen import Adaptation, Backbone, embed
from grappa.core.memory import FLOAT, WORK
from grappa.images.pixels import ChosenRows, ImageRows, repeated_rows
from grappa.pipeline.engine.context import StageContext
from grappa.pipeline.engine.externals import GIVEN_FILE, given_embeddings
from grappa.pipeline.engine.live.row_reuse import DIGESTS_FILE, Reuse, plan_reuse, row_digests
from grappa.pipeline.engine.status import Judge, read_config
from grappa.pipeline.opening import (
    open_backbone,
    open_objects,
    open_pixels,
    read_images,
    settle_device,
    settle_passes,
    settle_precision,
)
from grappa.pipeline.store.artifacts import SCRATCH_FOLDER, published, quoted
from grappa.pipeline.store.checkpoints import RowCheckpoint

FILE = "features.npy"
BLOCK_ROWS = 4096
ID_BYTES = 256  # of an image id, as it is looked up


def run(context: StageContext) -> str:
    number, width, note = _features(context, open_pixels(context))
    return f"{number} features of {width} dimensions{note}"


def run_on_objects(context: StageContext) -> str:
    """Run the stage ``object_features``."""
    number, width, note = _features(context, open_objects(context))
    return f"{number} features of object views, of {width} dimensions{note}"


def run_on_given(context: StageContext) -> str:
    """Run the stage ``given_features``: a copy, by image id, of the embeddings that ``clusters.embeddings`` names.

    ValueError where they are not fresh in their run, or where that run lacks images of this one.
    """
    run, node = given_embeddings(context.config)
    kind = Judge(run, read_config(run)).state(node).kind
    if kind != "fresh":
        raise ValueError(f"clusters.embeddings: {node} in {run.root} is {kind}; run `grappa run {quoted(run.root)}`")
    vectors = np.load(published(run, node, GIVEN_FILE) / GIVEN_FILE, mmap_mode="r", allow_pickle=False)
    number, width = vectors.shape
    context.need_memory(2 * number * ID_BYTES + BLOCK_ROWS * width * FLOAT + WORK)
    known = pd.Index(read_images(published(run, "images", "images.parquet"))["image_id"])
    rows = known.get_indexer(read_images(context.input("images"))["image_id"])
    lacking = int((rows < 0).sum())
    if lacking:
        raise ValueError(
            f"clusters.embeddings: {run.root} has {number} images and lacks {lacking} of the {len(rows)} of this run; "
            "name a run of the same images"
        )
    out = new_array(context.path / FILE, (len(rows), width))
    for start in range(0, len(rows), BLOCK_ROWS):
        out[start : start + BLOCK_ROWS] = vectors[rows[start : start + BLOCK_ROWS]]
    out.flush()
    return f"{len(rows)} embeddings of {width} dimensions, by {node.instance} of {run.root}"


def _features(context: StageContext, pixels: ImageRows) -> tuple[int, int, str]:
    """Write ``features.npy``; rows of a former result that are still true are taken over (``engine.live.row_reuse``).

    Returns N, D, and what was taken over in words.
    """
    if context.ranges:
        join_rows(context, DIGESTS_FILE)
        number, width = join_rows(context, FILE, pixels)
        return number, width, f", joined from {len(context.ranges)} ranges"
    backbone, precision = open_backbone(context), context.config.features.precision
    cache = own_rows(context, pixels)
    digests = row_digests(cache) if context.leads else None
    alone = context.team.size == 1 and not context.node.rows
    reuse = _planned_reuse(context, digests, precision) if alone and digests is not None else None
    number = _take_over(context, backbone, cache, reuse) if reuse else 0
    if not number:
        extract(context, backbone, None, FILE, precision, cache=cache)
    if digests is not None:
        np.save(context.path / DIGESTS_FILE, digests, allow_pickle=False)
    return len(cache), backbone.embedding_dim, f", {number} of them taken over" if number else ""


def own_rows(context: StageContext, pixels: ImageRows) -> ImageRows:
    """Return the images that this process, alone or with its team, embeds: all, or those of its range of rows."""
    if context.node.rows is None:
        return pixels
    batch_size = context.resolve("inference_batch_size", context.config.compute.inference_batch_size)
    return ChosenRows(pixels, np.arange(*context.node.rows.bounds(len(pixels), batch_size)))


def join_rows(context: StageContext, file: str, pixels: ImageRows | None = None) -> tuple[int, ...]:
    """Write the rows that the ranges hold in ``file``, one range after the other, and return the shape (N, ...).

    ``pixels``: copies of one image get the same bits, as in one pass, where a border of ranges lies between them.
    """
    parts = [np.load(folder / file, mmap_mode="r", allow_pickle=False) for folder in context.ranges]
    ends = np.cumsum([len(part) for part in parts])
    out = new_array(context.path / file, (int(ends[-1]), *parts[0].shape[1:]), parts[0].dtype)
    with context.task("joining", len(out), "rows") as advance:
        for part, end in zip(parts, ends.tolist(), strict=True):
            for start in range(0, len(part), BLOCK_ROWS):
                block = part[start : start + BLOCK_ROWS]
                out[end - len(part) + start :][: len(block)] = block
                advance(len(block))
    if pixels is not None:
        for first, row in _copies_over(pixels, [end for end in ends.tolist() if 0 < end < len(out)]):
            out[row] = out[first]
    out.flush()
    return out.shape


def _copies_over(pixels: ImageRows, borders: list[int]) -> Iterator[tuple[int, int]]:
    """Yield (first, row) for the rows from each border on whose pixels are those of the row ``first`` before it."""
    for border in borders:
        row = border
        while row < len(pixels) and repeated_rows(ChosenRows(pixels, np.array([border - 1, row]))):
            yield border - 1, row
            row += 1


def _planned_reuse(context: StageContext, digests: NDArray[np.uint8], precision: str) -> Reuse | None:
    batch_size = context.resolve("inference_batch_size", context.config.compute.inference_batch_size)
    settle_precision(context, precision, settle_device(context))
    return plan_reuse(context, FILE, digests, batch_size)


def _take_over(context: StageContext, backbone: Backbone, cache: ImageRows, reuse: Reuse) -> int:
    """Write the former rows and the computed ones into ``features.npy``; return how many were taken over.

    Nothing is written, and 0 returned, where rows that were computed again have other bits.
    """
    new = Path(SCRATCH_FOLDER, FILE)
    (context.path / SCRATCH_FOLDER).mkdir(exist_ok=True)
    precision, chosen = context.config.features.precision, ChosenRows(cache, reuse.computed)
    extract(context, backbone, None, str(new), precision, cache=chosen)
    found = np.load(context.path / new, mmap_mode="r", allow_pickle=False)
    RowCheckpoint(context.path, seconds=0).path.unlink(missing_ok=True)
    if not reuse.agrees(found):
        context.log({"reuse": "rows computed again have other bits: all rows are computed"})
        return 0
    out = new_array(context.path / FILE, (len(cache), backbone.embedding_dim))
    reuse.fill(out, found)
    for row, first in repeated_rows(cache):
        out[row] = out[first]
    out.flush()
    return int((reuse.rows >= 0).sum())


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
    cache = open_pixels(context) if cache is None else cache
    device, settled, batch_size = settle_passes(context, backbone, adaptation, precision, len(cache))
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


def new_array(path: Path, shape: tuple[int, ...], dtype: DTypeLike = np.float32) -> np.memmap[Any, Any]:
    """Create a memory-mapped file and reserve its space now: a full disk is then an error, not a SIGBUS."""
    out = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    with path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return out
