"""Where a model makes its queries and keys: linear modules, in which in-context adaptors add to the output.

Attention is written in a few ways: one product ``qkv``, or ``qk`` beside ``v``, or ``q`` beside ``kv``, or one product
each. In all of them the rows of the weight come in the order queries, keys, values; classes that mix them head by head
are left out.

Shapes: D width of the input; the widths of queries and keys may differ from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

_TOGETHER = (("qkv", 3), ("qk", 2))
_APART = (("q_proj", "k_proj"), ("q", "k"), ("q", "kv"), ("query", "key"), ("to_query", "to_key"))
_BY_HEADS = ("timm.models.tiny_vit", "timm.models.levit", "timm.models.efficientformer")
_OTHER_SENSE = ("ChannelAttention", "ChannelAttentionV2")  # DaViT's: its queries are what is mixed


@dataclass(frozen=True)
class Projection:
    """The linear modules that make queries and keys from an input of ``width`` channels.

    query, key: the names of the modules, the same name where one makes both. queries, keys: how many rows of their
    weights make queries and keys, the first ones; in a shared module the keys' rows follow those of the queries.
    """

    query: str
    key: str
    width: int
    queries: int
    keys: int

    @property
    def shared(self) -> bool:
        """Whether one module makes queries and keys."""
        return self.query == self.key


def find_projections(model: nn.Module, units: Sequence[str]) -> tuple[Projection, ...]:
    """Return the projections within the units of these names, in the order in which the model holds them."""
    inside = tuple(f"{name}." for name in units)
    found = (_of(name, module) for name, module in model.named_modules() if f"{name}.".startswith(inside))
    return tuple(each for each in found if each is not None)


def _of(name: str, attention: nn.Module) -> Projection | None:
    kind = type(attention)
    if kind.__module__ in _BY_HEADS or kind.__name__ in _OTHER_SENSE or getattr(attention, "head_first", False):
        return None
    linear = {key: each for key, each in attention.named_children() if isinstance(each, nn.Linear)}
    for key, parts in _TOGETHER:
        if key in linear:
            return _shared(f"{name}.{key}", linear[key], parts, linear.get("proj"))
    for query, key in _APART:
        if query in linear and key in linear:
            return _apart(name, query, key, linear)
    return None


def _shared(name: str, made: nn.Linear, parts: int, after: nn.Linear | None) -> Projection | None:
    """Return the projection, if the module's rows are queries, keys and as many values as are read after it."""
    each, rest = divmod(made.out_features, parts)
    if rest or after is None or each != after.in_features:
        return None
    return Projection(name, name, made.in_features, each, each)


def _apart(name: str, query: str, key: str, linear: dict[str, nn.Linear]) -> Projection | None:
    asking, asked = linear[query], linear[key]
    if asking.in_features != asked.in_features:
        return None
    keys = asked.out_features // 2 if key == "kv" else asked.out_features
    return Projection(f"{name}.{query}", f"{name}.{key}", asking.in_features, asking.out_features, keys)


def call_by_module(model: nn.Module) -> None:
    """Let attention with biases of its own call its ``qkv``, which it else reads the weight of; equal up to rounding.

    Only what is called can be hooked.
    """
    for module in model.modules():
        attention: Any = module
        if hasattr(module, "qkv_bias_separate") and getattr(module, "q_bias", None) is not None:
            attention.qkv_bias_separate = True
