"""The backbone's own idea of what is in front: from its patch tokens, without labels and without the domain.

Shapes: B batch, T tokens, D width, P patches in a grid of rows x columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from grappa.backbone import Adaptation, Backbone
from grappa.devices import autocast
from grappa.pixels import PixelCache
from grappa.transforms import normalize, whole_batch
from grappa.weights import BackboneError

MIN_GRID = 4
_BATCH_SIZE = 64  # of the mean: a sum's last bits depend on it
Floats = NDArray[np.float64]


def grid_of(backbone: Backbone) -> tuple[int, int]:
    """Return rows and columns of the backbone's patches.

    Raises:
        BackboneError: too few to tell where something is.
    """
    vit: Any = backbone.vit
    rows, columns = vit.patch_embed.grid_size
    if min(rows, columns) < MIN_GRID:
        raise BackboneError(
            f"the backbone sees an image as {rows} x {columns} patches, too few to find an object; set a larger "
            "backbone.image_size, or another objects.provider"
        )
    return int(rows), int(columns)


def mean_tokens(
    backbone: Backbone,
    cache: PixelCache,
    rows: NDArray[np.int64],
    *,
    device: torch.device | None = None,
    precision: str = "float32",
    num_workers: int = 1,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Return the mean patch token of some images at each place, (P, D) float32: what a token says of its place alone.

    Args:
        rows: of the cache, a sample of the images; the other arguments are those of ``grappa.features``.
    """
    device = device or torch.device("cpu")
    backbone = backbone.on(device)
    total = torch.zeros(())
    for start in range(0, len(rows), _BATCH_SIZE):
        part = rows[start : start + _BATCH_SIZE]
        images = whole_batch(cache, part, image_size=backbone.spec.image_size, num_workers=num_workers)
        with torch.inference_mode(), autocast(device, precision):
            tokens = _patch_tokens(backbone, normalize(images.to(device), backbone.spec.mean, backbone.spec.std))
        total = total + tokens.sum(0).cpu()
        if progress:
            progress(len(part))
    return total / len(rows)


def foreground(
    backbone: Backbone, images: Tensor, adaptation: Adaptation | None = None, *, means: Tensor | None = None
) -> Tensor:
    """Return each patch's place on the image's main axis, (B, P) float32, larger in front.

    The axis is the first principal component of the image's own L2-normalised patch tokens after the final norm, from
    which the mean token at their place was taken: without that it is mostly the height in the image. It is turned so
    that the border of the image lies low.

    Args:
        images: (B, 3, S, S) float, normalised; the whole image, not its center. means: (P, D) of ``mean_tokens``.
    """
    tokens_BPD = _patch_tokens(backbone, images)
    with torch.autocast(images.device.type, enabled=False):
        tokens_BPD = tokens_BPD if means is None else tokens_BPD - means.to(images.device)
        tokens_BPD = tokens_BPD - tokens_BPD.mean(1, keepdim=True)
        squares, vectors = torch.linalg.eigh(tokens_BPD @ tokens_BPD.transpose(1, 2))
        values = vectors[:, :, -1] * squares[:, -1:].clamp_min(0).sqrt()
    edge = torch.from_numpy(_border(grid_of(backbone))).to(values.device)
    low = values[:, edge].mean(1, keepdim=True) <= values[:, ~edge].mean(1, keepdim=True)
    return torch.where(low, values, -values)


def _patch_tokens(backbone: Backbone, images: Tensor) -> Tensor:
    vit: Any = backbone.vit
    hidden_BTD = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images))))
    for block in vit.blocks:
        hidden_BTD = block(hidden_BTD)
    return F.normalize(vit.norm(hidden_BTD)[:, vit.num_prefix_tokens :].float(), dim=-1)


def _border(grid: tuple[int, int]) -> NDArray[np.bool_]:
    edge = np.ones(grid, dtype=bool)
    edge[1:-1, 1:-1] = False
    return edge.ravel()


def boxes_of(values: NDArray[np.float32], sizes: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """Return a box around the largest part of each image that stands out, and how clearly it does.

    A patch is in front if it lies above Otsu's threshold of its image; of the connected parts (by sides) the one with
    the largest sum above the threshold counts.

    Args:
        values: (N, rows, columns) foreground values; sizes: (N, 2) height and width of the images.

    Returns:
        boxes (N, 4) float64 in pixels of those sizes, four NaN where all values are equal; confidences (N,) in 0-1:
        the share of the values' variance that lies between front and back; NaN where there is no box.
    """
    _, num_rows, num_columns = values.shape
    thresholds, confidences = _otsu(values.reshape(len(values), -1).astype(np.float64))
    part = _largest_part(values - thresholds[:, None, None])
    (tops, bottoms), (lefts, rights) = _extent(part.max(axis=2)), _extent(part.max(axis=1))
    height, width = sizes.T
    x, y = width / num_columns, height / num_rows
    boxes = np.stack([lefts * x, tops * y, rights * x, bottoms * y], axis=1)
    boxes[:, 2:] = np.minimum(boxes[:, 2:], sizes[:, ::-1])
    nothing = ~part.any(axis=(1, 2))
    boxes[nothing], confidences[nothing] = np.nan, np.nan
    return boxes, confidences


def _otsu(values: Floats) -> tuple[Floats, Floats]:
    """Return the threshold of each line of (N, P) that leaves most variance between both sides, and its share (N,)."""
    ordered = np.sort(values, axis=1)
    number = values.shape[1]
    low = np.arange(1, number)
    sums = ordered.cumsum(axis=1)
    below = sums[:, :-1] / low
    over = (sums[:, -1:] - sums[:, :-1]) / (number - low)
    between = low * (number - low) / number**2 * (over - below) ** 2
    best = between.argmax(axis=1)
    rows, variance = np.arange(len(values)), values.var(axis=1)
    share = np.divide(between[rows, best], variance, out=np.zeros(len(values)), where=variance > 0)
    return (ordered[rows, best] + ordered[rows, best + 1]) / 2, np.clip(share, 0, 1)


def _largest_part(above: Floats) -> NDArray[np.bool_]:
    """Return the connected part of each (rows, columns) of positive values whose sum is the largest, (N, ...) bool."""
    mask = above > 0
    labels = np.where(mask, np.arange(1, mask[0].size + 1).reshape(mask.shape[1:]), 0)
    while True:
        spread = np.where(mask, _largest_nearby(labels), 0)
        if (spread == labels).all():
            break
        labels = spread
    sums = np.zeros((len(above), mask[0].size + 1))
    np.add.at(sums, (np.arange(len(above))[:, None, None], labels), np.maximum(above, 0))
    best = sums[:, 1:].argmax(axis=1) + 1
    return mask & (labels == best[:, None, None])


def _largest_nearby(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the largest of each label and its four neighbors."""
    padded = np.pad(labels, ((0, 0), (1, 1), (1, 1)))
    up, down, left, right = padded[:, :-2, 1:-1], padded[:, 2:, 1:-1], padded[:, 1:-1, :-2], padded[:, 1:-1, 2:]
    nearby: NDArray[np.int64] = np.maximum.reduce([labels, up, down, left, right])
    return nearby


def _extent(lines: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the first and one past the last True of each line of (N, M)."""
    return lines.argmax(axis=1), lines.shape[1] - lines[:, ::-1].argmax(axis=1)
