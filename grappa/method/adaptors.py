"""Adaptors: small modules, trained in the blocks of a frozen backbone, that add to a block's output or its queries and
keys.

Shapes: B batch, T tokens, D width, R bottleneck (of in-context adaptors: rank), G pseudo-granularities.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from grappa.backbone.adapting.projections import Projection
from grappa.backbone.frozen import Backbone
from grappa.core.printing import shown

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
    input h; every D is (R, D), every U is (D, R) and starts at 0. In some models queries and keys have other widths.

    The paper's activation, scale and rank are not known. Ours has no activation and the scale 1, so that it folds into
    the frozen projections (:func:`folded`) like a low-rank update (Hu et al. 2022). The block's values are not adapted.
    """

    activation: Activation = staticmethod(lambda stacked: stacked)

    def __init__(
        self,
        width: int,
        rank: int,
        *,
        queries: int | None = None,
        keys: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Make a new adaptor; ``queries`` and ``keys`` are the widths of these, by default that of the input."""
        super().__init__()
        self.query_down, self.key_down = (nn.Linear(width, rank, bias=False) for _ in range(2))
        self.query_up, self.key_up = (nn.Linear(rank, each or width, bias=False) for each in (queries, keys))
        for down, up in ((self.query_down, self.query_up), (self.key_down, self.key_up)):
            nn.init.normal_(down.weight, std=width**-0.5, generator=generator)
            nn.init.zeros_(up.weight)

    def forward(self, normed_BTD: Tensor) -> Tensor:
        """Return what is added to queries and keys, side by side: (B, T, 2 D)."""
        both = self.query_up(self.query_down(normed_BTD)), self.key_up(self.key_down(normed_BTD))
        return torch.cat(both, dim=-1)

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``down`` (2 R, D), its bias (2 R,), which is zero, and ``up`` (2 R, 2 D): see ``Adaptor.parts``."""
        down = torch.cat([self.query_down.weight, self.key_down.weight]).detach()
        up = torch.block_diag(self.query_up.weight.T, self.key_up.weight.T).detach()
        return down, torch.zeros(len(down)).to(down), up

    def updates(self) -> tuple[Tensor, Tensor]:
        """Return what this adaptor adds to the weight of queries, and to that of keys: each (D, D)."""
        query = self.query_up.weight @ self.query_down.weight
        return query.detach(), (self.key_up.weight @ self.key_down.weight).detach()


class AdaptorSet(nn.Module):
    """The adaptors of all units for one pseudo-granularity, trained together.

    A unit has a bottleneck on its output (``adaptors``), queries and keys have an in-context adaptor where they are
    made (``in_context``), or both.
    """

    reads_first = False

    def __init__(
        self,
        widths: Sequence[int],
        bottleneck_dim: int,
        *,
        in_context_rank: int = 0,
        projections: Sequence[Projection] | None = None,
        seed: int = 0,
    ) -> None:
        """Make new adaptors; a ``bottleneck_dim`` or an ``in_context_rank`` of 0 stands for no adaptor of that kind.

        widths: of the units. projections: where queries and keys are made; None: once a unit, all of its width.
        """
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.adaptors = nn.ModuleList(
            Adaptor(width, bottleneck_dim, generator=generator) for width in widths if bottleneck_dim
        )
        if projections is None:
            projections = [Projection("", "", width, width, width) for width in widths]
        self.in_context = nn.ModuleList(
            InContextAdaptor(each.width, in_context_rank, queries=each.queries, keys=each.keys, generator=generator)
            for each in projections
            if in_context_rank
        )

    @classmethod
    def of(cls, backbone: Backbone, bottleneck_dim: int, *, in_context_rank: int = 0, seed: int = 0) -> AdaptorSet:
        """Make new adaptors for a backbone; BackboneError where it has no place for adaptors of a kind."""
        widths = backbone.widths if bottleneck_dim else ()
        projections = backbone.projections if in_context_rank else ()
        return cls(widths, bottleneck_dim, in_context_rank=in_context_rank, projections=projections, seed=seed)

    @property
    def outputs(self) -> nn.ModuleList:
        """The residuals of the units' outputs."""
        return self.adaptors

    def misfit(self, backbone: Backbone) -> str:
        """Return what speaks against these adaptors on a backbone: "" if they have its units and its widths."""
        adaptors: Sequence[Any] = list(self.adaptors)
        in_context: Sequence[Any] = list(self.in_context)
        own = tuple(each.up.out_features for each in adaptors)
        asked = tuple((each.query_up.out_features, each.key_up.out_features) for each in in_context)
        wanted = backbone.widths if own else ()
        places = tuple((each.queries, each.keys) for each in backbone.projections) if asked else ()
        if (own or asked) and own == wanted and asked == places:
            return ""
        return (
            f"an adaptor set has {max(len(own), len(asked))} blocks {shown((own or asked)[:1])} wide, the backbone "
            f"{max(len(wanted), len(places))} blocks {shown((wanted or places)[:1])} wide"
        )

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> AdaptorSet:
        """Rebuild an adaptor set from its tensors; ValueError when the names are not those of an adaptor set."""
        outputs = _numbered(state, "adaptors", "down.weight", "up.weight")
        in_context = _numbered(state, "in_context", "query_down.weight", "query_up.weight", "key_up.weight")
        if not outputs and not in_context:
            raise ValueError(f"found tensors {sorted(state)[:3]}, expected those of an adaptor set")
        adaptors = cls((), 0)
        adaptors.adaptors.extend(Adaptor(down[1], down[0]) for down, _ in outputs)
        adaptors.in_context.extend(
            InContextAdaptor(down[1], down[0], queries=query[0], keys=key[0]) for down, query, key in in_context
        )
        adaptors.load_state_dict(dict(state))
        return adaptors


def _numbered(state: Mapping[str, Tensor], kind: str, *parts: str) -> list[list[tuple[int, ...]]]:
    """Return the shapes of these parts of each adaptor of a kind, in the order of their numbers.

    The numbers must be those from 0 to the last one. A number is never read from a name: a million adaptors would be
    made of a few bytes.
    """
    numbers = {name.split(".")[1] for name in state if name.startswith(f"{kind}.")}
    if numbers != {str(number) for number in range(len(numbers))}:
        raise ValueError(f"found adaptors of the blocks {sorted(numbers)[:3]}, expected those of 0 to the last one")
    shapes = [[tuple(state[f"{kind}.{at}.{part}"].shape) for part in parts] for at in range(len(numbers))]
    for each in shapes:
        if any(len(shape) != 2 for shape in each):
            raise ValueError(f"found {kind} of the shapes {each}, expected matrices")
    return shapes


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
    places, in_context = backbone.projections, adaptors.in_context
    backbone, rest = deepcopy(backbone), deepcopy(adaptors)
    rest.in_context = nn.ModuleList()
    for place, adaptor in zip(places, in_context, strict=True):
        to_query, to_key = adaptor.updates()  # type: ignore[operator]
        _add(backbone, place.query, to_query, 0)
        _add(backbone, place.key, to_key, place.queries if place.shared else 0)
    return backbone, rest


def _add(backbone: Backbone, name: str, update: Tensor, start: int) -> None:
    """Add to the rows from ``start`` on of the weight of a linear module."""
    weight: Any = backbone.model.get_submodule(name).weight
    weight.data[start : start + len(update)] += update.to(weight.device)
