"""Weights in the layouts people have: each is made from timm's own tensors by a table of names that stands here."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from grappa.backbone.library import import_timm
from grappa.backbone.weights import BackboneError, load_state

State = dict[str, Tensor]
SIZES = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8, "img_size": 32, "num_classes": 0}
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def build(name: str = "vit_tiny_patch16_224", **options: Any) -> Any:
    sizes = {} if name.startswith(("convnext", "efficientnet")) else SIZES
    return import_timm().create_model(name, **{**sizes, "num_classes": 0, **options}).eval()


def noisy(name: str = "vit_tiny_patch16_224", seed: int = 0, **options: Any) -> nn.Module:
    """A model in which no tensor is all zeros or all ones."""
    model: nn.Module = build(name, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.copy_(torch.randn(value.shape, generator=generator) * 0.1 + 0.5)
    return model


def assert_loads(
    state: Mapping[str, Tensor], model: nn.Module, *, name: str = "vit_tiny_patch16_224", **options: Any
) -> str:
    """Load a state into a new model of the same kind and compare all tensors and the output; return what was said."""
    loaded = build(name, **options)
    said = load_state(loaded, state, source="the file")
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    with torch.inference_mode():
        torch.testing.assert_close(loaded(IMAGES), model(IMAGES), rtol=0, atol=0)
    return said


def under(prefix: str, state: Mapping[str, Tensor]) -> State:
    return {prefix + name: value for name, value in state.items()}


def replaced(state: Mapping[str, Tensor], table: Mapping[str, str]) -> State:
    """Rename by regular expressions, from timm's names to those of a layout."""
    out = {}
    for name, value in state.items():
        for before, after in table.items():
            name = re.sub(before, after, name)
        out[name] = value
    return out


def split(state: Mapping[str, Tensor], names: tuple[str, str, str], sign: str = ".attn.qkv.") -> State:
    """Split the fused queries, keys and values into three tensors."""
    out = {}
    for name, value in state.items():
        if sign in name:
            out.update(
                {name.replace(sign, f".{each}."): part for each, part in zip(names, value.chunk(3), strict=True)}
            )
        else:
            out[name] = value
    return out


# ---------------------------------------------------------------- prefixes and wrappers


@pytest.mark.parametrize(
    "prefix",
    [
        *("module.", "module._orig_mod.", "model.", "model.model.", "backbone.", "encoder.", "vit."),
        *("state_dict.module.base_encoder.", "state_dict.momentum_encoder.", "nobody.knows.this.one."),
    ],
)
def test_any_prefix_under_which_all_names_are_is_found(prefix: str) -> None:
    model = noisy()
    said = assert_loads(under(prefix, model.state_dict()) | {"other.module.weight": torch.zeros(2)}, model)
    assert "ignored: other" in said


def test_what_compilers_and_sharding_put_inside_of_names_is_taken_off() -> None:
    model = noisy()
    state = replaced(model.state_dict(), {r"^blocks\.(\d)\.": r"blocks.\1._fsdp_wrapped_module._orig_mod."})
    assert_loads(state, model)
    assert_loads(under("_orig_mod.", model.state_dict()), model)


@pytest.mark.parametrize(
    ("better", "worse"),
    [("teacher.backbone.", "student.backbone."), ("model_ema.", "model."), ("base_encoder.", "momentum_encoder.")],
)
def test_of_two_models_in_a_file_the_preferred_one_is_taken_and_said(better: str, worse: str) -> None:
    model = noisy()
    state = under(worse, noisy(seed=5).state_dict()) | under(better, model.state_dict())
    said = assert_loads(state, model)
    assert said.startswith(f"taken from {better.rstrip('.')} (not {worse.rstrip('.')})")


def test_two_models_that_nothing_tells_apart_are_refused_unless_they_are_the_same() -> None:
    model = noisy()
    state = under("left.", model.state_dict())
    with pytest.raises(BackboneError, match=r"two models of this kind, under 'left\.' and 'right\.'"):
        load_state(build(), state | under("right.", noisy(seed=5).state_dict()), source="the file")
    assert_loads(state | under("right.", model.state_dict()), model)


def test_chunks_of_blocks_are_numbered_through() -> None:
    model = noisy(depth=4)
    chunk = {r"^blocks\.([01])\.": r"blocks.0.\1.", r"^blocks\.([23])\.(?!\d)": r"blocks.1.\1."}
    assert_loads(under("teacher.backbone.", replaced(model.state_dict(), chunk)), model, depth=4)


@pytest.mark.parametrize(
    ("extra", "group"),
    [
        ("dino_head.mlp.0.weight", "dino_head"),
        ("decoder_blocks.0.norm1.weight", "decoder_blocks"),
        ("mask_token", "mask_token"),
        ("masked_embed", "masked_embed"),
        ("projector.0.weight", "projector"),
        ("fc.weight", "fc"),
    ],
)
def test_what_no_features_need_is_ignored_and_said(extra: str, group: str) -> None:
    model = noisy()
    assert assert_loads({**model.state_dict(), extra: torch.ones(3)}, model) == f"ignored: {group}"


@pytest.mark.parametrize(
    "extra", ["fc_norm.weight", "head.norm.weight", "reg_token", "blocks.0.ls1.gamma", "blocks.2.norm1.bias"]
)
def test_what_features_would_need_is_never_ignored(extra: str) -> None:
    state = {**noisy().state_dict(), extra: torch.ones(32)}
    with pytest.raises(BackboneError, match=rf"1 unknown \(first: {extra}\)"):
        load_state(build(), state, source="the file")


# ---------------------------------------------------------------- Hugging Face's names

_VIT = {
    r"^cls_token$": "embeddings.cls_token",
    r"^dist_token$": "embeddings.distillation_token",
    r"^pos_embed$": "embeddings.position_embeddings",
    r"^patch_embed\.proj": "embeddings.patch_embeddings.projection",
    r"^norm\.": "layernorm.",
    r"^blocks\.": "encoder.layer.",
    r"\.attn\.proj\.": ".attention.output.dense.",
}
_TRANSFORMER = {r"\.norm1\.": ".layernorm_before.", r"\.norm2\.": ".layernorm_after."} | {
    r"\.mlp\.fc1\.": ".intermediate.dense.",
    r"\.mlp\.fc2\.": ".output.dense.",
}
_QUERY = tuple(f"attention.attention.{each}" for each in ("query", "key", "value"))
_PROJ = tuple(f"attention.{each}_proj" for each in "qkv")


def _hf_vit(state: State) -> State:
    return replaced(split(state, _QUERY), {**_VIT, **_TRANSFORMER}) | {"pooler.dense.weight": torch.ones(2)}


def _hf_newer_vit(state: State) -> State:
    """The names that a model of transformers 5 has in memory."""
    table = {**_VIT, **_TRANSFORMER, r"^blocks\.": "layers.", r"\.attn\.proj\.": ".attention.o_proj."}
    return replaced(split(state, _PROJ), {**table, r"\.mlp\.(fc\d)\.": r".mlp.\1."})


def _hf_dinov2(state: State) -> State:
    table = {**_VIT, r"\.ls([12])\.gamma$": r".layer_scale\1.lambda1"}
    out = replaced(split(state, _QUERY), table) | {"embeddings.mask_token": torch.ones(1, 32)}
    if "reg_token" in out:
        out["embeddings.register_tokens"] = out.pop("reg_token")
        positions = out["embeddings.position_embeddings"]
        out["embeddings.position_embeddings"] = torch.cat([torch.zeros(1, 1, 32), positions], dim=1)
    return out


def _hf_clip(state: State) -> State:
    table = {
        r"^cls_token$": "embeddings.class_embedding",
        r"^pos_embed$": "embeddings.position_embedding.weight",
        r"^patch_embed\.proj\.": "embeddings.patch_embedding.",
        r"^norm_pre\.": "pre_layrnorm.",
        r"^norm\.": "post_layernorm.",
        r"^blocks\.": "encoder.layers.",
        r"\.norm([12])\.": r".layer_norm\1.",
        r"\.attn\.proj\.": ".self_attn.out_proj.",
        r"^attn_pool\.latent$": "head.probe",
        r"^attn_pool\.proj\.": "head.attention.out_proj.",
        r"^attn_pool\.norm\.": "head.layernorm.",
        r"^attn_pool\.mlp\.": "head.mlp.",
    }
    out = replaced(split(state, tuple(f"self_attn.{each}_proj" for each in "qkv")), table)
    for kind in ("weight", "bias"):
        if f"attn_pool.q.{kind}" in out:
            both = [out.pop(f"attn_pool.q.{kind}"), out.pop(f"attn_pool.kv.{kind}")]
            out[f"head.attention.in_proj_{kind}"] = torch.cat(both)
    flat = {name: value.squeeze(0) for name, value in out.items() if "position" in name}
    flat |= {name: value.reshape(-1) for name, value in out.items() if "class_embedding" in name}
    text = {"text_model.encoder.layers.0.layer_norm1.weight": torch.ones(2), "logit_scale": torch.ones(1)}
    return under("vision_model.", {**out, **flat}) | text


def _hf_dinov3(state: State) -> State:
    """Keys have no bias there; timm keeps those of queries and values apart."""
    out = split(state, _PROJ)
    table = {
        r"^cls_token$": "embeddings.cls_token",
        r"^reg_token$": "embeddings.register_tokens",
        r"^patch_embed\.proj\.": "embeddings.patch_embeddings.",
        r"^blocks\.": "layer.",
        r"\.attn\.([qv])_bias$": r".attention.\1_proj.bias",
        r"\.attn\.proj\.": ".attention.o_proj.",
        r"\.gamma_([12])$": r".layer_scale\1.lambda1",
        r"\.mlp\.fc1\.": ".mlp.up_proj.",
        r"\.mlp\.fc2\.": ".mlp.down_proj.",
    }
    return replaced(out, table) | {"embeddings.mask_token": torch.ones(1, 1, 32)}


def _hf_beit(state: State) -> State:
    table = {
        **_VIT,
        **_TRANSFORMER,
        r"\.attn\.q_bias$": ".attention.attention.query.bias",
        r"\.attn\.v_bias$": ".attention.attention.value.bias",
        r"\.attn\.(relative_position_bias)_table$": r".attention.attention.\1.\1_table",
        r"\.gamma_([12])$": r".lambda_\1",
        r"^fc_norm\.": "pooler.layernorm.",
    }
    return replaced(split(state, _QUERY), table)


def _hf_convnext(state: State) -> State:
    table = {
        r"^stem\.0\.": "embeddings.patch_embeddings.",
        r"^stem\.1\.": "embeddings.layernorm.",
        r"^stages\.(\d)\.downsample\.": r"encoder.stages.\1.downsampling_layer.",
        r"^stages\.(\d)\.blocks\.": r"encoder.stages.\1.layers.",
        r"\.conv_dw\.": ".dwconv.",
        r"(layers\.\d)\.norm\.": r"\1.layernorm.",
        r"\.mlp\.fc([12])\.": r".pwconv\1.",
        r"\.gamma$": ".layer_scale_parameter",
        r"^head\.norm\.": "layernorm.",
    }
    return under("convnext.", replaced(state, table)) | {"classifier.weight": torch.ones(2)}


CONVNEXT = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}
HUGGING_FACE: list[tuple[str, dict[str, Any], Callable[[State], State]]] = [
    ("vit_tiny_patch16_224", {}, _hf_vit),
    ("vit_tiny_patch16_224", {}, _hf_newer_vit),
    ("deit_tiny_distilled_patch16_224", {}, _hf_vit),
    ("vit_small_patch14_dinov2", {}, _hf_dinov2),
    ("vit_small_patch14_reg4_dinov2", {}, _hf_dinov2),
    ("vit_base_patch16_clip_quickgelu_224", {}, _hf_clip),
    ("vit_base_patch16_siglip_224", {}, _hf_clip),
    ("vit_small_patch16_dinov3_qkvb", {}, _hf_dinov3),
    ("beit_base_patch16_224", {}, _hf_beit),
    ("convnext_tiny", CONVNEXT, _hf_convnext),
]


@pytest.mark.parametrize(("name", "options", "renamed"), HUGGING_FACE, ids=lambda each: getattr(each, "__name__", None))
def test_names_of_transformers_are_read(name: str, options: dict[str, Any], renamed: Callable[[State], State]) -> None:
    model = noisy(name, **options)
    said = assert_loads(renamed(dict(model.state_dict())), model, name=name, **options)
    assert said.startswith("names of Hugging Face (transformers)")


def test_keys_that_a_model_has_no_bias_for_are_refused_unless_they_are_zero() -> None:
    model = noisy("vit_small_patch16_dinov3_qkvb")
    state = _hf_dinov3(dict(model.state_dict()))
    keys = {name.replace("q_proj", "k_proj"): torch.zeros(32) for name in state if name.endswith("q_proj.bias")}
    assert_loads(state | keys, model, name="vit_small_patch16_dinov3_qkvb")
    for each in ("vit_small_patch16_dinov3", "vit_small_patch16_dinov3_qkvb"):
        ones = {name: value + 1 for name, value in keys.items()}
        with pytest.raises(BackboneError, match=r"unknown \(first: blocks.0.attn.qkv.bias\)"):
            load_state(build(each), state | ones, source="the file")
    with pytest.raises(BackboneError, match="set backbone.name=vit_small_patch16_dinov3_qkvb"):
        load_state(build("vit_small_patch16_dinov3"), state, source="the file")


# ---------------------------------------------------------------- what timm converts


def _official_dinov2(state: State) -> State:
    out = {**state, "register_tokens": state["reg_token"], "mask_token": torch.ones(1, 32)}
    del out["reg_token"]
    out["pos_embed"] = torch.cat([torch.zeros(1, 1, 32), state["pos_embed"]], dim=1)
    return out


def _openai(state: State) -> State:
    table = {
        r"^cls_token$": "class_embedding",
        r"^pos_embed$": "positional_embedding",
        r"^patch_embed\.proj\.": "conv1.",
        r"^norm_pre\.": "ln_pre.",
        r"^norm\.": "ln_post.",
        r"^blocks\.": "transformer.resblocks.",
        r"\.norm([12])\.": r".ln_\1.",
        r"\.attn\.qkv\.": ".attn.in_proj_",
        r"\.attn\.proj\.": ".attn.out_proj.",
        r"\.mlp\.fc1\.": ".mlp.c_fc.",
        r"\.mlp\.fc2\.": ".mlp.c_proj.",
    }
    out = replaced(state, table) | {"proj": torch.ones(32, 8)}
    out["class_embedding"] = out["class_embedding"].reshape(-1)
    out["positional_embedding"] = out["positional_embedding"].squeeze(0)
    return under("visual.", out) | {
        "text_projection": torch.ones(2),
        "transformer.resblocks.0.ln_1.weight": torch.ones(2),
    }


def _open_clip(state: State) -> State:
    return under("visual.trunk.", state) | {"text.token_embedding.weight": torch.ones(2), "logit_scale": torch.ones(1)}


def _meta_dinov3(state: State) -> State:
    out = replaced(state, {r"^reg_token$": "storage_tokens", r"\.gamma_([12])$": r".ls\1.gamma"})
    for name in [each for each in out if each.endswith(".attn.q_bias")]:
        query, value = out.pop(name), out.pop(name.replace("q_bias", "v_bias"))
        out[name.replace("q_bias", "qkv.bias")] = torch.cat([query, torch.zeros(32), value])
        out[name.replace("q_bias", "qkv.bias_mask")] = torch.full((96,), torch.nan)
    return out | {"mask_token": torch.ones(1, 32), "rope_embed.periods": torch.ones(8)}


def _deit3(state: State) -> State:
    return replaced(state, {r"\.ls([12])\.gamma$": r".gamma_\1"}) | {"head.weight": torch.ones(2)}


def _perception_encoder(state: State) -> State:
    """Meta's PE: as OpenAI's, with layer scale of their own and a pooling whose queries, keys and values are joined."""
    pooled = {name: value for name, value in state.items() if name.startswith("attn_pool.")}
    out = _openai({name: value for name, value in state.items() if name not in pooled})
    out = replaced(out, {r"\.gamma_([12])$": r".ls_\1.gamma"})
    for kind in ("weight", "bias"):
        both = [pooled.pop(f"attn_pool.q.{kind}"), pooled.pop(f"attn_pool.kv.{kind}")]
        out[f"visual.attn_pool.attn.in_proj_{kind}"] = torch.cat(both)
    table = {
        r"^attn_pool\.latent$": "attn_pool.probe",
        r"^attn_pool\.proj\.": "attn_pool.attn.out_proj.",
        r"^attn_pool\.norm\.": "attn_pool.layernorm.",
        r"^attn_pool\.mlp\.fc1\.": "attn_pool.mlp.c_fc.",
        r"^attn_pool\.mlp\.fc2\.": "attn_pool.mlp.c_proj.",
    }
    return out | under("visual.", replaced(pooled, table))


def _aimv2(state: State) -> State:
    table = {
        r"^patch_embed\.": "preprocessor.patchifier.",
        r"^pos_embed$": "preprocessor.pos_embed",
        r"^blocks\.": "trunk.blocks.",
        r"^norm\.": "trunk.post_trunk_norm.",
        r"\.norm([12])\.": r".norm_\1.",
        r"\.mlp\.fc1_g\.": ".mlp.fc1.",
        r"\.mlp\.fc1_x\.": ".mlp.fc3.",
    }
    return replaced(state, table)


def _ijepa(state: State) -> State:
    other = noisy("vit_huge_patch14_gap_224", seed=3).state_dict()
    predictor = {"predictor.module.mask_token": torch.ones(2), "predictor.module.predictor_norm.weight": torch.ones(2)}
    return under("target_encoder.module.", state) | under("encoder.module.", other) | predictor


BY_TIMM: list[tuple[str, Callable[[State], State]]] = [
    ("vit_small_patch14_reg4_dinov2", _official_dinov2),
    ("vit_base_patch16_clip_quickgelu_224", _openai),
    ("vit_base_patch16_siglip_224", _open_clip),
    ("vit_small_patch16_dinov3_qkvb", _meta_dinov3),
    ("deit3_small_patch16_224", _deit3),
    ("vit_pe_core_base_patch16_224", _perception_encoder),
    ("aimv2_large_patch14_224", _aimv2),
    ("vit_huge_patch14_gap_224", _ijepa),
]


@pytest.mark.parametrize("prefix", ["", "module.", "state_dict.model."])
@pytest.mark.parametrize(("name", "renamed"), BY_TIMM, ids=lambda each: getattr(each, "__name__", None))
def test_official_files_are_converted_by_timm_under_any_prefix(
    name: str, renamed: Callable[[State], State], prefix: str
) -> None:
    model = noisy(name)
    assert_loads(under(prefix, renamed(dict(model.state_dict()))), model, name=name)


def test_positions_of_an_official_file_with_registers_are_folded_into_the_class_token() -> None:
    model = noisy("vit_small_patch14_reg4_dinov2")
    state = _official_dinov2(dict(model.state_dict()))
    state["pos_embed"][:, 0] = 0.25
    state["cls_token"] = state["cls_token"] - 0.25
    loaded = build("vit_small_patch14_reg4_dinov2")
    load_state(loaded, state, source="the file")
    torch.testing.assert_close(loaded.cls_token, model.state_dict()["cls_token"])


@pytest.mark.parametrize(("name", "size"), [("vit_tiny_patch16_224", 48), ("beit_base_patch16_224", 48)])
def test_positions_of_another_image_size_are_resampled_as_timm_does(name: str, size: int) -> None:
    model = noisy(name)
    larger = build(name, img_size=size)
    load_state(larger, under("model.", model.state_dict()), source="the file")
    conversion = import_timm().models
    module = conversion.beit if name.startswith("beit") else conversion.vision_transformer
    expected = module.checkpoint_filter_fn(dict(model.state_dict()), larger)
    for key, value in larger.state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-6)


def test_positions_are_resampled_in_the_way_of_the_architecture() -> None:
    model = noisy("flexivit_small")
    larger = build("flexivit_small", img_size=48)
    load_state(larger, model.state_dict(), source="the file")
    resample = import_timm().layers.resample_abs_pos_embed
    positions = model.state_dict()["pos_embed"]
    prefix = positions.shape[1] - 16
    bilinear = resample(positions, new_size=[6, 6], num_prefix_tokens=prefix, interpolation="bilinear", antialias=False)
    assert torch.equal(larger.state_dict()["pos_embed"], bilinear)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3", "beit_base_patch16_224"])
def test_patches_of_another_size_are_refused_and_not_resampled_silently(name: str) -> None:
    state = noisy(name).state_dict()
    with pytest.raises(BackboneError, match=r"the file has width 32, blocks 2, patch 8: set backbone.name"):
        load_state(build(name, patch_size=16, img_size=64), under("model.", state), source="the file")


def test_chunks_that_are_numbered_each_on_its_own_are_not_mixed_up() -> None:
    state = noisy(depth=4).state_dict()
    local = {
        r"^blocks\.([01])\.": r"blocks.0.\1.",
        r"^blocks\.2\.(?!\d)": "blocks.1.0.",
        r"^blocks\.3\.(?!\d)": "blocks.1.1.",
    }
    for depth in (2, 4):
        with pytest.raises(BackboneError, match="do not fit"):
            load_state(build(depth=depth), replaced(state, local), source="the file")


# ---------------------------------------------------------------- numbers, and what does not fit


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_point_numbers_become_float32(kind: torch.dtype) -> None:
    model = noisy().to(kind).float()
    assert_loads({name: value.to(kind) for name, value in model.state_dict().items()}, model)


def test_quantized_numbers_are_refused() -> None:
    state = {name: (value * 100).to(torch.int8) for name, value in noisy().state_dict().items()}
    with pytest.raises(BackboneError, match=r"holds torch.int8 instead of floating-point numbers"):
        load_state(build(), state, source="the file")


def test_a_module_that_is_none_of_timms_is_loaded_too() -> None:
    model, other = (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)) for _ in range(2))
    state = {name: value for name, value in model.state_dict().items() if "num_batches" not in name}
    assert load_state(other, under("net.", state), source="the file") == "taken from net"
    assert torch.equal(other[0].weight, model[0].weight)
    del state["0.bias"]
    with pytest.raises(BackboneError, match=r"1 tensors missing \(first: 0.bias\)"):
        load_state(other, under("net.", state), source="the file")


def test_weights_of_other_sizes_are_refused_with_the_sizes_and_the_names_that_have_them() -> None:
    state = noisy(embed_dim=384, depth=3, num_heads=6).state_dict()
    with pytest.raises(BackboneError) as caught:
        load_state(build(), under("module.", state), source="the file")
    sentence = str(caught.value)
    assert "look like timm or DINO under 'module.'" in sentence
    assert "is (1, 1, 384) instead of (1, 1, 32)" in sentence
    assert "the file has width 384, blocks 3, patch 8: set backbone.name or backbone.options" in sentence
    assert "vit_small_patch8_224" in sentence


def test_weights_of_another_architecture_are_called_so() -> None:
    state = noisy("convnext_tiny", **CONVNEXT).state_dict()
    with pytest.raises(BackboneError, match=r"look like a staged model of timm\) .*(no name fits|most names differ)"):
        load_state(build(), state, source="the file")
    with pytest.raises(BackboneError, match=r"look like timm or DINO\) .*(no name fits|most names differ)"):
        load_state(build("convnext_tiny", **CONVNEXT), noisy().state_dict(), source="the file")


def test_a_file_that_lacks_a_tensor_is_not_answered_by_set_the_name() -> None:
    state = under("model.", noisy().state_dict())
    del state["model.norm.weight"]
    with pytest.raises(BackboneError, match=r"1 tensors missing \(first: norm.weight\); the sizes are right") as caught:
        load_state(build(), state, source="the file")
    assert "set the name" not in str(caught.value)


def test_names_of_no_known_layout_are_refused_with_what_is_expected() -> None:
    with pytest.raises(BackboneError, match="no name fits: expected timm's names or a layout of the table"):
        load_state(build(), {"a.b": torch.zeros(2), "c": torch.zeros(1)}, source="the file")


def test_a_refused_file_leaves_the_model_as_it_was() -> None:
    model = noisy()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = noisy(seed=7).state_dict()
    state["blocks.1.norm2.bias"][3] = torch.nan
    with pytest.raises(BackboneError, match=r"NaN or infinity \(first: blocks.1.norm2.bias\)"):
        load_state(model, under("model.", state), source="the file")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
