"""A tiny frozen backbone, a tiny pixel cache and tiny adaptor sets that several tests share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from grappa.adaptors import AdaptorSet
from grappa.backbone import Backbone, BackboneSpec, build_backbone
from grappa.pixels import PixelCache, write_index, write_shard

OPTIONS = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8}
HALF = (0.5, 0.5, 0.5)


def tiny_backbone(seed: int = 0) -> Backbone:
    """A ViT of two blocks, 32 wide, 32 px input, random weights."""
    torch.manual_seed(seed)
    return build_backbone(BackboneSpec("vit_tiny_patch16_224", 32, 1.0, HALF, HALF, OPTIONS)).float()


def tiny_set(seed: int, *, trained: bool = True) -> AdaptorSet:
    """A set for the tiny backbone; ``trained`` gives it non-zero up-projections."""
    adaptors = AdaptorSet(2, 32, 4, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    if trained:
        for adaptor in adaptors:
            torch.nn.init.normal_(adaptor.up.weight, std=0.5, generator=generator)
    return adaptors.requires_grad_(False)


def tiny_cache(folder: Path, num_images: int, *, seed: int = 0) -> PixelCache:
    """Images of 40 x 48 pixels in four groups of different color, written as a pixel cache."""
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 255, (4, 5, 6, 3))
    small = [base[i % 4] + rng.integers(-30, 30, (5, 6, 3)) for i in range(num_images)]
    images = [np.clip(s, 0, 255).astype(np.uint8).repeat(8, 0).repeat(8, 1) for s in small]
    folder.mkdir(parents=True, exist_ok=True)
    write_index(folder, write_shard(folder, 0, images))
    return PixelCache.open(folder)
