"""What lies in front, as the backbone's patch tokens tell it, without labels and without the domain.

Which tokens are compared, and how, was chosen by the overlap with boxes drawn by hand (RESULTS.md).

Shapes: B batch, T tokens, D width, P patches in a grid of rows x columns, N images.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from grappa.backbone.frozen import Adaptation, Backbone, build_backbone
from grappa.backbone.weights import load_state
from grappa.core.arrays import Floats

_BY_SIDES = np.zeros((3, 3, 3), dtype=bool)  # patches of one image that share a side belong together
_BY_SIDES[1] = ndimage.generate_binary_structure(2, 1)
_BLOCK = 4096  # images whose boxes are found at once
MIN_GRID = 16  # patches a side; a box is as fine as they are


def seeing_finely(backbone: Backbone) -> Backbone:
    """Return the backbone for an input of at least 16 x 16 patches, its positions resampled."""
    vit: Any = backbone.model
    side = max(backbone.spec.image_size, MIN_GRID * max(vit.patch_embed.patch_size))
    if side == backbone.spec.image_size:
        return backbone
    finer = build_backbone(replace(backbone.spec, image_size=side))
    load_state(finer.model, vit.state_dict(), source="the backbone")
    return finer


def grid_of(backbone: Backbone) -> tuple[int, int]:
    """Return rows and columns of the backbone's patches."""
    vit: Any = backbone.model
    rows, columns = vit.patch_embed.grid_size
    return int(rows), int(columns)


def foreground(backbone: Backbone, images: Tensor, adaptation: Adaptation | None = None) -> Tensor:
    """Return how much each patch differs from the border, (B, P) float32 in 0-2, large in front.

    The value is 1 - the cosine between the patch's token and the mean of the (L2-normalised) tokens at the border of
    the image, after two thirds of the blocks: the four sides of the image are taken for background.

    Args:
        images: (B, 3, S, S) float, normalised; the whole image, not its center.
    """
    vit: Any = backbone.model
    hidden_BTD = backbone.tokens(images)
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
    """Return a box around the part of each image that stands out most, and how clearly it stands out.

    A patch is in front if its value is above Otsu's threshold of its image. Patches in front that share a side form a
    part; the box is around the part with the largest sum of values above the threshold.

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
    """Return for each line of (N, P) the threshold with most variance between its two sides, and its share."""
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
    """Return the connected part of each (rows, columns) of positive values whose sum is the largest, (N, ...) bool.

    Of parts with equal sums it is the one whose last patch, row by row, comes first.
    """
    mask = above > 0
    parts, number = ndimage.label(mask, structure=_BY_SIDES)
    sums = np.bincount(parts.ravel(), weights=np.where(mask, above, 0).ravel(), minlength=number + 1)
    last = np.zeros(number + 1, dtype=np.int64)
    np.maximum.at(last, parts.ravel(), np.arange(parts.size))
    strength = np.where(mask, sums[parts], 0)
    strongest = mask & (strength == strength.max(axis=(1, 2), keepdims=True))
    first = np.where(strongest, last[parts], parts.size).min(axis=(1, 2), keepdims=True)
    return strongest & (last[parts] == first)


def _extent(lines: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the first and one past the last True of each line of (N, M)."""
    return lines.argmax(axis=1), lines.shape[1] - lines[:, ::-1].argmax(axis=1)
