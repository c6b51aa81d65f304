"""Adaptors: residual bottlenecks that follow the blocks of a frozen backbone.

Shapes: B batch, T tokens, D width, R bottleneck, G pseudo-granularities.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Adaptor(nn.Module):
    """A(h) = U gelu(D h + b) (Houlsby et al. 2019), D (R, D), U (D, R); U = 0 at birth, so a new adaptor adds nothing.

    Differs from Houlsby in having no bias in U and one adaptor a block (Pfeiffer et al. 2021), on the block's output.
    """

    def __init__(self, width: int, bottleneck_dim: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.down = nn.Linear(width, bottleneck_dim)
        self.up = nn.Linear(bottleneck_dim, width, bias=False)
        nn.init.normal_(self.down.weight, std=width**-0.5, generator=generator)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.weight)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        """Return the residual (B, T, D), to be added to ``hidden_BTD``."""
        residual: Tensor = self.up(F.gelu(self.down(hidden_BTD)))
        return residual


class AdaptorSet(nn.Module):
    """One adaptor a block, trained together for one pseudo-granularity; iterating gives the blocks' residuals."""

    def __init__(self, num_blocks: int, width: int, bottleneck_dim: int, *, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.adaptors = nn.ModuleList(Adaptor(width, bottleneck_dim, generator=generator) for _ in range(num_blocks))

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self.adaptors)

    def __len__(self) -> int:
        return len(self.adaptors)

    def __getitem__(self, block: int) -> nn.Module:
        return self.adaptors[block]

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor]) -> AdaptorSet:
        """Rebuild a set from its tensors; ValueError when the names are not those of a set."""
        downs = [name for name in state if name.endswith(".down.weight")]
        if not downs or "adaptors.0.down.weight" not in state:
            raise ValueError(f"found tensors {sorted(state)[:3]}, expected those of an adaptor set")
        bottleneck_dim, width = state["adaptors.0.down.weight"].shape
        adaptors = cls(len(downs), width, bottleneck_dim)
        adaptors.load_state_dict(state)
        return adaptors
