"""What the gates are measured on: features with the structure of real ones, photograph-like JPEG files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from grappa.backbone.frozen import Backbone, build_backbone
from grappa.backbone.spec import BackboneSpec

HALF = (0.5, 0.5, 0.5)
NOISE = 0.4


def features(number: int, width: int, file: Path | None, seed: int = 0) -> NDArray[np.float32]:
    """Return (number, width) float32 unit vectors.

    Rows of ``file`` (N, D) repeated side by side and one below the other, with a little noise; without a file drawn:
    domains, classes within them, images within these, over a spectrum that falls off as that of a ViT's features does.
    """
    random = np.random.default_rng(seed)
    base = _drawn(number, width, random) if file is None else np.load(file, mmap_mode="r", allow_pickle=False)
    rows = np.asarray(base[np.arange(number) % len(base)], dtype=np.float32)
    rows = np.tile(rows, (1, -(-width // rows.shape[1])))[:, :width]
    if file is not None:
        rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        rows += random.standard_normal(rows.shape, dtype=np.float32) * np.float32(NOISE / width**0.5)
    units: NDArray[np.float32] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return units


def _drawn(number: int, width: int, random: np.random.Generator) -> NDArray[np.float32]:
    spectrum = (1.0 / np.sqrt(1.0 + np.arange(width) / 8.0)).astype(np.float32)
    rows = np.zeros((number, width), dtype=np.float32)
    for num_groups, share in ((6, 0.6), (300, 0.6), (10_000, 0.4), (number, 0.5)):
        centers = random.standard_normal((num_groups, width), dtype=np.float32) * spectrum * np.float32(share)
        rows += centers[random.integers(0, num_groups, number)]
    return rows


def backbone(quick: bool, name: str = "vit_small_patch16_224", size: int = 224) -> Backbone:
    """Return a ViT with random weights (its speed is that of a trained one); a tiny one for ``quick``."""
    options = {"depth": 2, "embed_dim": 64, "num_heads": 2} if quick else {}
    return build_backbone(BackboneSpec(name, 64 if quick else size, 0.875, HALF, HALF, options))


def write_jpegs(folder: Path, number: int, seed: int = 0) -> list[Path]:
    """Write JPEG files of 500 x 375 pixels as detailed as photographs (about 50 kB each)."""
    random = np.random.default_rng(seed)
    files = []
    for index in range(number):
        image = np.zeros((375, 500, 3), dtype=np.float32)
        for side in (4, 12, 40, 125):
            coarse = random.normal(0.0, 60.0 / side**0.3, (side * 3 // 4, side, 3)).astype(np.float32)
            grown = [Image.fromarray(coarse[:, :, c]).resize((500, 375), Image.Resampling.BICUBIC) for c in range(3)]
            image += np.stack([np.asarray(channel) for channel in grown], axis=2)
        pixels = np.clip(image + 128.0, 0, 255).astype(np.uint8)
        files.append(folder / f"{index:05d}.jpg")
        Image.fromarray(pixels).save(files[-1], quality=90)
    return files
