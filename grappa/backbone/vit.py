"""One block of timm's plain vision transformer, written out.

The last block needs the class token only, and a block with adapted queries and keys cannot be timm's own.

Shapes: B batch, T tokens, D width, H attention heads, E width of an attention head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class FusedWhereFaster:
    """A CPU's choice of the fused attention kernel; modules of timm ask their ``fused_attn`` in each pass.

    True in float32; in bfloat16 explicit products are faster (tests/benchmarks: R10, R1). The two differ in the order
    of their sums only.
    """

    def __bool__(self) -> bool:
        return not torch.is_autocast_enabled("cpu")


def reads_class_token(model: Any) -> bool:
    """Tell whether ``model`` is timm's vision transformer whose embedding is the class token after the final norm."""
    if (type(model).__module__, type(model).__name__) != ("timm.models.vision_transformer", "VisionTransformer"):
        return False
    pooled = model.global_pool == "token" and model.attn_pool is None and isinstance(model.fc_norm, nn.Identity)
    return pooled and model.cls_token is not None


def is_plain(block: nn.Module) -> bool:
    """Tell whether ``block`` is timm's plain pre-norm block with plain attention, the kind written out here."""
    attention = getattr(block, "attn", None)
    plain = (type(block).__name__, type(attention).__name__) == ("Block", "Attention")
    return plain and getattr(attention, "gate", None) is None


def run_block(
    block: Any, hidden_BTD: Tensor, in_context: Callable[[Tensor], Tensor] | None = None, *, class_token: bool = False
) -> Tensor:
    """Return the output (B, T, D) of ``block(hidden_BTD)`` with adapted queries and keys.

    Args:
        block: one for which ``is_plain`` holds.
        in_context: from the block's normed input (B, T, D) to what is added to its queries and keys, (B, T, 2 D).
        class_token: return the output of the first token only, (B, 1, D); keys and values come from all tokens.
    """
    kept = hidden_BTD[:, :1] if class_token else hidden_BTD
    normed_BTD = block.norm1(hidden_BTD)
    added = None if in_context is None else in_context(normed_BTD)
    kept = kept + block.drop_path1(block.ls1(_attend(block.attn, normed_BTD, added, class_token=class_token)))
    out: Tensor = kept + block.drop_path2(block.ls2(block.mlp(block.norm2(kept))))
    return out


def _attend(attention: Any, normed_BTD: Tensor, added: Tensor | None, *, class_token: bool) -> Tensor:
    weight, bias = attention.qkv.weight, attention.qkv.bias
    width = weight.shape[0] // 3
    asking = normed_BTD[:, :1] if class_token else normed_BTD
    query = F.linear(asking, weight[:width], None if bias is None else bias[:width])
    both = F.linear(normed_BTD, weight[width:], None if bias is None else bias[width:])
    keys, values = both.chunk(2, dim=-1)
    if added is not None:
        to_query, to_keys = added.chunk(2, dim=-1)
        query, keys = query + to_query[:, : query.shape[1]], keys + to_keys
    query_BHTE, keys_BHTE = (
        attention.q_norm(_split_heads(attention, query)),
        attention.k_norm(_split_heads(attention, keys)),
    )
    mixed = _mix(attention, query_BHTE, keys_BHTE, _split_heads(attention, values)).transpose(1, 2).flatten(2)
    mixed = attention.norm(mixed) if hasattr(attention, "norm") else mixed
    out: Tensor = attention.proj_drop(attention.proj(mixed))
    return out


def _mix(attention: Any, query_BHTE: Tensor, keys_BHTE: Tensor, values_BHTE: Tensor) -> Tensor:
    """Mix the values by attention: for a single query explicitly, else as ``Backbone.on`` has chosen.

    A single query gains nothing from the fused kernel.
    """
    if attention.fused_attn and query_BHTE.shape[2] > 1:
        return F.scaled_dot_product_attention(query_BHTE, keys_BHTE, values_BHTE)
    shares = (query_BHTE * attention.scale @ keys_BHTE.transpose(-2, -1)).softmax(dim=-1)
    return shares @ values_BHTE


def _split_heads(attention: Any, projected: Tensor) -> Tensor:
    return projected.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
