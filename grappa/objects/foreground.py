"""The backbone's own idea of what is in front: from its patch tokens, without labels and without the domain.

Which tokens, and what is asked of them, was chosen by the overlap with boxes drawn by hand (README, Results).

Shapes: B batch, T tokens, D width, P patches in a grid of rows x columns, N images.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from grappa.backbone.vit import Adaptation, Backbone, build_backbone
from grappa.backbone.weights import load_state

Floats = NDArray[np.float64]
_BLOCK = 4096  # images whose boxes are found at once
MIN_GRID = 16  # patches a side; a box is as fine as they are


def seeing_finely(backbone: Backbone) -> Backbone:
    """Return the backbone for an input of at least 16 x 16 patches, its positions resampled."""
    vit: Any = backbone.vit
    side = max(backbone.spec.image_size, MIN_GRID * max(vit.patch_embed.patch_size))
    if side == backbone.spec.image_size:
        return backbone
    finer = build_backbone(replace(backbone.spec, image_size=side))
    load_state(finer.vit, vit.state_dict(), source="the backbone")
    return finer


def grid_of(backbone: Backbone) -> tuple[int, int]:
    """Return rows and columns of the backbone's patches."""
    vit: Any = backbone.vit
    rows, columns = vit.patch_embed.grid_size
    return int(rows), int(columns)


def foreground(backbone: Backbone, images: Tensor, adaptation: Adaptation | None = None) -> Tensor:
    """Return how much each patch differs from the border, (B, P) float32 in 0-2, large in front.

    The value is 1 - the cosine between the patch's token and the mean of the (L2-normalised) tokens at the border of
    the image, after two thirds of the blocks: what lies at all four sides is taken for the background.

    Args:
        images: (B, 3, S, S) float, normalised; the whole image, not its center.
    """
    vit: Any = backbone.vit
    hidden_BTD = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images))))
    for block in vit.blocks[: max(1, 2 * len(vit.blocks) // 3)]:
        hidden_BTD = block(hidden_BTD)
    tokens_BPD = F.normalize(hidden_BTD[:, vit.num_prefix_tokens :].float(), dim=-1)
    edge = torch.from_numpy(_border(grid_of(backbone))).to(tokens_BPD.device)
    background_BD = F.normalize(tokens_BPD[:, edge].mean(1), dim=-1)
    values: Tensor = 1 - (tokens_BPD * background_BD[:, None]).sum(-1)
    return values


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
    parts = [_block(values[at : at + _BLOCK], sizes[at : at + _BLOCK]) for at in range(0, len(values), _BLOCK)]
    boxes, confidences = zip(*parts, strict=True) if parts else ((np.empty((0, 4)),), (np.empty(0),))
    return np.concatenate(boxes), np.concatenate(confidences)


def _block(values: NDArray[np.float32], sizes: NDArray[np.int64]) -> tuple[Floats, Floats]:
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
