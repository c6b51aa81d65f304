"""Train the demo's small ViT without labels: ``python -m grappa.pipeline.demo.pretrain --out FILE``.

The training is instance discrimination (NT-Xent of SimCLR, Chen et al. 2020) on drawn things that the demo never shows:
two renderings of one thing (this letter in this typeface, this number in this handwriting) must find each other among
the renderings of all other things. It differs from SimCLR in how views are made: they are not distorted pixels, but new
drawings of the thing in another pose, coloring, light, clutter and noise, because minutes on a CPU are too few to learn
these from pixels. No class is read.

Shapes: B batch, D width of the projection.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from grappa.backbone.frozen import Backbone, build_backbone
from grappa.backbone.spec import BackboneSpec
from grappa.core.randomness import key
from grappa.images.transforms import normalize
from grappa.pipeline.demo.dataset import DOMAINS, Domain, draw_image

MODEL_NAME = "vit_tiny_patch16_224"
IMAGE_SIZE = 64
OPTIONS: dict[str, Any] = {"patch_size": 8, "embed_dim": 192, "depth": 4, "num_heads": 6}
HALF = (0.5, 0.5, 0.5)
PROJECTION_WIDTH = 128


@dataclass(frozen=True)
class Pretraining:
    """Settings of the training: a step shows two renderings of each of ``batch_size`` things."""

    seed: int = 1
    num_things_per_domain: int = 1500
    num_renderings: int = 4
    num_steps: int = 500
    batch_size: int = 192
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    warmup: float = 0.1
    temperature: float = 0.15


def create_vit() -> Backbone:
    """Return the demo's architecture with random weights."""
    return build_backbone(BackboneSpec(MODEL_NAME, IMAGE_SIZE, 1.0, HALF, HALF, OPTIONS)).on(torch.device("cpu"))


def draw_pool(settings: Pretraining) -> Tensor:
    """Return (things, renderings, 3, 64, 64) uint8 of the pretraining classes, domain after domain."""
    images = [
        np.stack([_draw(domain, number, rendering, settings.seed) for rendering in range(settings.num_renderings)])
        for domain in DOMAINS
        for number in range(settings.num_things_per_domain)
    ]
    return torch.from_numpy(np.stack(images)).permute(0, 1, 4, 2, 3).contiguous()


def _draw(domain: Domain, number: int, rendering: int, seed: int) -> np.ndarray[Any, Any]:
    label = domain.pretraining_classes[number % len(domain.pretraining_classes)]
    return draw_image(domain, label, number, purpose="pretraining", seed=seed, rendering=rendering)


def nt_xent(first_BD: Tensor, second_BD: Tensor, *, temperature: float) -> Tensor:
    """Return the scalar NT-Xent loss: each view must find its partner among the 2B - 1 other views of the batch."""
    views = F.normalize(torch.cat([first_BD, second_BD]).float(), dim=-1)
    similarities = (views @ views.T / temperature).fill_diagonal_(float("-inf"))
    num = len(first_BD)
    partners = torch.cat([torch.arange(num, 2 * num), torch.arange(num)])
    return F.cross_entropy(similarities, partners)


def pretrain(settings: Pretraining, report: Callable[[int, float, Backbone], None]) -> Backbone:
    """Train and return the ViT; ``report`` is called after each step with the step, its loss and the ViT."""
    torch.manual_seed(settings.seed)
    backbone = create_vit().requires_grad_(True)
    projector = nn.Sequential(nn.Linear(backbone.embedding_dim, 512), nn.GELU(), nn.Linear(512, PROJECTION_WIDTH))
    parameters = [*backbone.parameters(), *projector.parameters()]
    optimizer = torch.optim.AdamW(parameters, weight_decay=settings.weight_decay, betas=(0.9, 0.98))
    pool = draw_pool(settings)
    for step in range(settings.num_steps):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * _schedule(step, settings)
        first, second = _views(pool, step, settings)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            projected = projector(backbone(normalize(torch.cat([first, second]), HALF, HALF)))
        loss = nt_xent(*projected.chunk(2), temperature=settings.temperature)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 3.0)
        optimizer.step()
        report(step, loss.item(), backbone)
    return backbone.requires_grad_(False)


def _schedule(step: int, settings: Pretraining) -> float:
    warm = max(1, int(settings.warmup * settings.num_steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / (settings.num_steps - warm)))


def _views(pool: Tensor, step: int, settings: Pretraining) -> tuple[Tensor, Tensor]:
    """Return two renderings (B, 3, 64, 64) of things of two domains: most other things are then hard negatives."""
    rng = np.random.default_rng(key(settings.seed, "pretraining", step))
    num = settings.num_things_per_domain
    half = settings.batch_size // 2
    domains = rng.permutation(len(DOMAINS))[:2]
    things = np.concatenate([domain * num + rng.permutation(num)[:half] for domain in domains])
    renderings = np.stack([rng.permutation(settings.num_renderings)[:2] for _ in things])
    return pool[things, renderings[:, 0]], pool[things, renderings[:, 1]]


def save(backbone: Backbone, out: Path, *, settings: Pretraining, seconds: float, final_loss: float) -> None:
    """Write float16 weights to ``out`` (safetensors, timm's key layout) and a description to a JSON file beside it."""
    save_file({name: tensor.half().contiguous() for name, tensor in backbone.model.state_dict().items()}, out)
    record = {
        "name": MODEL_NAME,
        "image_size": IMAGE_SIZE,
        "options": OPTIONS,
        "mean": HALF,
        "std": HALF,
        "method": "NT-Xent between renderings of drawn things of classes that the demo does not show; no labels",
        "settings": asdict(settings),
        "seconds": round(seconds),
        "final_loss": round(final_loss, 4),
        "torch": torch.__version__,
    }
    out.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, train, save."""
    default = Pretraining()
    parser = argparse.ArgumentParser(prog="python -m grappa.pipeline.demo.pretrain", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the .safetensors file to write")
    parser.add_argument("--steps", type=int, default=default.num_steps, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=default.seed, help="seed of all draws (default: %(default)s)")
    options = parser.parse_args(arguments)
    settings = Pretraining(seed=options.seed, num_steps=options.steps)
    start, recent = time.monotonic(), [0.0]

    def report(step: int, loss: float, backbone: Backbone) -> None:
        recent.append(loss)
        if step % 50 == 49:
            spent = time.monotonic() - start
            print(f"step {step + 1}/{settings.num_steps}, loss {sum(recent[-50:]) / 50:.3f}, {spent:.0f} s", flush=True)

    backbone = pretrain(settings, report)
    save(backbone, options.out, settings=settings, seconds=time.monotonic() - start, final_loss=recent[-1])


if __name__ == "__main__":
    main()
