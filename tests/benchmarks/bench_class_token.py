"""Embedding with the last block for the class token alone, against the whole last block.

    python tests/benchmarks/bench_class_token.py [--model vit_small_patch16_224] [--image-size 224] [--batch-size 32]

Both sides run in turn in one process; printed are the median of the paired ratios and their range.
"""

from __future__ import annotations

import argparse
import statistics
import time
from unittest import mock

import torch

import grappa.backbone
from grappa.backbone import Backbone, BackboneSpec, build_backbone
from grappa.devices import autocast, resolve_precision

HALF = (0.5, 0.5, 0.5)
CPU = torch.device("cpu")


def main() -> None:
    """Print one line a precision."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=7)
    options = parser.parse_args()
    backbone = build_backbone(BackboneSpec(options.model, options.image_size, 1.0, HALF, HALF)).on(CPU)
    images = torch.randn(options.batch_size, 3, options.image_size, options.image_size)
    for precision in dict.fromkeys(["float32", resolve_precision("auto", CPU)]):
        ratios = [_ratio(backbone, images, precision) for _ in range(options.pairs + 1)][1:]
        low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
        print(f"{precision}: class token only / whole = {middle:.3f} ({low:.3f} to {high:.3f}, {options.pairs} pairs)")


def _ratio(backbone: Backbone, images: torch.Tensor, precision: str) -> float:
    only = _seconds(backbone, images, precision)
    with mock.patch.object(grappa.backbone, "can_skip_patches", return_value=False):
        return only / _seconds(backbone, images, precision)


def _seconds(backbone: Backbone, images: torch.Tensor, precision: str) -> float:
    start = time.perf_counter()
    with torch.inference_mode(), autocast(CPU, precision):
        backbone(images)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
