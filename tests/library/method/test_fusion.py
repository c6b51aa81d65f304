"""Fusion: weights over sets that start as their mean, and a folded form that equals the plain one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from grappa.method.adaptors import AdaptorSet
from grappa.method.fusion import Fusion, class_token_attention
from tests.helpers.rounding import assert_same_sums
from tests.helpers.tiny import tiny_backbone, tiny_set

HIDDEN = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(2))
IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def _trained(num_sets: int, *, level: str = "token", temperature: float = 0.5) -> Fusion:
    fusion = Fusion([tiny_set(i) for i in range(num_sets)], level=level, temperature=temperature)
    fusion.start(query_std=0.3, key_std=0.3, generator=torch.Generator().manual_seed(9))
    return fusion


def test_an_untrained_fusion_is_the_mean_over_sets_exactly() -> None:
    sets = [tiny_set(i) for i in range(4)]
    for block, layer in enumerate(Fusion(sets).outputs):
        residual, attention = layer.with_attention(HIDDEN)
        assert torch.equal(attention, torch.full_like(attention, 0.25))
        mean = torch.stack([s.outputs[block](HIDDEN) for s in sets]).mean(0)
        torch.testing.assert_close(residual, mean, rtol=1e-5, atol=1e-6)


def test_with_one_set_fusion_reduces_to_it() -> None:
    fusion = _trained(1)
    torch.testing.assert_close(fusion.outputs[0](HIDDEN), tiny_set(0).outputs[0](HIDDEN), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("level", ["token", "cls"])
def test_attention_is_the_written_formula_and_sums_to_one(level: str) -> None:
    fusion = _trained(3, level=level)
    layer = fusion.outputs[1]
    residual, attention = layer.with_attention(HIDDEN)
    outputs = torch.stack([tiny_set(i).outputs[1](HIDDEN) for i in range(3)], dim=-2)  # B T G D
    seen, keys = (HIDDEN, outputs) if level == "token" else (HIDDEN[:, :1], outputs[:, :1])
    scores = torch.einsum("btd,btgd->btg", seen @ layer.query.T, keys @ layer.key.T) / 0.5
    torch.testing.assert_close(attention, scores.softmax(-1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(attention.sum(-1), torch.ones_like(attention[..., 0]))
    expected = (attention.unsqueeze(-1) * outputs).sum(-2)
    torch.testing.assert_close(residual, expected, rtol=1e-4, atol=1e-5)
    assert attention.max() - attention.min() > 0.05


def test_permuting_the_sets_permutes_the_attention_and_keeps_the_residual() -> None:
    order = [2, 0, 1]
    fusion = _trained(3)
    moved = Fusion([tiny_set(i) for i in order], temperature=0.5)
    moved.load_trained_state(fusion.trained_state())
    residual, attention = fusion.outputs[0].with_attention(HIDDEN)
    residual_moved, attention_moved = moved.outputs[0].with_attention(HIDDEN)
    torch.testing.assert_close(attention_moved, attention[..., order])
    torch.testing.assert_close(residual_moved, residual)


@pytest.mark.parametrize("level", ["token", "cls"])
def test_the_folded_fusion_equals_the_plain_one(level: str) -> None:
    fusion = _trained(4, level=level)
    for layer, folded in zip(fusion.outputs, fusion.folded().outputs, strict=True):
        residual, attention = layer.with_attention(HIDDEN)
        found, folded_attention = folded.with_attention(HIDDEN)
        assert_same_sums(found, residual, terms=32 * 32)  # sums of width 32, folded into each other
        assert_same_sums(folded_attention, attention, terms=32 * 32)
        assert torch.equal(folded(HIDDEN), found)


def test_the_recorded_attention_is_that_of_the_embedding_pass() -> None:
    backbone, fusion = tiny_backbone(), _trained(3)
    attention = class_token_attention(backbone, IMAGES, fusion.folded())
    assert attention.shape == (3, 2, 3)
    hidden = []
    noting = [lambda tokens, layer=layer: hidden.append(tokens) or layer(tokens) for layer in fusion.outputs]
    backbone(IMAGES, SimpleNamespace(outputs=noting, in_context=()))
    for block, (layer, tokens) in enumerate(zip(fusion.outputs, hidden, strict=True)):
        torch.testing.assert_close(attention[:, block], layer.with_attention(tokens)[1][:, 0], rtol=1e-4, atol=1e-5)


def test_forward_twice_gives_the_same_and_changes_no_state() -> None:
    backbone, fusion = tiny_backbone(), _trained(3)
    before = {name: value.clone() for name, value in fusion.state_dict().items()}
    argument = IMAGES.clone()
    assert torch.equal(backbone(argument, fusion), backbone(argument, fusion))
    assert torch.equal(argument, IMAGES)
    assert all(torch.equal(before[name], value) for name, value in fusion.state_dict().items())


def test_only_query_and_key_are_trained_and_saved() -> None:
    fusion = _trained(2)
    names = {name for name, _ in fusion.named_parameters()}
    assert names == set(fusion.trained_state()) == {f"layers.{block}.{n}" for block in (0, 1) for n in ("query", "key")}


def test_sets_of_different_depth_are_refused() -> None:
    with pytest.raises(ValueError, match="with as many blocks"):
        Fusion([tiny_set(0), AdaptorSet([32] * 3, 4)])
    with pytest.raises(ValueError, match="found 0 adaptor sets"):
        Fusion([])
    with pytest.raises(ValueError, match="expected those of a fusion of such sets, .*layers.0.key"):
        Fusion([tiny_set(0)]).load_trained_state({"layers.0.query": torch.zeros(32, 32)})


def _in_context_sets(num_sets: int, bottleneck_dim: int = 0) -> list[AdaptorSet]:
    sets = [
        AdaptorSet([32] * 2, bottleneck_dim, in_context_rank=3, seed=i).requires_grad_(False) for i in range(num_sets)
    ]
    generator = torch.Generator().manual_seed(0)
    for name, value in (each for one in sets for each in one.named_parameters()):
        if "up.weight" in name:
            torch.nn.init.normal_(value, std=0.3, generator=generator)
    return sets


def test_in_context_adaptors_are_fused_by_the_same_formula() -> None:
    sets = _in_context_sets(3)
    fusion = Fusion(sets, temperature=0.5)
    fusion.start(query_std=0.3, key_std=0.3, generator=torch.Generator().manual_seed(9))
    layer = fusion.in_context[1]
    added, attention = layer.with_attention(HIDDEN)
    outputs = torch.stack([each.in_context[1](HIDDEN) for each in sets], dim=-2)
    scores = torch.einsum("btd,btgd->btg", HIDDEN @ layer.query.T, outputs @ layer.key.T) / 0.5
    torch.testing.assert_close(attention, scores.softmax(-1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(added, (attention.unsqueeze(-1) * outputs).sum(-2), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.fold()(HIDDEN), added, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bottleneck_dim", [0, 4])
def test_a_fusion_of_one_in_context_set_is_that_set(bottleneck_dim: int) -> None:
    backbone, (only,) = tiny_backbone(), _in_context_sets(1, bottleneck_dim)
    fusion = Fusion([only])
    torch.testing.assert_close(backbone(IMAGES, fusion.folded()), backbone(IMAGES, only), rtol=1e-4, atol=1e-5)
    attention = class_token_attention(backbone, IMAGES, fusion.folded())
    assert attention.shape == (3, 4 if bottleneck_dim else 2, 1)


def test_sets_of_different_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match="all of one kind"):
        Fusion([tiny_set(0), *_in_context_sets(1)])
