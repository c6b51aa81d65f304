"""A block for the class token alone, or with adapted queries and keys, equals the whole block, value and gradient."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch

from grappa.backbone.frozen import build_backbone
from grappa.backbone.spec import BackboneSpec
from grappa.backbone.vit import is_plain, run_block
from tests.helpers.rounding import assert_same_sums
from tests.helpers.tiny import HALF, OPTIONS, tiny_backbone, tiny_set

HIDDEN = torch.randn(3, 17, 32, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "options", [{}, {"qk_norm": True}, {"init_values": 0.5}, {"qkv_bias": False}, {"pre_norm": True}]
)
def test_it_equals_the_whole_block(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    backbone = build_backbone(BackboneSpec("vit_tiny_patch16_224", 32, 1.0, HALF, HALF, {**OPTIONS, **options}))
    block = backbone.model.blocks[-1]
    assert is_plain(block)
    assert_same_sums(run_block(block, HIDDEN, class_token=True), block(HIDDEN)[:, :1], terms=17 * 32)
    assert_same_sums(backbone(IMAGES), backbone.model(IMAGES), terms=17 * 32)


def test_adaptors_get_the_same_gradients() -> None:
    """Of a weighted sum: the sum of squares behind a layer norm hardly changes, and its gradient is rounding."""
    weights = torch.randn(2, 32, generator=torch.Generator().manual_seed(2))
    backbone, grads = tiny_backbone(), []
    for skip in (True, False):
        adaptors = tiny_set(0).requires_grad_()
        if not skip:
            type(backbone.model.blocks[-1]).__name__ = "Whole"
        try:
            (backbone(IMAGES, adaptors) * weights).sum().backward()
        finally:
            type(backbone.model.blocks[-1]).__name__ = "Block"
        grads.append([parameter.grad for parameter in adaptors.parameters()])
    for with_skip, without in zip(*grads, strict=True):
        assert_same_sums(with_skip, without, terms=IMAGES.shape[0] * 17 * 32)


def test_other_blocks_are_run_whole() -> None:
    spec = BackboneSpec("vit_small_patch16_36x1_224", 32, 1.0, HALF, HALF, {"depth": 2})
    assert is_plain(build_backbone(spec).model.blocks[-1])
    parallel = build_backbone(BackboneSpec("vit_small_patch16_18x2_224", 32, 1.0, HALF, HALF, {"depth": 2}))
    assert not is_plain(parallel.model.blocks[-1])
    torch.testing.assert_close(parallel(IMAGES), parallel.model(IMAGES))


def test_adapted_queries_and_keys_equal_those_of_changed_weights() -> None:
    block = tiny_backbone().model.blocks[0]
    update = torch.randn(64, 32, generator=torch.Generator().manual_seed(3))
    for fused in (True, False):
        block.attn.fused_attn = fused
        found = run_block(block, HIDDEN, lambda normed: normed @ update.T)
        only = run_block(block, HIDDEN, lambda normed: normed @ update.T, class_token=True)
        changed = deepcopy(block)
        changed.attn.qkv.weight.data[:64] += update
        torch.testing.assert_close(found, changed(HIDDEN), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(only, changed(HIDDEN)[:, :1], rtol=1e-4, atol=1e-5)
        assert (found - block(HIDDEN)).abs().max() > 0.01
