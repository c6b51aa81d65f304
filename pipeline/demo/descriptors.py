"""Hand-made descriptions of an image: where its edges lie, and its colors. The ViT learns to tell them from a view.

Shapes: B batch, S image side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

NUM_CELLS = 8
NUM_ORIENTATIONS = 8
NUM_EDGES = NUM_CELLS**2 * NUM_ORIENTATIONS
NUM_VALUES = NUM_EDGES + NUM_CELLS**2 * 2


def describe(pixels: Tensor) -> Tensor:
    """Return (B, NUM_VALUES) float32 of (B, 3, S, S) float pixels: edges in 8 orientations, and chroma, in 8 x 8 cells.

    The edges are histograms of oriented gradients (Dalal & Triggs 2005) with one norm for the whole image and square
    roots of the shares; chroma is relative to the image's mean. Dark on light and light on dark describe alike.
    """
    return torch.cat([_edges(_smooth(_smooth(pixels.mean(dim=1, keepdim=True)))), _chroma(pixels)], dim=1)


@dataclass(frozen=True)
class Scale:
    """Mean (F,) and spread (F,) of the descriptors of one domain; edges share one spread, so does chroma."""

    mean: Tensor
    spread: Tensor

    @classmethod
    def of(cls, described: Tensor) -> Scale:
        """Return the scale of (N, F) descriptors."""
        edges, chroma = torch.split(described.var(dim=0), [NUM_EDGES, NUM_VALUES - NUM_EDGES])
        spread = torch.cat([variance.mean().sqrt().expand_as(variance) for variance in (edges, chroma)])
        return cls(described.mean(dim=0), spread)


def _edges(gray: Tensor) -> Tensor:
    padded = F.pad(gray, (1, 1, 1, 1), mode="replicate")
    across = padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]
    down = padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]
    centers = (torch.arange(NUM_ORIENTATIONS) * math.pi / NUM_ORIENTATIONS).view(1, -1, 1, 1)
    share = torch.cos(2 * (torch.atan2(down, across) - centers)).clamp(min=0) ** 2
    cells = F.adaptive_avg_pool2d(share * torch.hypot(across, down), NUM_CELLS).flatten(1)
    return F.normalize(cells, dim=1).sqrt()


def _chroma(pixels: Tensor) -> Tensor:
    red, green, blue = pixels.unbind(dim=1)
    opponents = torch.stack([red - green, 0.5 * (red + green) - blue], dim=1)
    cells = F.adaptive_avg_pool2d(opponents, NUM_CELLS)
    return (cells - cells.mean(dim=(2, 3), keepdim=True)).flatten(1)


def _smooth(pixels: Tensor) -> Tensor:
    return F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
