"""Training on a frozen backbone: an adaptor set from one or several targets, then the fusion over all sets.

Order, views and partners are functions of (seed, stage, instance, epoch, image_id); a checkpoint therefore holds
tensors and a step number only, and a resumed training equals an undisturbed one bit for bit on a CPU.

Shapes: B batch, D width, S image side, K neighbours, L blocks, G pseudo-granularities, H targets, C classes of a
target, n train rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from grappa import losses
from grappa.adaptors import AdaptorSet
from grappa.backbone import Backbone
from grappa.devices import autocast
from grappa.fitting import Checkpointer, FitResult, Group, Optimization, fit
from grappa.fusion import AttentionLevel, Fusion, fused_forward
from grappa.pixels import PixelCache
from grappa.processes import ALONE, Processes
from grappa.randomness import key, shuffled, uniforms
from grappa.targets import Targets
from grappa.transforms import NUM_DRAWS, Augmentation, normalize, train_batch

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Views:
    """Augmented views of the cached images: ``ids`` (N,) uint64 belong to the cache's rows."""

    cache: PixelCache
    ids: NDArray[np.uint64]
    image_size: int
    augmentation: Augmentation
    num_workers: int = 1

    def draw(self, view_key: int, rows: Rows) -> Tensor:
        """Return (B, 3, S, S) uint8; row b depends on ``view_key`` and the id of image ``rows[b]`` only."""
        draws = uniforms(view_key, self.ids[rows], NUM_DRAWS)
        return train_batch(
            self.cache,
            rows,
            draws,
            image_size=self.image_size,
            augmentation=self.augmentation,
            num_workers=self.num_workers,
        )


@dataclass(frozen=True)
class Run:
    """Where and how a training runs, who is told, and which processes share each batch."""

    device: torch.device
    precision: str
    checkpoint: Checkpointer | None = None
    progress: Callable[[int], None] | None = None
    processes: Processes = ALONE


@dataclass(frozen=True)
class PropagationLoss:
    """Attention propagation: which loss, and its weights (``grappa.losses`` has the equations)."""

    attention: Literal["mutual_information", "swapped", "none"] = "mutual_information"
    marginal_weight: float = 1.0
    sharpness: float = 2.0
    barlow_weight: float = 0.0
    barlow_off_diagonal: float = 3.9e-3


def train_adaptor_set(
    backbone: Backbone,
    views: Views,
    rows: Rows,
    targets: Sequence[Targets],
    *,
    name: str,
    bottleneck_dim: int,
    in_context_rank: int = 0,
    temperature: float,
    proxy_learning_rate: float,
    optimization: Optimization,
    seed: int,
    run: Run,
) -> tuple[AdaptorSet, FitResult]:
    """Train one adaptor set by the normalised softmax over its targets; with several, by the mean of their losses.

    Args:
        rows: (n,) train rows of the cache; each of ``targets`` classifies these n rows: the pseudo-labels of one
            pseudo-granularity with its centroids, those of all of them, or the labels of the images.
        name: the instance (``k00256``), part of every random draw's key.
        bottleneck_dim, in_context_rank: sizes of the set's adaptors, 0: none of that kind.

    Returns:
        The set, and the metrics ``loss`` and ``accuracy`` (of the class, on augmented views; means over the targets)
        along the steps.
    """
    backbone = backbone.on(run.device)
    adaptors = AdaptorSet(
        backbone.num_blocks,
        backbone.width,
        bottleneck_dim,
        in_context_rank=in_context_rank,
        seed=_torch_seed(seed, "adaptors", name),
    )
    module = nn.ParameterDict({"proxies": nn.Parameter(_joined_proxies(targets))})
    trained = nn.ModuleDict({"set": adaptors, "classifier": module}).to(run.device)
    labels_nH = torch.from_numpy(np.stack([each.labels for each in targets], axis=1).astype(np.int64))
    sizes = [len(each.proxies) for each in targets]
    order = BatchOrder(views.ids[rows], optimization.batch_size, (seed, "adaptors", name), run.processes)

    def batch(step: int) -> tuple[Tensor, Tensor]:
        chosen, epoch = order.at(step)
        return views.draw(key(seed, "adaptors", name, epoch, "view"), rows[chosen]), labels_nH[torch.from_numpy(chosen)]

    def loss(made: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        images, labels_BH = made[0].to(run.device), made[1].to(run.device)
        with autocast(run.device, run.precision):
            embeddings = backbone(normalize(images, backbone.spec.mean, backbone.spec.std), adaptors)
        tables = zip(module["proxies"].split(sizes), labels_BH.unbind(1), strict=True)
        found = [_classify(embeddings, proxies, labels, temperature) for proxies, labels in tables]
        values, accuracies = zip(*found, strict=True)
        share = len(images) / order.batch_size
        return share * torch.stack(values).mean(), {"accuracy": share * torch.stack(accuracies).mean()}

    groups = [
        Group(list(adaptors.parameters()), optimization.learning_rate, optimization.weight_decay),
        Group([module["proxies"]], proxy_learning_rate, 0.0),
    ]
    result = fit(
        trained, groups, optimization, order.steps_per_epoch, batch, loss, run.checkpoint, run.progress, run.processes
    )
    return adaptors.cpu(), result


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
    run: Run,
) -> tuple[Fusion, FitResult]:
    """Train the fusion layers by attention propagation; backbone and sets stay frozen.

    Args:
        rows: (n,) the train rows; ``neighbors``: (n, K) cache rows, the candidates for each row's partner, or None: the
            partner is a second view of the same image (the ablation).

    Returns:
        The fusion, and the metrics along the steps: ``loss``, ``entropy`` (mean of an image's attention, nats),
        ``marginal_entropy`` (of the batch-mean attention), ``variance`` (of the attention across images).
    """
    backbone = backbone.on(run.device)
    instance = "views" if neighbors is None else "neighbors"
    generator = torch.Generator().manual_seed(_torch_seed(seed, "fusion", instance))
    fusion = Fusion(sets, level=level, temperature=attention_temperature)
    fusion.start(query_std=0.02, key_std=initial_std, generator=generator)
    projector = _projector(backbone.width, generator)
    trained = nn.ModuleDict({"fusion": fusion, "projector": projector}).to(run.device)
    order = BatchOrder(views.ids[rows], optimization.batch_size, (seed, "fusion", instance), run.processes)

    def batch(step: int) -> Tensor:
        chosen, epoch = order.at(step)
        partners = (
            rows[chosen] if neighbors is None else _partners(neighbors[chosen], views.ids[rows[chosen]], seed, epoch)
        )
        first = views.draw(key(seed, "fusion", instance, epoch, "view"), rows[chosen])
        return torch.cat([first, views.draw(key(seed, "fusion", instance, epoch, "partner view"), partners)])

    def loss(made: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        with autocast(run.device, run.precision):
            images = normalize(made.to(run.device), backbone.spec.mean, backbone.spec.std)
            embeddings, attention_BLG = fused_forward(backbone, fusion, images)
            projected = projector(embeddings) if propagation.barlow_weight else None
        attention_BLG = _whole_batch(attention_BLG, order)
        projected = None if projected is None else _whole_batch(projected, order)
        value, scalars = propagation_loss(attention_BLG, projected, propagation), _attention_metrics(attention_BLG)
        return value / run.processes.size, {name: each / run.processes.size for name, each in scalars.items()}

    groups = [
        Group(list(fusion.parameters()), optimization.learning_rate, optimization.weight_decay),
        Group(list(projector.parameters()), optimization.learning_rate, optimization.weight_decay),
    ]
    result = fit(
        trained, groups, optimization, order.steps_per_epoch, batch, loss, run.checkpoint, run.progress, run.processes
    )
    return fusion.cpu(), result


def propagation_loss(attention_BLG: Tensor, projected_BD: Tensor | None, options: PropagationLoss) -> Tensor:
    """Return the loss of a batch whose second half are the partners of the first; ValueError when nothing is asked."""
    first, second = attention_BLG.chunk(2)
    terms = []
    if options.attention == "mutual_information":
        terms.append(losses.attention_propagation(first, second, marginal_weight=options.marginal_weight))
    if options.attention == "swapped":
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


class BatchOrder:
    """Which train rows a step sees: each epoch a new order, drawn from the ids; an epoch's remainder is left out.

    Several ``processes`` share each batch; its size and the order do not depend on how many they are.
    """

    def __init__(
        self,
        ids: NDArray[np.uint64],
        batch_size: int,
        parts: tuple[int | str, ...],
        processes: Processes = ALONE,
    ) -> None:
        self.ids, self.parts, self.processes = ids, parts, processes
        self.batch_size = min(batch_size, len(ids))
        self.steps_per_epoch = len(ids) // self.batch_size
        if self.batch_size < processes.size:
            raise ValueError(
                f"a batch of {self.batch_size} images cannot be shared by {processes.size} processes; start fewer"
            )
        self._own = processes.part(self.batch_size)
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def at(self, step: int) -> tuple[Rows, int]:
        """Return this process's part of the batch, positions among the train rows, (B,) if it is alone; the epoch."""
        epoch, number = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, shuffled(key(*self.parts, epoch, "order"), self.ids)
        return self._order[number * self.batch_size : (number + 1) * self.batch_size][self._own], epoch


def _whole_batch(own: Tensor, order: BatchOrder) -> Tensor:
    """Return the rows of all processes, first the images, then their partners, as a single process has them."""
    if order.processes.size == 1:
        return own
    return torch.cat([order.processes.gather(half, order.batch_size) for half in own.chunk(2)])


def _joined_proxies(targets: Sequence[Targets]) -> Tensor:
    """Return the proxies of all targets as one table, (sum of C, D): one tensor to optimise and to keep."""
    return torch.from_numpy(np.concatenate([np.array(each.proxies, dtype=np.float32) for each in targets]))


def _classify(embeddings_BD: Tensor, proxies_CD: Tensor, labels_B: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the loss of one target and the share of the batch whose nearest proxy is its class's."""
    value = losses.norm_softmax(embeddings_BD, proxies_CD, labels_B, temperature=temperature)
    units_BD = F.normalize(embeddings_BD.detach().float(), dim=-1)
    nearest_B = (units_BD @ F.normalize(proxies_CD.detach(), dim=-1).T).argmax(-1)
    return value, (nearest_B == labels_B).float().mean()


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


def _torch_seed(*parts: int | str) -> int:
    return key(*parts) >> 1
