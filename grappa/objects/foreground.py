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

from grappa.backbone.adapting.dry_run import without_tensors
from grappa.backbone.frozen import Adaptation, Backbone, build_backbone
from grappa.backbone.vit import reads_class_token
from grappa.backbone.weights import BackboneError, load_state
from grappa.core.arrays import Floats
from grappa.core.memory import FLOAT
from grappa.core.printing import sentence

_BY_SIDES = np.zeros((3, 3, 3), dtype=bool)  # patches of one image that share a side belong together
_BY_SIDES[1] = ndimage.generate_binary_structure(2, 1)
_BLOCK = 4096  # images whose boxes are found at once
MIN_GRID = 16  # patches a side; a box is as fine as they are
PART = 12 * 2**20  # bytes of a block's widest tensor on a CPU: one above 32 MiB is new memory to each operation


def seeing_finely(backbone: Backbone) -> Backbone:
    """Return the backbone for an input of at least 16 x 16 patches, its positions resampled.

    A model that takes no larger images, or whose tables of positions are not those of another size, stays as it is: its
    boxes are as coarse as its own grid.
    """
    size, rows = backbone.spec.image_size, grid_of(backbone)[0]
    side = max(size, -(-MIN_GRID * size // rows))
    if side == size:
        return backbone
    try:
        finer = build_backbone(replace(backbone.spec, image_size=side))
        load_state(finer.model, backbone.model.state_dict(), source="the backbone")
        return finer if grid_of(finer)[0] > rows else backbone
    except BackboneError:
        return backbone


def grid_of(backbone: Backbone) -> tuple[int, int]:
    """Return rows and columns of the backbone's patches; BackboneError where it gives no maps of an image."""
    model: Any = backbone.model
    if reads_class_token(model):
        rows, columns = model.patch_embed.grid_size
    else:
        rows, columns = _shape_of_map(backbone)
    return int(rows), int(columns)


def _shape_of_map(backbone: Backbone) -> tuple[int, int]:
    size = backbone.spec.image_size
    try:
        with torch.no_grad():
            try:
                found = _map(without_tensors(backbone.model), torch.empty((1, 3, size, size), device="meta"))
            except RuntimeError:  # the model reads values
                device = next(backbone.parameters()).device
                found = _map(backbone.model, torch.zeros((1, 3, size, size), device=device))
    except (TypeError, AttributeError, NotImplementedError, AssertionError) as error:
        raise BackboneError(
            f"{backbone.spec.name} gives no maps of an image ({sentence(error, limit=100)}), in which the foreground "
            "is looked for; set objects.provider to columns or grounding_dino, or choose another backbone"
        ) from error
    return found.shape[2], found.shape[3]


def foreground(backbone: Backbone, images: Tensor, adaptation: Adaptation | None = None) -> Tensor:
    """Return how much each patch differs from the border, (B, P) float32 in 0-2, large in front.

    The value is 1 - the cosine between the patch's token and the mean of the (L2-normalised) tokens at the border of
    the image, after two thirds of the blocks (of a model in stages, of its stages): the four sides of the image are
    taken for background.

    Args:
        images: (B, 3, S, S) float, normalised; the whole image, not its center.
    """
    parts = images.split(_part(backbone, images))
    return torch.cat([_values(*_patches(backbone, part)) for part in parts])


def _part(backbone: Backbone, images: Tensor) -> int:
    """Return how many images are passed at once: on a CPU as many as keep a block's tensors small (``PART``)."""
    if images.device.type != "cpu" or not reads_class_token(backbone.model):
        return max(1, len(images))
    rows, columns = grid_of(backbone)
    return max(1, PART // (rows * columns * 4 * backbone.embedding_dim * FLOAT))


def _values(patches_BPD: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return ``foreground``'s values of the tokens of patches."""
    tokens_BPD = F.normalize(patches_BPD.float(), dim=-1)
    edge = torch.from_numpy(_border(grid)).to(tokens_BPD.device)
    background_BD = F.normalize(tokens_BPD[:, edge].mean(1), dim=-1)
    values: Tensor = 1 - (tokens_BPD * background_BD[:, None]).sum(-1)
    return values


def _patches(backbone: Backbone, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Return the tokens of the patches, (B, P, D), row by row, and the rows and columns of their grid."""
    model: Any = backbone.model
    if not reads_class_token(model):
        found = _map(model, images)
        return found.flatten(2).transpose(1, 2), (found.shape[2], found.shape[3])
    hidden_BTD = backbone.tokens(images)
    for block in model.blocks[: max(1, 2 * len(model.blocks) // 3)]:
        hidden_BTD = block(hidden_BTD)
    return hidden_BTD[:, model.num_prefix_tokens :], grid_of(backbone)


def _map(model: Any, images: Tensor) -> Tensor:
    """Return the map (B, D, rows, columns) that timm gives of a model after two thirds of its blocks or stages."""
    index = max(1, 2 * len(model.feature_info) // 3) - 1
    maps = model.forward_intermediates(
        images, indices=[index], norm=False, stop_early=True, output_fmt="NCHW", intermediates_only=True
    )
    found: Tensor = maps[0]
    return found


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
