"""Fusion: in each block, attention over the adaptor sets (AdapterFusion, Pfeiffer et al. 2021).

For each token h: ``u_g = A_g(h)``, ``a = softmax_g(<Wq h, Wk u_g> / temperature)``, residual ``sum_g a_g u_g``. As in
the paper keys come from adaptor outputs without the residual and there is no 1/sqrt(D); ours differs in having no value
matrix, no bias, and Wk = 0 at the start, so an untrained fusion is the mean over the adaptor sets. In-context adaptors
are fused in the same way, which is ours too: h is then a block's normed input, and u_g is what adaptor g adds to the
block's queries and keys.

Shapes: B batch, T tokens, D width, R bottleneck, G pseudo-granularities, L blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from grappa.backbone.frozen import Adaptation, Backbone, Residual
from grappa.method.adaptors import Activation, AdaptorSet

AttentionLevel = Literal["token", "cls"]


class FusionLayer(nn.Module):
    """Attention over the G adaptors of one block, all of one kind; O is D for bottlenecks, 2 D for in-context adaptors.

    The adaptors are frozen copies: ``down`` (G*R, D), ``bias`` (G*R,), ``up`` (G*R, O). Only ``query`` (D, D) and
    ``key`` (D, O) are trained. No (B, T, G, O) tensor is made: <Wq h, Wk U_g v_g> = <U_g^T Wk^T Wq h, v_g>.
    """

    def __init__(self, adaptors: Sequence[nn.Module], *, level: AttentionLevel = "token", temperature: float = 1.0):
        super().__init__()
        self.num_sets, self.level, self.temperature = len(adaptors), level, temperature
        self.activation: Activation = adaptors[0].activation  # type: ignore[assignment]
        downs, biases, ups = zip(*(adaptor.parts() for adaptor in adaptors), strict=True)  # type: ignore[operator]
        self.register_buffer("down", torch.cat(downs))
        self.register_buffer("bias", torch.cat(biases))
        self.register_buffer("up", torch.cat(ups))
        width = self.down.shape[1]
        self.query = nn.Parameter(torch.zeros(width, width))
        self.key = nn.Parameter(torch.zeros(width, self.up.shape[1]))

    down: Tensor
    bias: Tensor
    up: Tensor

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        """Return the residual (B, T, O)."""
        return self.with_attention(hidden_BTD)[0]

    def with_attention(self, hidden_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Return the residual (B, T, O) and the granularity attention (B, T or 1, G): non-negative, sum 1 over G."""
        values = self._split(self.activation(F.linear(hidden_BTD, self.down, self.bias)))
        seen = hidden_BTD if self.level == "token" else hidden_BTD[:, :1]
        searched = F.linear(F.linear(seen, self.query), self.key.T)
        attention = self._attend(self._split(F.linear(searched, self.up)), values)
        return self._mix(attention, values), attention

    def fold(self) -> FoldedFusionLayer:
        """Return the equal inference form with one projection less."""
        return FoldedFusionLayer(self)

    def _split(self, stacked: Tensor) -> Tensor:
        return stacked.unflatten(-1, (self.num_sets, -1))

    def _attend(self, searched_BTGR: Tensor, values_BTGR: Tensor) -> Tensor:
        values = values_BTGR[:, : searched_BTGR.shape[1]]
        scores = (searched_BTGR.float() * values.float()).sum(-1) / self.temperature
        return scores.softmax(-1)

    def _mix(self, attention_BTG: Tensor, values_BTGR: Tensor) -> Tensor:
        weighted = attention_BTG.to(values_BTGR.dtype).unsqueeze(-1) * values_BTGR
        return F.linear(weighted.flatten(-2), self.up.T)


class FoldedFusionLayer(nn.Module):
    """A fusion layer for inference: h -> [v_1..v_G | s_1..s_G] in one product, s_g = U_g^T Wk^T Wq h."""

    def __init__(self, layer: FusionLayer) -> None:
        super().__init__()
        self.num_sets, self.level, self.temperature = layer.num_sets, layer.level, layer.temperature
        self.activation = layer.activation
        search = (layer.up @ layer.key.T @ layer.query).detach()
        self.register_buffer("project", torch.cat([layer.down, search]))
        self.register_buffer("bias", torch.cat([layer.bias, torch.zeros_like(layer.bias)]))
        self.register_buffer("up", layer.up.clone())

    project: Tensor
    bias: Tensor
    up: Tensor

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        """Return the residual (B, T, O), equal to the plain layer's up to rounding."""
        return self.with_attention(hidden_BTD)[0]

    def with_attention(self, hidden_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Return the residual (B, T, O) and the granularity attention (B, T or 1, G), as the plain layer does."""
        if self.level == "cls":
            half = len(self.up)
            values = F.linear(hidden_BTD, self.project[:half], self.bias[:half])
            return self._combine(self.activation(values), F.linear(hidden_BTD[:, :1], self.project[half:]))
        values, searched = F.linear(hidden_BTD, self.project, self.bias).chunk(2, dim=-1)
        return self._combine(self.activation(values), searched)

    def _combine(self, values: Tensor, searched: Tensor) -> tuple[Tensor, Tensor]:
        values = values.unflatten(-1, (self.num_sets, -1))
        searched = searched.unflatten(-1, (self.num_sets, -1))
        scores = (searched.float() * values[:, : searched.shape[1]].float()).sum(-1) / self.temperature
        attention = scores.softmax(-1)
        weighted = attention.to(values.dtype).unsqueeze(-1) * values
        return F.linear(weighted.flatten(-2), self.up.T), attention


class Fusion(nn.Module):
    """One fusion layer a unit over G adaptor sets of one kind; where the adaptor sets have both kinds, one more where
    queries and keys are made.
    """

    reads_first = True

    def __init__(
        self, sets: Sequence[AdaptorSet], *, level: AttentionLevel = "token", temperature: float = 1.0
    ) -> None:
        super().__init__()
        if (
            not sets
            or len({tuple((name, value.shape) for name, value in each.named_parameters()) for each in sets}) != 1
        ):
            raise ValueError(
                f"found {len(sets)} adaptor sets; fusion needs one or more, all of one kind and size, with as many "
                "blocks"
            )
        places = ([each.outputs for each in sets], [each.in_context for each in sets])
        self.layers, self.in_context = (
            nn.ModuleList(
                FusionLayer(block, level=level, temperature=temperature) for block in zip(*place, strict=True)
            )
            for place in places
        )

    @property
    def outputs(self) -> nn.ModuleList:
        """The residuals of the blocks' outputs."""
        return self.layers

    def form(self) -> dict[str, Any]:
        """Return how the layers attend, ``level`` and ``temperature``, for JSON."""
        layer: Any = next(iter([*self.layers, *self.in_context]))
        return {"level": layer.level, "temperature": layer.temperature}

    def trained_state(self) -> dict[str, Tensor]:
        """Return the trained tensors only: ``layers.<l>.query``, ``layers.<l>.key``, ``in_context.<l>.query`` ..."""
        return {name: value.detach() for name, value in self.named_parameters()}

    def load_trained_state(self, state: dict[str, Tensor]) -> None:
        """Load what ``trained_state`` returned; ValueError when names differ."""
        if set(state) != set(self.trained_state()):
            raise ValueError(
                f"found tensors {sorted(state)[:3]}, expected those of a fusion of such sets, "
                f"{sorted(self.trained_state())[:3]}"
            )
        self.load_state_dict(state, strict=False)

    def start(self, *, query_std: float, key_std: float, generator: torch.Generator) -> None:
        """Draw the starting point of training; from equal attention every attention loss would have a zero gradient."""
        for layer in [*self.layers, *self.in_context]:
            nn.init.normal_(layer.query, std=query_std, generator=generator)
            nn.init.normal_(layer.key, std=key_std, generator=generator)

    def folded(self) -> FoldedFusion:
        """Return the blocks' residuals in their inference form."""
        return FoldedFusion(self)


class FoldedFusion(nn.Module):
    """The layers of a fusion in their inference form."""

    reads_first = True

    def __init__(self, fusion: Fusion) -> None:
        super().__init__()
        self.outputs, self.in_context = (
            nn.ModuleList(layer.fold() for layer in place)  # type: ignore[operator]
            for place in (fusion.layers, fusion.in_context)
        )


@dataclass(frozen=True)
class _Attending:
    """The layers of a fusion; every call of a layer appends the first token's attention to ``attentions``."""

    fusion: Adaptation
    attentions: list[Tensor]
    reads_first: bool = True

    @property
    def outputs(self) -> list[Residual]:
        return [self._noting(layer) for layer in self.fusion.outputs]

    @property
    def in_context(self) -> list[Residual]:
        return [self._noting(layer) for layer in self.fusion.in_context]

    def _noting(self, layer: Any) -> Residual:
        def residual(hidden: Tensor) -> Tensor:
            value, attention_BTG = layer.with_attention(hidden)
            self.attentions.append(attention_BTG[:, 0])
            return value

        return residual


def fused_forward(backbone: Backbone, fusion: Adaptation, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the embeddings (B, D), not normalised, and the image's attention (B, L, G) of normalised images: its
    class token's or, where the model reads none, that of the mean of a unit's tokens.

    ``fusion`` may be a folded one. With adaptor sets of both kinds a block attends twice, first over the in-context
    adaptors, and counts as two: (B, 2 L, G).
    """
    noting = _Attending(fusion, [])
    embeddings = backbone(images, noting)
    return embeddings, torch.stack(noting.attentions, dim=1)


def class_token_attention(backbone: Backbone, images: Tensor, fusion: Adaptation | None) -> Tensor:
    """Return (B, L, G) float32, the images' granularity attention (see ``fused_forward``); called like ``embed``."""
    assert fusion is not None, "without a fusion nothing attends"
    return fused_forward(backbone, fusion, images)[1].float()
