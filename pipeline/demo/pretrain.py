"""Train the demo's small ViT without labels: ``python -m pipeline.demo.pretrain --out FILE``.

Drawn images of the pretraining classes, which the demo never shows, teach it two things at once: two views of one image
must find each other (NT-Xent of SimCLR, Chen et al. 2020), and the class token must tell where the edges and colors of
its view lie (hand-made descriptors as targets, as in MaskFeat, Wei et al. 2022).

Shapes: B batch, D width of the projection, F described values.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from grappa.backbone import import_timm
from grappa.randomness import key
from pipeline.demo.dataset import DOMAINS, draw_image
from pipeline.demo.descriptors import NUM_VALUES, Scale, describe
from pipeline.demo.views import random_views

MODEL_NAME = "vit_tiny_patch16_224"
OPTIONS: dict[str, Any] = {"img_size": 64, "patch_size": 16, "embed_dim": 192, "depth": 4, "num_heads": 16}
MEAN = STD = (0.5, 0.5, 0.5)
PROJECTION_WIDTH = 128


@dataclass(frozen=True)
class Pretraining:
    """How the weights are trained; a run is a function of these values, up to the machine's rounding.

    A batch is ``num_shards`` shards of ``shard_size`` images, one a thread.
    """

    seed: int = 1
    num_images_per_domain: int = 3000
    num_steps: int = 1200
    num_shards: int = 2
    shard_size: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    temperature: float = 0.15
    descriptor_weight: float = 5.0


def create_vit() -> nn.Module:
    """Return the demo's architecture with random weights."""
    timm = import_timm()
    vit: nn.Module = timm.create_model(MODEL_NAME, pretrained=False, num_classes=0, **OPTIONS)
    return vit


def draw_pool(num_images_per_domain: int, *, seed: int) -> Tensor:
    """Return (4 * num_images_per_domain, 3, 64, 64) uint8 images of the pretraining classes, domain after domain."""
    images = [
        draw_image(domain, domain.pretraining_classes[number % len(domain.pretraining_classes)], number,
                   purpose="pretraining", seed=seed)
        for domain in DOMAINS
        for number in range(num_images_per_domain)
    ]  # fmt: skip
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


class _Learner(nn.Module):
    """The ViT with its two heads, which are thrown away: a projection for the views, a linear map for descriptors."""

    def __init__(self, vit: nn.Module) -> None:
        super().__init__()
        width = int(OPTIONS["embed_dim"])
        self.vit = vit
        self.projector = nn.Sequential(
            nn.Linear(width, 512, bias=False),
            nn.BatchNorm1d(512, track_running_stats=False),
            nn.ReLU(),
            nn.Linear(512, PROJECTION_WIDTH),
        )
        self.teller = nn.Linear(width, NUM_VALUES)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return (B, D) projections and (B, F) descriptors of (B, 3, 64, 64) images."""
        features = self.vit(images)
        return self.projector(features), self.teller(features)


def nt_xent(first_BD: Tensor, second_BD: Tensor, *, temperature: float) -> Tensor:
    """Return the scalar NT-Xent loss: each view must find its partner among the 2B - 1 other views of the batch."""
    views = F.normalize(torch.cat([first_BD, second_BD]).float(), dim=-1)
    similarities = (views @ views.T / temperature).fill_diagonal_(float("-inf"))
    num = len(first_BD)
    partners = torch.cat([torch.arange(num, 2 * num), torch.arange(num)])
    return F.cross_entropy(similarities, partners)


def pretrain(settings: Pretraining, report: Callable[[int, float], None]) -> dict[str, Tensor]:
    """Train and return the ViT's state dict (float32); ``report`` is called with each step and its loss."""
    torch.manual_seed(settings.seed)
    torch.set_num_threads(1)
    vit = create_vit()
    _look_everywhere(vit)
    model = _Learner(vit)
    parameters = list(model.parameters())
    optimizer = _optimizer(parameters, settings)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=settings.num_steps, pct_start=0.1
    )
    pool = draw_pool(settings.num_images_per_domain, seed=settings.seed)
    scales = [Scale.of(describe(images.float() / 127.5 - 1.0)) for images in pool.chunk(len(DOMAINS))]
    shards = range(settings.num_shards)
    with ThreadPoolExecutor(settings.num_shards, initializer=torch.set_num_threads, initargs=(1,)) as threads:
        for step in range(settings.num_steps):
            results = list(
                threads.map(lambda shard, step=step: _gradients(model, pool, scales, step, shard, settings), shards)
            )
            for number, parameter in enumerate(parameters):
                parameter.grad = torch.stack([gradients[number] for _, gradients in results]).mean(dim=0)
            optimizer.step()
            schedule.step()
            report(step, sum(loss for loss, _ in results) / len(results))
    return model.vit.state_dict()


def _look_everywhere(vit: Any) -> None:
    """Let head h of every block look at patch h, so that the class token knows from the first step what lies where.

    From the usual start, where every head sees the mean of all patches, it has learned next to nothing of that after a hundred steps.
    """
    codes = nn.init.orthogonal_(torch.empty(vit.patch_embed.num_patches, vit.embed_dim))
    with torch.no_grad():
        vit.pos_embed[0, 1:] = 0.5 * vit.embed_dim**0.5 * codes
        for attention in (block.attn for block in vit.blocks):
            _, keys, values = attention.qkv.weight.view(3, attention.num_heads, -1, vit.embed_dim)
            keys[:, 0] = 1.2 * codes
            attention.qkv.bias.view(3, attention.num_heads, -1)[0, :, 0] = 1.2
            values *= 2.0
            attention.proj.weight *= 2.0


def _gradients(
    model: _Learner, pool: Tensor, scales: list[Scale], step: int, shard: int, settings: Pretraining
) -> tuple[float, tuple[Tensor, ...]]:
    """Return the loss of one shard of a batch and its gradients; views and rows are functions of step and shard."""
    generator = torch.Generator().manual_seed(key(settings.seed, "pretraining", step, shard) >> 1)
    rows = _draw_rows(len(pool), settings.shard_size, generator)
    views = torch.cat([random_views(pool[rows], generator) for _ in range(2)])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        projected, told = model(views)
    first, second = projected.chunk(2)
    loss = nt_xent(first, second, temperature=settings.temperature)
    targets = _targets(views, (rows // (len(pool) // len(DOMAINS))).repeat(2), scales)
    loss = loss + settings.descriptor_weight * F.mse_loss(told.float(), targets)
    return loss.item(), torch.autograd.grad(loss, list(model.parameters()))


def _targets(views: Tensor, domains: Tensor, scales: list[Scale]) -> Tensor:
    """Return (B, F) descriptors of the views, each on the scale of its domain."""
    means = torch.stack([scale.mean for scale in scales])
    spreads = torch.stack([scale.spread for scale in scales])
    return (describe(views) - means[domains]) / spreads[domains]


def _draw_rows(num_images: int, num_rows: int, generator: torch.Generator) -> Tensor:
    """Return rows of two domains of the pool: most of the others in the loss are then hard to tell apart."""
    num_per_domain = num_images // len(DOMAINS)
    domains = torch.randperm(len(DOMAINS), generator=generator)[:2]
    offsets = torch.randint(num_per_domain, (num_rows,), generator=generator)
    return domains.repeat(num_rows)[:num_rows] * num_per_domain + offsets


def _optimizer(parameters: list[nn.Parameter], settings: Pretraining) -> torch.optim.Optimizer:
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate)


def save(state: dict[str, Tensor], out: Path, *, settings: Pretraining, seconds: float, final_loss: float) -> None:
    """Write float16 weights to ``out`` (safetensors, timm's key layout) and what they are to a JSON file beside it."""
    save_file({name: tensor.half().contiguous() for name, tensor in state.items()}, out)
    record = {
        "name": MODEL_NAME,
        "options": OPTIONS,
        "mean": MEAN,
        "std": STD,
        "method": "NT-Xent and descriptor prediction, no labels, drawn images of classes that the demo does not show",
        "settings": asdict(settings),
        "seconds": round(seconds),
        "final_loss": round(final_loss, 4),
        "torch": torch.__version__,
        "timm": import_timm().__version__,
    }
    out.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, train, save."""
    default = Pretraining()
    parser = argparse.ArgumentParser(prog="python -m pipeline.demo.pretrain", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the .safetensors file to write")
    parser.add_argument("--steps", type=int, default=default.num_steps, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=default.seed, help="seed of all draws (default: %(default)s)")
    options = parser.parse_args(arguments)
    settings = Pretraining(seed=options.seed, num_steps=options.steps)
    start, recent = time.monotonic(), [0.0]

    def report(step: int, loss: float) -> None:
        recent.append(loss)
        if step % 50 == 49:
            mean = sum(recent[-50:]) / 50
            print(
                f"step {step + 1}/{settings.num_steps}, loss {mean:.3f}, {time.monotonic() - start:.0f} s", flush=True
            )

    import_timm().layers.set_fused_attn(False)  # twice as fast in bfloat16 on a CPU
    state = pretrain(settings, report)
    save(state, options.out, settings=settings, seconds=time.monotonic() - start, final_loss=recent[-1])


if __name__ == "__main__":
    main()
