"""Training the fusion over all adaptor sets, by propagating granularity attention between neighbours.

Shapes: B batch, D width, K neighbours, L blocks, G pseudo-granularities, n train rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from grappa.backbone.frozen import Backbone
from grappa.core.arrays import Rows
from grappa.core.devices import autocast, moved, staged
from grappa.core.randomness import key, uniforms
from grappa.images.transforms import normalize
from grappa.method import losses
from grappa.method.adaptors import AdaptorSet
from grappa.method.fusion import AttentionLevel, Fusion, fused_forward
from grappa.training.batches import BatchOrder, Runtime, Views, torch_seed
from grappa.training.loop import FitResult, Group, Optimization, fit


@dataclass(frozen=True)
class PropagationLoss:
    """Attention propagation: which loss, and its weights (``grappa.method.losses`` has the equations)."""

    attention_loss: Literal["mutual_information", "swapped", "none"] = "mutual_information"
    marginal_weight: float = 1.0
    sharpness: float = 2.0
    barlow_weight: float = 0.0
    barlow_off_diagonal: float = 3.9e-3


def train_fusion(
    backbone: Backbone,
    sets: Sequence[AdaptorSet],
    views: Views,
    rows: Rows,
    neighbors: Rows | None,
    *,
    level: AttentionLevel,
    attention_temperature: float,
    propagation: PropagationLoss,
    initial_std: float,
    optimization: Optimization,
    seed: int,
    run: Runtime,
) -> tuple[Fusion, FitResult]:
    """Train the fusion layers by attention propagation; backbone and adaptor sets stay frozen.

    Args:
        rows: (n,) the train rows of the cache.
        neighbors: (n, K) cache rows, the candidates for a row's partner; None: a second view of the image (ablation).

    Returns:
        The fusion, and the metrics along the steps: ``loss``, ``entropy`` (mean of an image's attention, nats),
        ``marginal_entropy`` (of the batch-mean attention), ``variance`` (of the attention across images).
    """
    backbone = backbone.on(run.device)
    instance = "views" if neighbors is None else "neighbors"
    generator = torch.Generator().manual_seed(torch_seed(seed, "fusion", instance))
    fusion = Fusion(sets, level=level, temperature=attention_temperature)
    fusion.start(query_std=0.02, key_std=initial_std, generator=generator)
    projector = _projector(backbone.embedding_dim, generator)
    trained = nn.ModuleDict({"fusion": fusion, "projector": projector}).to(run.device)
    order = BatchOrder(views.ids[rows], optimization.batch_size, (seed, "fusion", instance), run.processes)

    def batch(step: int) -> Tensor:
        chosen, epoch = order.at(step)
        own = rows[chosen]
        partners = own if neighbors is None else _partners(neighbors[chosen], views.ids[own], seed, epoch)
        pair = {"view": own, "partner view": partners}
        drawn = [views.draw(key(seed, "fusion", instance, epoch, kind), each) for kind, each in pair.items()]
        return staged(torch.cat(drawn), run.device)

    def loss(made: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        with autocast(run.device, run.precision):
            images = normalize(moved(made, run.device), backbone.spec.mean, backbone.spec.std)
            embeddings, attention_BLG = fused_forward(backbone, fusion, images)
            projected = projector(embeddings) if propagation.barlow_weight else None
        attention_BLG = _whole_batch(attention_BLG, order)
        projected = None if projected is None else _whole_batch(projected, order)
        value = propagation_loss(attention_BLG, projected, propagation)
        return _shares(value, _attention_metrics(attention_BLG), run.processes.world_size)

    groups = [
        Group(list(fusion.parameters()), optimization.learning_rate, optimization.weight_decay),
        Group(list(projector.parameters()), optimization.learning_rate, optimization.weight_decay),
    ]
    result = fit(trained, groups, optimization, order.steps_per_epoch, batch, loss, *run.hooks)
    return fusion.cpu(), result


def _shares(value: Tensor, scalars: Mapping[str, Tensor], world_size: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Return this process's share of a loss and of scalars that every process has computed for the whole batch."""
    return value / world_size, {name: each / world_size for name, each in scalars.items()}


def propagation_loss(attention_BLG: Tensor, projected_BD: Tensor | None, options: PropagationLoss) -> Tensor:
    """Return the loss of a batch whose second half are the partners of its first; ValueError without any loss."""
    first, second = attention_BLG.chunk(2)
    terms = []
    if options.attention_loss == "mutual_information":
        terms.append(losses.attention_propagation(first, second, marginal_weight=options.marginal_weight))
    if options.attention_loss == "swapped":
        terms.append(losses.swapped_attention(first, second, sharpness=options.sharpness))
    if projected_BD is not None:
        halves = projected_BD.chunk(2)
        barlow = losses.barlow_twins(*halves, off_diagonal=options.barlow_off_diagonal)
        terms.append(options.barlow_weight * barlow)
    if not terms:
        raise ValueError(
            "fusion.attention_loss is none and fusion.barlow_weight is 0: nothing to train; set one of them"
        )
    return torch.stack(terms).sum()


def _whole_batch(own: Tensor, order: BatchOrder) -> Tensor:
    """Return the rows of all processes as a single process has them: first the images, then their partners."""
    if order.processes.world_size == 1:
        return own
    return torch.cat([order.processes.all_gather(half, order.batch_size) for half in own.chunk(2)])


def _partners(neighbors_BK: Rows, ids_B: NDArray[np.uint64], seed: int, epoch: int) -> Rows:
    draws = uniforms(key(seed, "fusion", "neighbors", epoch, "partner"), ids_B, 1)[:, 0]
    columns = (draws * neighbors_BK.shape[1]).astype(np.int64)
    return neighbors_BK[np.arange(len(columns)), columns]


def _attention_metrics(attention_BLG: Tensor) -> dict[str, Tensor]:
    attention_BLG = attention_BLG.detach()
    return {
        "entropy": losses.entropy(attention_BLG).mean(),
        "marginal_entropy": losses.entropy(attention_BLG.mean(0)).mean(),
        "variance": attention_BLG.var(0, unbiased=False).mean(),
    }


def _projector(width: int, generator: torch.Generator) -> nn.Sequential:
    layers = nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, 4 * width))
    for layer in (layers[0], layers[2]):
        nn.init.normal_(layer.weight, std=layer.in_features**-0.5, generator=generator)  # type: ignore[arg-type, operator]
        nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layers
