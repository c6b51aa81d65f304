"""Adaptors: nothing at birth, and a file that holds nothing but the set."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_backbone, tiny_set

from grappa.adaptors import AdaptorSet

IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_backbone_with_untrained_adaptors_is_the_backbone_exactly() -> None:
    backbone = tiny_backbone()
    assert torch.equal(backbone(IMAGES, list(tiny_set(0, trained=False))), backbone(IMAGES))
    assert not torch.equal(backbone(IMAGES, list(tiny_set(0))), backbone(IMAGES))


def test_the_same_seed_gives_the_same_set_whatever_the_global_generator() -> None:
    first = AdaptorSet(2, 32, 4, seed=5).state_dict()
    torch.rand(7)
    second = AdaptorSet(2, 32, 4, seed=5).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["adaptors.0.down.weight"], first["adaptors.1.down.weight"])


def test_a_saved_set_holds_no_backbone_tensor_and_reloads_to_the_same_output(tmp_path) -> None:
    backbone, adaptors = tiny_backbone(), tiny_set(3)
    save_file(adaptors.state_dict(), tmp_path / "adaptors.safetensors")
    state = load_file(tmp_path / "adaptors.safetensors")
    assert all(name.startswith("adaptors.") for name in state)
    assert sum(value.numel() for value in state.values()) == 2 * (4 * 32 + 4 + 32 * 4)
    again = AdaptorSet.from_state_dict(state)
    assert torch.equal(backbone(IMAGES, list(again)), backbone(IMAGES, list(adaptors)))


def test_tensors_that_are_no_set_are_refused() -> None:
    with pytest.raises(ValueError, match="expected those of an adaptor set"):
        AdaptorSet.from_state_dict({"blocks.0.weight": torch.zeros(2)})
