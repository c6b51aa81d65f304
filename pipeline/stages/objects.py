"""Stage ``objects``: a box for each image, the gate's decision on it, and the object views as a pixel cache.

``objects.parquet``: row i is row i of the image table: image_id, box_x0 .. box_y1 (float64 pixels of the EXIF-oriented
original; NaN: no box), confidence (0-1; NaN: no box), provider, accepted, reason. ``pixels/``: the object views; the
view of an image without an accepted box is the whole image. ``report.csv``: acceptance by domain.
``contact_sheet.jpg``: examples to look at. Domains are only reported; no provider reads them.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from grappa.core.randomness import id_numbers, key
from grappa.images.table import BOX_COLUMNS
from grappa.images.transforms import whole_batch
from grappa.objects.boxes import Gate, acceptance, random_boxes, refusals
from grappa.objects.foreground import boxes_of, foreground, grid_of, seeing_finely
from grappa.objects.grounding import detect, load_detector
from grappa.objects.sheet import contact_sheet
from grappa.objects.views import Framing, check_roots, write_object_views
from grappa.pipeline.engine.context import StageContext
from grappa.pipeline.engine.sources import NO_BOXES
from grappa.pipeline.opening import accepted_boxes, open_backbone, open_pixels, read_images, settle_device
from grappa.pipeline.stages.features import extract, open_rows
from grappa.pipeline.store.artifacts import SCRATCH_FOLDER
from grappa.pipeline.store.checkpoints import ArrayCheckpoint, RowCheckpoint
from grappa.pipeline.store.csv_cells import csv_bytes

Boxes = tuple[NDArray[np.float64], NDArray[np.float64]]

JPEG_QUALITY = 88


def run(context: StageContext) -> str:
    check_roots(context.originals())
    images = read_images(context.input("images"))
    table = _judged(context, images, *_found(context, images))
    _write_views(context, images, table)
    table.drop(columns=["domain", "height", "width"]).to_parquet(context.path / "objects.parquet", index=False)
    return _report(context, table)


def _found(context: StageContext, images: pd.DataFrame) -> Boxes:
    """Return the provider's boxes (N, 4) and confidences (N,); resumed work reads those that were found before."""
    scratch = context.path / SCRATCH_FOLDER
    scratch.mkdir(exist_ok=True)
    checkpoint = ArrayCheckpoint(scratch / "boxes.npy")
    kept = context.trusted(checkpoint.path, checkpoint.load, None)
    if kept is None:
        find = {"columns": _listed, "backbone": _seen, "random": _drawn, "grounding_dino": _detected}[
            context.config.objects.provider
        ]
        boxes, confidences = find(context, images)
        kept = np.concatenate([boxes, confidences[:, None]], axis=1)
        checkpoint.save(kept)
    return kept[:, :4], kept[:, 4]


def _listed(context: StageContext, images: pd.DataFrame) -> Boxes:
    """Return the boxes in the columns of the image table."""
    boxes = images[list(BOX_COLUMNS)].to_numpy(dtype=np.float64)
    if np.isnan(boxes).all():
        raise ValueError(NO_BOXES)
    return boxes, np.where(np.isnan(boxes[:, 0]), np.nan, 1.0)


def _seen(context: StageContext, images: pd.DataFrame) -> Boxes:
    """Return the boxes of the foreground that the frozen backbone sees."""
    backbone = seeing_finely(open_backbone(context))
    rows, columns = grid_of(backbone)
    file = f"{SCRATCH_FOLDER}/foreground.npy"
    view = partial(whole_batch, image_size=backbone.spec.image_size, num_workers=context.num_workers)
    precision = context.config.features.precision
    extract(context, backbone, None, file, precision, view=view, read=foreground, row_shape=(rows * columns,))
    values = np.load(context.path / file, mmap_mode="r", allow_pickle=False).reshape(-1, rows, columns)
    return boxes_of(values, images[["height", "width"]].to_numpy())


def _drawn(context: StageContext, images: pd.DataFrame) -> Boxes:
    """Return boxes with the sizes of those that the backbone sees, at random places."""
    boxes, confidences = _seen(context, images)
    ids = id_numbers(images["image_id"].tolist())
    sizes = images[["height", "width"]].to_numpy()
    drawn, rows = random_boxes(boxes, sizes, ids, key(context.config.objects.seed, "objects"))
    return drawn, confidences[rows]


def _detected(context: StageContext, images: pd.DataFrame) -> Boxes:
    """Return the box of the highest confidence that Grounding DINO finds in the cached pixels of each image."""
    settings, cache = context.config.objects, open_pixels(context)
    detector = load_detector(str(settings.model), settings.prompt, device=settle_device(context))
    path = context.path / SCRATCH_FOLDER / "detected.npy"
    checkpoint = RowCheckpoint(context.path, seconds=context.config.compute.checkpoint_seconds)
    out, start = open_rows(context, checkpoint, path, (len(cache), 5))
    with context.task("detecting", len(cache), done=start) as advance:
        for row in range(start, len(cache)):
            out[row] = detect(detector, cache.image(row))
            advance(1)
            checkpoint.offer(row + 1, out)
    sides = images[["width", "height"] * 2].to_numpy()
    found = out.astype(np.float64)
    return found[:, :4] * sides, found[:, 4]


def _judged(
    context: StageContext, images: pd.DataFrame, boxes: NDArray[np.float64], confidences: NDArray[np.float64]
) -> pd.DataFrame:
    """Return the table of objects.parquet, with the images' domain, height and width."""
    settings = context.config.objects
    gate = Gate(settings.min_confidence, settings.min_area, settings.max_area)
    reasons = refusals(boxes, confidences, images[["height", "width"]].to_numpy(), gate)
    table = images[["image_id", "domain", "height", "width"]].copy()
    table[list(BOX_COLUMNS)] = boxes
    return table.assign(confidence=confidences, provider=settings.provider, accepted=reasons == "", reason=reasons)


def _write_views(context: StageContext, images: pd.DataFrame, table: pd.DataFrame) -> None:
    config, boxes = context.config, accepted_boxes(table)
    with context.task("cutting views", len(images)) as advance:
        write_object_views(
            images,
            boxes,
            context.originals(),
            open_pixels(context),
            context.path / "pixels",
            cache=config.images.form,
            framing=Framing(config.objects.enlargement, config.objects.max_aspect, config.images.shorter_side),
            max_pixels=config.images.max_pixels,
            shard_size=config.images.shard_size,
            manifests=context.path / SCRATCH_FOLDER,
            num_workers=context.num_workers,
            progress=advance,
            dropped=context.say_dropped,
            written=context.written,
        )


def _report(context: StageContext, table: pd.DataFrame) -> str:
    counts = acceptance(table["domain"].to_numpy(), table["reason"].to_numpy(dtype=str))
    (context.path / "report.csv").write_bytes(csv_bytes(counts))
    sheet = contact_sheet(table, open_pixels(context))
    sheet.save(context.path / "contact_sheet.jpg", quality=JPEG_QUALITY)
    shares = counts[counts["outcome"] == "accepted"].set_index("domain")["share"]
    by_domain = ", ".join(f"{domain} {share:.0%}" for domain, share in shares.items())
    return f"{int(table['accepted'].sum())} of {len(table)} boxes accepted ({by_domain})"
