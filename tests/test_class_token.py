"""The last block for the class token alone equals the whole block, value and gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import HALF, OPTIONS, tiny_backbone, tiny_set

from grappa.backbone import BackboneSpec, build_backbone
from grappa.class_token import can_skip_patches, class_token

HIDDEN = torch.randn(3, 17, 32, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "options", [{}, {"qk_norm": True}, {"init_values": 0.5}, {"qkv_bias": False}, {"pre_norm": True}]
)
def test_it_equals_the_whole_block(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    backbone = build_backbone(BackboneSpec("vit_tiny_patch16_224", 32, 1.0, HALF, HALF, {**OPTIONS, **options}))
    block = backbone.vit.blocks[-1]
    assert can_skip_patches(block)
    torch.testing.assert_close(class_token(block, HIDDEN), block(HIDDEN)[:, :1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(backbone(IMAGES), backbone.vit(IMAGES), rtol=1e-5, atol=1e-6)


def test_adaptors_get_the_same_gradients() -> None:
    backbone, grads = tiny_backbone(), []
    for skip in (True, False):
        adaptors = tiny_set(0).requires_grad_()
        if not skip:
            type(backbone.vit.blocks[-1]).__name__ = "Whole"
        try:
            backbone(IMAGES, list(adaptors)).square().sum().backward()
        finally:
            type(backbone.vit.blocks[-1]).__name__ = "Block"
        grads.append([parameter.grad for parameter in adaptors.parameters()])
    for with_skip, without in zip(*grads, strict=True):
        torch.testing.assert_close(with_skip, without, rtol=1e-4, atol=1e-5)


def test_other_blocks_are_run_whole() -> None:
    spec = BackboneSpec("vit_small_patch16_36x1_224", 32, 1.0, HALF, HALF, {"depth": 2})
    assert can_skip_patches(build_backbone(spec).vit.blocks[-1])
    parallel = build_backbone(BackboneSpec("vit_small_patch16_18x2_224", 32, 1.0, HALF, HALF, {"depth": 2}))
    assert not can_skip_patches(parallel.vit.blocks[-1])
    torch.testing.assert_close(parallel(IMAGES), parallel.vit(IMAGES))
