"""Random views for the self-supervised pretraining of the demo's ViT: pose, colors, blur and noise, in batches.

Shapes: B batch, S image side.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

_LUMA = torch.tensor([0.299, 0.587, 0.114])


def random_views(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return one view an image, (B, 3, S, S) float32 near -1..1, of (B, 3, S, S) uint8 images.

    A view is a turned and sheared crop of 70 to 100 % of the area, with other colors, blur and noise. It is
    never mirrored: most signs are other signs in a mirror.
    """
    views = images.float() / 127.5 - 1.0
    views = _posed(views, generator)
    views = _recolored(views, generator)
    views = _blurred(views, generator)
    amount = 0.06 * torch.rand(len(views), 1, 1, 1, generator=generator)
    return views + amount * torch.randn(views.shape, generator=generator)


def _uniform(num: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(num, generator=generator)


def _posed(views: Tensor, generator: torch.Generator) -> Tensor:
    num = len(views)
    scale = _uniform(num, 0.85, 1.05, generator)
    angle = _uniform(num, -0.12, 0.12, generator)
    shear = _uniform(num, -0.1, 0.1, generator)
    stretch = torch.exp(_uniform(num, -0.08, 0.08, generator))
    cos, sin = scale * torch.cos(angle), scale * torch.sin(angle)
    matrix = torch.zeros(num, 2, 3)
    matrix[:, 0, 0], matrix[:, 0, 1] = cos * stretch, -sin + shear * scale
    matrix[:, 1, 0], matrix[:, 1, 1] = sin, cos / stretch
    matrix[:, :, 2] = (1.05 - scale)[:, None] * (2 * torch.rand(num, 2, generator=generator) - 1)
    grid = F.affine_grid(matrix, list(views.shape), align_corners=False)
    return F.grid_sample(views, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def _recolored(views: Tensor, generator: torch.Generator) -> Tensor:
    """Apply one random 3 x 3 color matrix an image: hue turned, saturation, contrast; then shift the brightness."""
    num = len(views)
    gray = _LUMA.expand(3, 3)
    saturation = _uniform(num, 0.3, 1.4, generator) * (torch.rand(num, generator=generator) > 0.15)
    contrast = torch.exp(_uniform(num, -0.3, 0.3, generator))
    colors = gray + saturation[:, None, None] * (_hue_turn(0.05 * torch.randn(num, generator=generator)) - gray)
    matrix = contrast[:, None, None] * colors
    shift = 0.12 * torch.randn(num, 1, 1, 1, generator=generator)
    return torch.einsum("bij,bjhw->bihw", matrix, views).clamp(-1.5, 1.5) + shift


def _hue_turn(turns: Tensor) -> Tensor:
    """Return (B, 3, 3): rotations of color space about the gray axis by ``turns`` of a full circle."""
    angle = (2 * math.pi * turns)[:, None, None]
    third = torch.full((3, 3), 1.0 / 3.0)
    cross = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / math.sqrt(3.0)
    return torch.cos(angle) * torch.eye(3) + torch.sin(angle) * cross + (1 - torch.cos(angle)) * third


def _blurred(views: Tensor, generator: torch.Generator) -> Tensor:
    share = _uniform(len(views), 0.0, 1.0, generator)[:, None, None, None]
    share = share * (torch.rand(len(views), 1, 1, 1, generator=generator) < 0.3)
    soft = F.avg_pool2d(F.pad(views, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    return views + share * (soft - views)
