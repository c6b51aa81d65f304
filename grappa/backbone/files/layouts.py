"""Names that weights have outside of timm, as tables: how each layout is called, recognized and renamed to timm's.

What timm converts itself (official DINOv2, OpenAI's and OpenCLIP's CLIP, DINOv3 ...) is only called by its name here.
Not every name is renamed one to one: queries, keys and values, for one, are joined in ``joined``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

State = dict[str, Tensor]


@dataclass(frozen=True)
class Layout:
    """A way to name weights: ``sign`` is a pattern that one of its names has, ``renames`` lead to timm's names."""

    label: str
    sign: re.Pattern[str]
    renames: tuple[tuple[re.Pattern[str], str], ...] = ()

    def is_in(self, names: Iterable[str]) -> bool:
        """Tell whether one of ``names`` has the sign of the layout."""
        return any(self.sign.search(name) for name in names)

    def renamed(self, name: str) -> str:
        """Return timm's name of a tensor; a name that the layout does not know stays."""
        for pattern, replacement in self.renames:
            name = pattern.sub(replacement, name)
        return name


def _layout(label: str, sign: str, *renames: tuple[str, str]) -> Layout:
    return Layout(label, re.compile(sign), tuple((re.compile(before), after) for before, after in renames))


_BLOCK = r"^(blocks\.\d+\.)"
TRANSFORMERS = _layout(
    "Hugging Face (transformers)",
    r"^embeddings\.(cls_token|class_embedding|patch_embeddings?)",
    (r"^embeddings\.(cls_token|mask_token|register_tokens)$", r"\1"),
    (r"^embeddings\.class_embedding$", "cls_token"),
    (r"^embeddings\.distillation_token$", "dist_token"),
    (r"^embeddings\.position_embeddings?(\.weight)?$", "pos_embed"),
    (r"^embeddings\.patch_embeddings?\.(projection\.)?(weight|bias)$", r"patch_embed.proj.\2"),
    (r"^(encoder\.|model\.)?layers?\.(\d+)\.", r"blocks.\2."),
    (_BLOCK + r"(layernorm_before|layer_norm1)\.", r"\1norm1."),
    (_BLOCK + r"(layernorm_after|layer_norm2)\.", r"\1norm2."),
    (_BLOCK + r"(?:attention\.attention|self_attn|attention)\.([qkv])(?:uery|ey|alue|_proj)\.", r"\1attn.\2_proj."),
    (_BLOCK + r"(attention\.output\.dense|attention\.o_proj|self_attn\.out_proj)\.", r"\1attn.proj."),
    (_BLOCK + r"attention\.attention\.relative_position_bias\.", r"\1attn."),
    (_BLOCK + r"(attention\.)?relative_position_bias\.", r"\1attn."),
    (_BLOCK + r"layer_scale([12])\.lambda1$", r"\1ls\2.gamma"),
    (_BLOCK + r"lambda_([12])$", r"\1gamma_\2"),
    (_BLOCK + r"intermediate\.dense\.", r"\1mlp.fc1."),
    (_BLOCK + r"output\.dense\.", r"\1mlp.fc2."),
    (_BLOCK + r"mlp\.weights_in\.", r"\1mlp.w12."),
    (_BLOCK + r"mlp\.weights_out\.", r"\1mlp.w3."),
    (r"^pre_layrnorm\.", "norm_pre."),
    (r"^(layernorm|post_layernorm)\.", "norm."),
    (r"^pooler\.layernorm\.", "fc_norm."),
    (r"^head\.probe$", "attn_pool.latent"),
    (r"^head\.attention\.in_proj_", "attn_pool.in_proj_"),
    (r"^head\.attention\.out_proj\.", "attn_pool.proj."),
    (r"^head\.layernorm\.", "attn_pool.norm."),
    (r"^head\.mlp\.", "attn_pool.mlp."),
)
_STAGE = r"^(?:encoder\.|model\.)?stages\.(\d+)\."
CONVNEXT = _layout(
    "Hugging Face (transformers), ConvNeXt",
    r"stages\.0\.layers\.0\.(dwconv|depthwise_conv)\.",
    (r"^embeddings\.patch_embeddings\.", "stem.0."),
    (r"^embeddings\.layernorm\.", "stem.1."),
    (r"^(?:model\.)?stages\.0\.downsample_layers\.(\d)\.", r"stem.\1."),
    (_STAGE + r"downsampl\w+\.(\d)\.", r"stages.\1.downsample.\2."),
    (_STAGE + r"layers\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.(dwconv|depthwise_conv)\.", ".conv_dw."),
    (r"^(stages\.\d+\.blocks\.\d+\.)(layernorm|layer_norm)\.", r"\1norm."),
    (r"\.(pwconv|pointwise_conv)([12])\.", r".mlp.fc\2."),
    (r"\.grn\.", ".mlp.grn."),
    (r"\.layer_scale_parameter$", ".gamma"),
    (r"^(layernorm|layer_norm|norm)\.", "head.norm."),
)
TORCHVISION = _layout(
    "torchvision",
    r"^encoder\.layers\.encoder_layer_0\.",
    (r"^class_token$", "cls_token"),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (_BLOCK + r"ln_([12])\.", r"\1norm\2."),
    (_BLOCK + r"self_attention\.in_proj_", r"\1attn.qkv."),
    (_BLOCK + r"self_attention\.out_proj\.", r"\1attn.proj."),
    (_BLOCK + r"mlp\.(?:0|linear_1)\.", r"\1mlp.fc1."),
    (_BLOCK + r"mlp\.(?:3|linear_2)\.", r"\1mlp.fc2."),
    (r"^encoder\.ln\.", "norm."),
    (r"^heads\.", "head."),
)
MMPRETRAIN = _layout(
    "mmpretrain",
    r"^layers\.0\.(ln1|ffn)\.",
    (r"^patch_embed\.projection\.", "patch_embed.proj."),
    (r"^layers\.(\d+)\.", r"blocks.\1."),
    (_BLOCK + r"ln([12])\.", r"\1norm\2."),
    (_BLOCK + r"ffn\.layers\.0\.0\.", r"\1mlp.fc1."),
    (_BLOCK + r"ffn\.layers\.1\.", r"\1mlp.fc2."),
    (_BLOCK + r"(attn|ffn)\.gamma([12])\.weight$", r"\1ls\3.gamma"),
    (r"^pre_norm\.", "norm_pre."),
    (r"^ln1\.", "norm."),
    (r"^ln2\.", "fc_norm."),
)
RENAMED = (TRANSFORMERS, CONVNEXT, TORCHVISION, MMPRETRAIN)
_CONVERTED_BY_TIMM = (
    _layout("LoRA or another adaptor (merge it into the model first)", r"lora_[AB]|base_model\.model\."),
    _layout("flat parameters of FSDP (gather the full state dict first)", r"_flat_param|flat_param_\d"),
    _layout("quantized weights (give the full ones)", r"\.(qweight|qzeros|SCB|absmax|weight_scale)$"),
    _layout("OpenCLIP or OpenAI's CLIP", r"visual\.(trunk|transformer|class_embedding|conv1)"),
    _layout("DINOv3 (Meta)", r"(^|\.)storage_tokens$"),
    _layout("DINOv2 with registers (Meta)", r"(^|\.)register_tokens$"),
    _layout("AIMv2", r"preprocessor\.patchifier\."),
    _layout("BEiT-3", r"(^|\.)beit3\."),
    _layout("C-RADIO", r"(^|\.)radio_model\."),
    _layout("a masked autoencoder", r"(^|\.)decoder_(embed|blocks)\."),
    _layout("timm or DINO", r"(^|\.)blocks\.\d+\.(\d+\.)?(norm1|attn\.qkv)\."),
    _layout("a staged model of timm", r"(^|\.)(stages|layers|layer1)\.\d+\."),
)


def label_of(names: Iterable[str]) -> str:
    """Return how the layout of weights with these names is called; "" where it is none that is known here."""
    known = list(names)
    for layout in RENAMED:
        loose = re.compile(layout.sign.pattern.replace("^", r"(?:^|\.)"))
        if any(loose.search(name) for name in known):
            return layout.label
    return next((layout.label for layout in _CONVERTED_BY_TIMM if layout.is_in(known)), "")


# ---------------------------------------------------------------- what a backbone does not need

_HEADS = r"(\w+_)?heads?(_\w+)?|fc|classif\w*|last_linear|pre_logits|proj|projection|pooler|visual_projection"
_TRAINING = (
    r"(\w+_)?(projectors?|predictors?|prototypes|criterion|queue\w*|loss\w*)|decoder(_\w+)?|mask_token|masked_embed|"
    r"text_\w+|teacher_\w+|logit_\w+|center|local_cls_norm"
)
_COUNTED = r"relative_position_index|attn_mask|periods|bias_mask|inv_freq|position_ids|total_ops|total_params"
_OTHER_SENSES = r"beit3\.(text_embed|vision_embed\.mask_token)(\.|$)|.*\.B\."
_UNNEEDED = re.compile(rf"({_HEADS}|{_TRAINING})(\.|$)|(.*\.)?({_COUNTED})$|{_OTHER_SENSES}")
_PART_OF_FEATURES = re.compile(r"conv_head\.|(head|pooler)(\.\w+)*\.(norm|layernorm|layer_norm)\.")


def is_unneeded(name: str) -> bool:
    """Tell whether a tensor of this name is no part of the features: a head, a decoder, a mask token, a counter ...

    A norm is never unneeded, also not one inside of a head.
    """
    return bool(_UNNEEDED.match(name)) and not _PART_OF_FEATURES.match(name)


# ---------------------------------------------------------------- from renamed tensors to timm's

_CHUNKED = re.compile(r"(^|\.)blocks\.\d+\.(\d+)\.")
_WRAPPERS = re.compile(r"(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.)")


def unwrapped(name: str) -> str:
    """Return a name without what torch.compile, FSDP and checkpointing of activations put in, wherever it stands."""
    return _WRAPPERS.sub("", name).removeprefix(".")


def unchunked(name: str) -> str:
    """Return a name without the chunk of blocks that DINOv2's and DINOv3's training puts them in."""
    return _CHUNKED.sub(r"\1blocks.\2.", name)


def joined(state: State, wanted: Mapping[str, Tensor]) -> State:
    """Return the state with queries, keys and values joined where ``wanted`` has them so, and shapes as timm's."""
    out = {name: _shaped(name, value, wanted) for name, value in state.items()}
    for stem in [each.removesuffix("q_proj.weight") for each in out if each.endswith(".q_proj.weight")]:
        if f"{stem}q_proj.weight" not in wanted:
            _join(out, stem, wanted)
    for stem in [each.removesuffix("gate_proj.weight") for each in out if each.endswith("mlp.gate_proj.weight")]:
        _name_gate(out, stem, wanted)
    for before, after in _MLP:
        for name in [each for each in out if before in each and each.replace(before, after) in wanted]:
            out[name.replace(before, after)] = out.pop(name)
    for name in [each for each in out if each.endswith(".qkv.bias_mask")]:
        bias = out.get(name.removesuffix("_mask"))
        if bias is not None:  # DINOv3's keys have no bias, whatever stands there
            query, keys, values = bias.chunk(3)
            out[name.removesuffix("_mask")] = torch.cat([query, torch.zeros_like(keys), values])
    return _pooled(_registers(out, wanted))


def has_lost_keys(name: str, value: Tensor, wanted: Mapping[str, Tensor]) -> bool:
    """Tell whether ``value`` is a joined bias with one of the keys, for which a model with ``q_bias`` has no place."""
    stem = name.removesuffix("qkv.bias")
    return stem != name and f"{stem}q_bias" in wanted and bool(value.chunk(3)[1].any())


_MLP = (("mlp.up_proj.", "mlp.fc1."), ("mlp.down_proj.", "mlp.fc2."), ("mlp.w12.", "mlp.fc1."), ("mlp.w3.", "mlp.fc2."))


def _shaped(name: str, value: Tensor, wanted: Mapping[str, Tensor]) -> Tensor:
    """Return ``value`` with dimensions of size 1 added or taken away, as the tensor of this name in timm has them."""
    as_wanted = wanted.get(name)
    if name == "pos_embed" and value.ndim == 2:
        return value[None]
    if as_wanted is not None and [s for s in as_wanted.shape if s > 1] == [s for s in value.shape if s > 1]:
        return value.reshape(as_wanted.shape)
    return value


def _join(out: State, stem: str, wanted: Mapping[str, Tensor]) -> None:
    """Join ``q_proj``, ``k_proj`` and ``v_proj``; keys may lack a bias, as in BEiT and DINOv3."""
    parts = [out.get(f"{stem}{letter}_proj.weight") for letter in "qkv"]
    biases = [out.get(f"{stem}{letter}_proj.bias") for letter in "qkv"]
    if any(part is None for part in parts) or (biases[0] is None) != (biases[2] is None):
        return
    for name in [f"{stem}{letter}_proj.{kind}" for letter in "qkv" for kind in ("weight", "bias")]:
        out.pop(name, None)
    out[f"{stem}qkv.weight"] = torch.cat([part for part in parts if part is not None])
    query, keys, values = biases
    if query is None or values is None:
        return
    if f"{stem}q_bias" in wanted and (keys is None or not bool(keys.any())):
        out[f"{stem}q_bias"], out[f"{stem}v_bias"] = query, values
    else:
        out[f"{stem}qkv.bias"] = torch.cat([query, torch.zeros_like(query) if keys is None else keys, values])


def _name_gate(out: State, stem: str, wanted: Mapping[str, Tensor]) -> None:
    """Name the two halves of a gated MLP: apart or as one tensor, the gate first, as ``wanted`` has them."""
    for kind in ("weight", "bias"):
        gate, up = out.pop(f"{stem}gate_proj.{kind}", None), out.pop(f"{stem}up_proj.{kind}", None)
        if gate is None or up is None:
            continue
        if f"{stem}fc1_g.weight" in wanted:
            out[f"{stem}fc1_g.{kind}"], out[f"{stem}fc1_x.{kind}"] = gate, up
        else:
            out[f"{stem}fc1.{kind}"] = torch.cat([gate, up])


def _registers(out: State, wanted: Mapping[str, Tensor]) -> State:
    """Prepare register tokens for timm's conversion, which knows DINOv2's by a mask token and DINOv3's by its name."""
    if "register_tokens" in out and "reg_token" in wanted:
        if "pos_embed" in out:
            out.setdefault("mask_token", torch.zeros(1))
        else:
            out["storage_tokens"] = out.pop("register_tokens")
    return out


def _pooled(out: State) -> State:
    """Split SigLIP's attention pooling into timm's query and its keys and values."""
    for kind in ("weight", "bias"):
        found = out.pop(f"attn_pool.in_proj_{kind}", None)
        if found is not None:
            width = len(found) // 3
            out[f"attn_pool.q.{kind}"], out[f"attn_pool.kv.{kind}"] = found[:width], found[width:]
    return out
