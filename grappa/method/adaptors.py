"""Adaptors: small modules, trained in the blocks of a frozen backbone, that add to a block's output or its queries and
keys.

Shapes: B batch, T tokens, D width, R bottleneck (of in-context adaptors: rank), G pseudo-granularities.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from grappa.backbone.frozen import Backbone

AdaptorKind = Literal["bottleneck", "in_context", "both"]
Activation = Callable[[Tensor], Tensor]


class Adaptor(nn.Module):
    """A(h) = U gelu(D h + b) (Houlsby et al. 2019), D (R, D), U (D, R); U starts at 0, so a new adaptor adds nothing.

    Differs from Houlsby in having no bias in U and one adaptor a block (Pfeiffer et al. 2021), on the block's output.
    """

    activation: Activation = staticmethod(F.gelu)

    def __init__(self, width: int, bottleneck_dim: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.down = nn.Linear(width, bottleneck_dim)
        self.up = nn.Linear(bottleneck_dim, width, bias=False)
        nn.init.normal_(self.down.weight, std=width**-0.5, generator=generator)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.weight)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        """Return the residual (B, T, D), to be added to ``hidden_BTD``."""
        residual: Tensor = self.up(self.activation(self.down(hidden_BTD)))
        return residual

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``down`` (R, D), its bias (R,) and ``up`` (R, D): the residual is activation(down h + bias)^T up."""
        return self.down.weight.detach(), self.down.bias.detach(), self.up.weight.detach().T


class InContextAdaptor(nn.Module):
    """DVA's in-context adaptation: adds ``Uq Dq h`` to a block's queries and ``Uk Dk h`` to its keys, for its normed
    input h; every D is (R, D), every U is (D, R) and starts at 0.

    The paper's activation, scale and rank are not known. Ours has no activation and the scale 1, so that it folds into
    the frozen projections (:func:`folded`) like a low-rank update (Hu et al. 2022). The block's values are not adapted.
    """

    activation: Activation = staticmethod(lambda stacked: stacked)

    def __init__(self, width: int, rank: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.query_down, self.key_down = (nn.Linear(width, rank, bias=False) for _ in range(2))
        self.query_up, self.key_up = (nn.Linear(rank, width, bias=False) for _ in range(2))
        for down, up in ((self.query_down, self.query_up), (self.key_down, self.key_up)):
            nn.init.normal_(down.weight, std=width**-0.5, generator=generator)
            nn.init.zeros_(up.weight)

    def forward(self, normed_BTD: Tensor) -> Tensor:
        """Return what is added to queries and keys, (B, T, 2 D)."""
        both = self.query_up(self.query_down(normed_BTD)), self.key_up(self.key_down(normed_BTD))
        return torch.cat(both, dim=-1)

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``down`` (2 R, D), its bias (2 R,), which is zero, and ``up`` (2 R, 2 D): see ``Adaptor.parts``."""
        down = torch.cat([self.query_down.weight, self.key_down.weight]).detach()
        up = torch.block_diag(self.query_up.weight.T, self.key_up.weight.T).detach()
        return down, torch.zeros(len(down)).to(down), up

    def update(self) -> Tensor:
        """Return the sum that this adaptor adds to the weights of queries and keys, (2 D, D)."""
        query = self.query_up.weight @ self.query_down.weight
        return torch.cat([query, self.key_up.weight @ self.key_down.weight]).detach()


class AdaptorSet(nn.Module):
    """The adaptors of all blocks for one pseudo-granularity, trained together.

    A block has a bottleneck on its output (``adaptors``), an in-context adaptor on its queries and keys
    (``in_context``), or both.
    """

    def __init__(
        self, num_blocks: int, width: int, bottleneck_dim: int, *, in_context_rank: int = 0, seed: int = 0
    ) -> None:
        """Make new adaptors; a ``bottleneck_dim`` or an ``in_context_rank`` of 0 stands for no adaptor of that kind."""
        super().__init__()
        generator, blocks = torch.Generator().manual_seed(seed), range(num_blocks)
        self.adaptors = nn.ModuleList(
            Adaptor(width, bottleneck_dim, generator=generator) for _ in blocks if bottleneck_dim
        )
        self.in_context = nn.ModuleList(
            InContextAdaptor(width, in_context_rank, generator=generator) for _ in blocks if in_context_rank
        )

    @property
    def outputs(self) -> nn.ModuleList:
        """The residuals of the blocks' outputs."""
        return self.adaptors

    @property
    def width(self) -> int:
        """The width D of the hidden states."""
        adaptor: nn.Module = next(iter([*self.adaptors, *self.in_context]))
        return int(next(each for name, each in adaptor.named_parameters() if name.endswith("down.weight")).shape[1])

    def __len__(self) -> int:
        return max(len(self.adaptors), len(self.in_context))

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor]) -> AdaptorSet:
        """Rebuild an adaptor set from its tensors; ValueError when the names are not those of an adaptor set."""
        downs = {name: value for name, value in state.items() if name.endswith("down.weight")}
        first, beside = downs.get("adaptors.0.down.weight"), downs.get("in_context.0.query_down.weight")
        if first is None and beside is None:
            raise ValueError(f"found tensors {sorted(state)[:3]}, expected those of an adaptor set")
        blocks = {name.split(".")[1] for name in downs}
        num_blocks = len(blocks)  # never a number from a name: a million blocks would be made of a few bytes
        if blocks != {str(number) for number in range(num_blocks)}:
            raise ValueError(f"found adaptors of the blocks {sorted(blocks)[:3]}, expected those of 0 to the last one")
        bottleneck_dim, rank = (0 if each is None else len(each) for each in (first, beside))
        adaptors = cls(num_blocks, next(iter(downs.values())).shape[1], bottleneck_dim, in_context_rank=rank)
        adaptors.load_state_dict(state)
        return adaptors


def adaptor_set_sizes(kind: AdaptorKind, bottleneck_dim: int, in_context_rank: int) -> tuple[int, int]:
    """Return bottleneck and rank of an adaptor set of a kind; ``both`` has half the bottleneck and half the rank, at
    least 1."""
    half = max(1, bottleneck_dim // 2), max(1, in_context_rank // 2)
    return {"bottleneck": (bottleneck_dim, 0), "in_context": (0, in_context_rank), "both": half}[kind]


def automatic_rank(width: int) -> int:
    """Return the rank that gives in-context adaptors 0.68 % of a ViT's parameters: 16 at a width of 768 (ViT-B)."""
    return max(1, round(width / 48))


def folded(backbone: Backbone, adaptors: AdaptorSet) -> tuple[Backbone, AdaptorSet]:
    """Return the inference form: a backbone whose query and key weights include the in-context adaptors, and an adaptor
    set of the bottlenecks that remain.

    The backbone has the modules and the number of parameters of the plain one, and the rows of its weights that make
    values are the same bits. The embeddings are equal up to rounding. Without in-context adaptors the arguments are
    returned.
    """
    if not len(adaptors.in_context):
        return backbone, adaptors
    backbone, rest = deepcopy(backbone), deepcopy(adaptors)
    rest.in_context = nn.ModuleList()
    blocks: Sequence[nn.Module] = list(backbone.model.blocks)  # type: ignore[arg-type]
    for block, adaptor in zip(blocks, adaptors.in_context, strict=True):
        weight: Tensor = block.attn.qkv.weight  # type: ignore[union-attr, assignment]
        update = adaptor.update()  # type: ignore[operator]
        weight.data[: len(update)] += update.to(weight.device)
    return backbone, rest
