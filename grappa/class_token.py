"""A block's output for the class token alone: exact, since an embedding reads nothing else of the last block.

Shapes: B batch, T tokens, D width, H heads, E width of a head.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F


def can_skip_patches(block: nn.Module) -> bool:
    """Tell whether ``block`` is timm's plain pre-norm block with its plain attention, which ``class_token`` knows."""
    attention = getattr(block, "attn", None)
    plain = (type(block).__name__, type(attention).__name__) == ("Block", "Attention")
    return plain and getattr(attention, "gate", None) is None


def class_token(block: Any, hidden_BTD: Tensor) -> Tensor:
    """Return (B, 1, D), what ``block(hidden_BTD)[:, :1]`` is: keys and values of all tokens, all the rest for one."""
    token_B1D = hidden_BTD[:, :1]
    token_B1D = token_B1D + block.drop_path1(block.ls1(_attend(block.attn, block.norm1(hidden_BTD))))
    out: Tensor = token_B1D + block.drop_path2(block.ls2(block.mlp(block.norm2(token_B1D))))
    return out


def _attend(attention: Any, normed_BTD: Tensor) -> Tensor:
    weight, bias = attention.qkv.weight, attention.qkv.bias
    width = weight.shape[0] // 3
    query = F.linear(normed_BTD[:, :1], weight[:width], None if bias is None else bias[:width])
    both = F.linear(normed_BTD, weight[width:], None if bias is None else bias[width:])
    keys, values = both.chunk(2, dim=-1)
    query_BH1E, keys_BHTE = attention.q_norm(_heads(attention, query)), attention.k_norm(_heads(attention, keys))
    shares = (query_BH1E * attention.scale @ keys_BHTE.transpose(-2, -1)).softmax(dim=-1)
    mixed = (shares @ _heads(attention, values)).transpose(1, 2).flatten(2)
    mixed = attention.norm(mixed) if hasattr(attention, "norm") else mixed
    out: Tensor = attention.proj_drop(attention.proj(mixed))
    return out


def _heads(attention: Any, projected: Tensor) -> Tensor:
    return projected.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
