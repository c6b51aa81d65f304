"""Embedding many images: copies get the same bits, in whatever batch they fall."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from grappa.backbone.features import extract_features
from grappa.images.pixels import PixelCache, write_index
from tests.helpers.tiny import tiny_backbone, tiny_cache

COPIES = [0, 1, 1, 1, 2, 3, 4, 4]  # images of the tiny cache, by row


def with_copies(folder: Path) -> PixelCache:
    index = tiny_cache(folder, 5).index
    write_index(folder, index[COPIES])
    return PixelCache.open(folder)


def by_batch(backbone: object, images: torch.Tensor, adaptation: object) -> torch.Tensor:
    """A model whose rounding depends on the batch, to the extreme."""
    return images.mean((1, 2, 3))[:, None].expand(-1, 32) + len(images) + torch.arange(len(images))[:, None]


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("start", [0, 6])
def test_copies_get_the_same_bits(tmp_path: Path, batch_size: int, start: int) -> None:
    cache, out = with_copies(tmp_path), np.zeros((len(COPIES), 32), np.float32)
    extract_features(tiny_backbone(), cache, out, read=by_batch, batch_size=batch_size)
    if start:
        extract_features(tiny_backbone(), cache, out, read=by_batch, batch_size=batch_size, start=start)
    for row, image in enumerate(COPIES):
        np.testing.assert_array_equal(out[row], out[COPIES.index(image)])
    assert len({each.tobytes() for each in out}) == 5
