"""R11 and R17: what adaptors and fusion cost at inference, in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from grappa.backbone.frozen import Adaptation, Backbone, embed
from grappa.images.transforms import normalize
from grappa.method.adaptors import AdaptorSet
from grappa.method.fusion import Fusion
from tests.benchmarks import data
from tests.benchmarks.core import Gate, Options, Pair, Side, seconds
from tests.benchmarks.extraction import BATCH, CPU, pixels

NUM_SETS, BOTTLENECK = 8, 48


class PlainFusionLayer(nn.Module):
    """AdapterFusion as it is written: every set's output (B, T, G, D), keys and scores from these."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.downs = [layer.down[g * BOTTLENECK : (g + 1) * BOTTLENECK] for g in range(NUM_SETS)]
        self.biases = layer.bias.split(BOTTLENECK)
        self.ups = [layer.up[g * BOTTLENECK : (g + 1) * BOTTLENECK].T.contiguous() for g in range(NUM_SETS)]
        self.query, self.key, self.temperature = layer.query, layer.key, layer.temperature

    def forward(self, hidden: Tensor) -> Tensor:
        parts = zip(self.downs, self.biases, self.ups, strict=True)
        outputs = torch.stack([F.linear(F.gelu(F.linear(hidden, d, b)), u) for d, b, u in parts], dim=2)
        scores = (F.linear(hidden, self.query).unsqueeze(2) * F.linear(outputs, self.key)).sum(-1)
        attention = (scores / self.temperature).softmax(-1)
        return (attention.unsqueeze(-1) * outputs).sum(2)


def _fusion(backbone: Backbone) -> Fusion:
    sets = [_filled(backbone, seed) for seed in range(NUM_SETS)]
    fusion = Fusion(sets)
    fusion.start(query_std=0.02, key_std=0.02, generator=torch.Generator().manual_seed(0))
    return fusion.requires_grad_(False)


def _filled(backbone: Backbone, seed: int) -> AdaptorSet:
    adaptors = AdaptorSet(backbone.widths, BOTTLENECK, seed=seed).requires_grad_(False)
    for adaptor in adaptors.outputs:
        nn.init.normal_(adaptor.up.weight, std=0.02)  # type: ignore[union-attr, arg-type]
    return adaptors


def _side(
    backbone: Backbone, images: Tensor, adaptation: Adaptation | None, found: dict[str, Tensor], options: Options
) -> Side:
    name = "plain" if adaptation is None else type(adaptation.outputs[0]).__name__

    def run() -> None:
        with torch.inference_mode():
            found[name] = embed(backbone, images, adaptation)

    return seconds(run, options)


@contextmanager
def fused_to_plain(options: Options) -> Iterator[Pair]:
    """The folded fusion of eight sets in every block against the backbone without."""
    backbone, images = _start(options)
    adaptation, found = _fusion(backbone).folded(), dict[str, Tensor]()
    yield Pair(
        *(_side(backbone, images, each, found, options) for each in (adaptation, None)), _setup(backbone), repeats=9
    )


@contextmanager
def fused_to_naive(options: Options) -> Iterator[Pair]:
    """The folded fusion against AdapterFusion as it is written."""
    backbone, images = _start(options)
    fusion, found = _fusion(backbone), dict[str, Tensor]()
    naive = SimpleNamespace(outputs=[PlainFusionLayer(layer) for layer in fusion.outputs], in_context=())
    sides = [_side(backbone, images, each, found, options) for each in (fusion.folded(), naive)]

    def check() -> tuple[bool, str]:
        away = float((found["FoldedFusionLayer"] - found["PlainFusionLayer"]).abs().max())
        return away <= 1e-5, f"largest difference {away:.1e}"

    yield Pair(*sides, f"AdapterFusion's formula, no value matrix; {_setup(backbone)}", check, repeats=5)


@contextmanager
def one_set_to_plain(options: Options) -> Iterator[Pair]:
    """One adaptor set in every block, as a bottleneck student has, against the backbone without."""
    backbone, images = _start(options)
    adaptation, found = _filled(backbone, 0), dict[str, Tensor]()
    yield Pair(
        *(_side(backbone, images, each, found, options) for each in (adaptation, None)), _setup(backbone), repeats=9
    )


def _start(options: Options) -> tuple[Backbone, Tensor]:
    backbone = data.backbone(options.quick).on(CPU)
    return backbone, normalize(pixels(backbone), backbone.spec.mean, backbone.spec.std)


def _setup(backbone: Backbone) -> str:
    spec = backbone.spec
    return f"{spec.name} at {spec.image_size}, float32, batch {BATCH}, r={BOTTLENECK}, the same attention on both sides"


GATES = [
    Gate("R11 plain", "fusion of 8 sets / plain ViT: inference time", 1.35, fused_to_plain),
    Gate("R11 naive", "fusion of 8 sets / AdapterFusion as written: inference time", 0.65, fused_to_naive),
    Gate("R17", "one adaptor set in every block / plain ViT: inference time", 1.08, one_set_to_plain),
]
