"""Explicit attention against timm's fused kernel, in a training step of an adaptor set on a CPU.

    python tests/benchmarks/bench_attention.py [--image-size 128] [--batch-size 64] [--pairs 7]

Both sides run in turn in one process; printed are the median of the paired ratios explicit / fused and their range.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from grappa.adaptors import AdaptorSet
from grappa.backbone import Backbone, BackboneSpec, build_backbone
from grappa.devices import autocast, resolve_precision

HALF = (0.5, 0.5, 0.5)


def main() -> None:
    """Print one line a precision."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=7)
    options = parser.parse_args()
    backbone = build_backbone(BackboneSpec(options.model, options.image_size, 1.0, HALF, HALF))
    adaptors = AdaptorSet(backbone.num_blocks, backbone.width, 48)
    images = torch.randn(options.batch_size, 3, options.image_size, options.image_size)
    for precision in dict.fromkeys(["float32", resolve_precision("auto", torch.device("cpu"))]):
        ratios = [_ratio(backbone, adaptors, images, precision) for _ in range(options.pairs + 1)][1:]
        low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
        print(f"{precision}: explicit / fused = {middle:.2f} ({low:.2f} to {high:.2f}, {options.pairs} pairs)")


def _ratio(backbone: Backbone, adaptors: AdaptorSet, images: torch.Tensor, precision: str) -> float:
    seconds = {}
    for fused in (True, False):
        backbone.on(torch.device("cpu"))
        for block in backbone.vit.blocks:  # type: ignore[union-attr]
            block.attn.fused_attn = fused  # type: ignore[union-attr]
        start = time.perf_counter()
        with autocast(torch.device("cpu"), precision):
            embeddings = backbone(images, list(adaptors))  # type: ignore[arg-type]
        embeddings.float().square().mean().backward()
        seconds[fused] = time.perf_counter() - start
    return seconds[False] / seconds[True]


if __name__ == "__main__":
    main()
