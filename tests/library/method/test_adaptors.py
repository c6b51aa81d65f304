"""Adaptors: nothing at birth, and a file that holds nothing but the set."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from grappa.backbone.frozen import build_backbone
from grappa.backbone.spec import BackboneSpec
from grappa.backbone.unusable import BackboneError
from grappa.method.adaptors import AdaptorKind, AdaptorSet, adaptor_set_sizes, automatic_rank, folded
from tests.helpers.tiny import tiny_backbone, tiny_set

IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_backbone_with_untrained_adaptors_is_the_backbone_exactly() -> None:
    backbone = tiny_backbone()
    assert torch.equal(backbone(IMAGES, tiny_set(0, trained=False)), backbone(IMAGES))
    assert not torch.equal(backbone(IMAGES, tiny_set(0)), backbone(IMAGES))


def test_the_same_seed_gives_the_same_set_whatever_the_global_generator() -> None:
    first = AdaptorSet([32] * 2, 4, seed=5).state_dict()
    torch.rand(7)
    second = AdaptorSet([32] * 2, 4, seed=5).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["adaptors.0.down.weight"], first["adaptors.1.down.weight"])


def test_a_saved_set_holds_no_backbone_tensor_and_reloads_to_the_same_output(tmp_path) -> None:
    backbone, adaptors = tiny_backbone(), tiny_set(3)
    save_file(adaptors.state_dict(), tmp_path / "adaptors.safetensors")
    state = load_file(tmp_path / "adaptors.safetensors")
    assert all(name.startswith("adaptors.") for name in state)
    assert sum(value.numel() for value in state.values()) == 2 * (4 * 32 + 4 + 32 * 4)
    again = AdaptorSet.from_state_dict(state)
    assert torch.equal(backbone(IMAGES, again), backbone(IMAGES, adaptors))


def test_tensors_that_are_no_set_are_refused() -> None:
    with pytest.raises(ValueError, match="expected those of an adaptor set"):
        AdaptorSet.from_state_dict({"blocks.0.weight": torch.zeros(2)})


def _in_context(seed: int, *, bottleneck_dim: int = 0, trained: bool = True) -> AdaptorSet:
    adaptors = AdaptorSet([32] * 2, bottleneck_dim, in_context_rank=3, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    ups = [value for name, value in adaptors.named_parameters() if "up.weight" in name and trained]
    for up in ups:
        torch.nn.init.normal_(up, std=0.5, generator=generator)
    return adaptors.requires_grad_(False)


@pytest.mark.parametrize("bottleneck_dim", [0, 4])
def test_a_new_in_context_set_changes_nothing_and_a_trained_one_does(bottleneck_dim: int) -> None:
    backbone = tiny_backbone()
    new = backbone(IMAGES, _in_context(0, bottleneck_dim=bottleneck_dim, trained=False))
    torch.testing.assert_close(new, backbone(IMAGES), rtol=1e-5, atol=1e-6)
    trained = backbone(IMAGES, _in_context(0, bottleneck_dim=bottleneck_dim))
    assert (trained - new).abs().max() > 0.01


def test_in_context_adaptors_change_queries_and_keys_as_the_formula_says() -> None:
    adaptor = _in_context(1).in_context[0]
    hidden = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    query, key = adaptor(hidden).chunk(2, dim=-1)
    torch.testing.assert_close(query, hidden @ adaptor.query_down.weight.T @ adaptor.query_up.weight.T)
    torch.testing.assert_close(key, hidden @ adaptor.key_down.weight.T @ adaptor.key_up.weight.T)


@pytest.mark.parametrize("bottleneck_dim", [0, 4])
def test_folding_keeps_the_outputs_the_size_and_the_bits_of_the_values(bottleneck_dim: int) -> None:
    backbone, adaptors = tiny_backbone(), _in_context(2, bottleneck_dim=bottleneck_dim)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    plain, rest = folded(backbone, adaptors)
    torch.testing.assert_close(plain(IMAGES, rest), backbone(IMAGES, adaptors), rtol=1e-4, atol=1e-5)
    after = plain.state_dict()
    assert {n: v.shape for n, v in after.items()} == {n: v.shape for n, v in before.items()}
    assert len(rest.adaptors) == (2 if bottleneck_dim else 0)
    for name in after:
        changed = name.endswith("qkv.weight")
        assert torch.equal(after[name], before[name]) != changed
        assert torch.equal(after[name][-32:], before[name][-32:]), "the value rows"
        assert torch.equal(backbone.state_dict()[name], before[name]), "the argument stays as it is"


def test_a_set_without_in_context_adaptors_has_nothing_to_fold() -> None:
    backbone, adaptors = tiny_backbone(), tiny_set(0)
    assert folded(backbone, adaptors) == (backbone, adaptors)


def test_only_the_adaptors_get_gradients() -> None:
    backbone, adaptors = tiny_backbone(), _in_context(0, bottleneck_dim=4).requires_grad_()
    backbone(IMAGES, adaptors).square().sum().backward()
    assert all(value.grad is None for value in backbone.parameters())
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in adaptors.parameters())


def test_sixteen_ranks_on_vit_b_are_0_68_percent_of_it() -> None:
    spec = BackboneSpec("vit_base_patch16_224", 224, 0.9, (0.5,) * 3, (0.5,) * 3)
    with torch.device("meta"):
        backbone = build_backbone(spec)
    rank = automatic_rank(backbone.embedding_dim)
    num_trained = sum(each.numel() for each in AdaptorSet([768] * 12, 0, in_context_rank=rank).parameters())
    assert (rank, num_trained) == (16, 589_824)
    assert round(num_trained / (num_trained + sum(each.numel() for each in backbone.parameters())), 4) == 0.0068


@pytest.mark.parametrize(("kind", "sizes"), [("bottleneck", (48, 0)), ("in_context", (0, 5)), ("both", (24, 2))])
def test_the_kinds_sizes(kind: AdaptorKind, sizes: tuple[int, int]) -> None:
    assert adaptor_set_sizes(kind, 48, 5) == sizes


@pytest.mark.parametrize("bottleneck_dim", [0, 4])
def test_a_saved_in_context_set_reloads_to_the_same_output(bottleneck_dim: int) -> None:
    backbone, adaptors = tiny_backbone(), _in_context(3, bottleneck_dim=bottleneck_dim)
    again = AdaptorSet.from_state_dict(adaptors.state_dict())
    assert torch.equal(backbone(IMAGES, again), backbone(IMAGES, adaptors))


def test_blocks_of_two_attentions_have_two_places() -> None:
    options = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8}
    backbone = build_backbone(BackboneSpec("vit_small_patch16_18x2_224", 32, 1.0, (0.5,) * 3, (0.5,) * 3, options))
    adaptors = AdaptorSet.of(backbone, 0, in_context_rank=2)
    assert len(adaptors.in_context) == 4
    torch.testing.assert_close(backbone(IMAGES, adaptors), backbone(IMAGES))


def test_a_backbone_without_queries_and_keys_is_refused() -> None:
    backbone = build_backbone(BackboneSpec("test_resnet", 32, 1.0, (0.5,) * 3, (0.5,) * 3))
    with pytest.raises(BackboneError, match=r"ResNet\) has no linear module .* set adaptors.kind=bottleneck"):
        AdaptorSet.of(backbone, 0, in_context_rank=2)
