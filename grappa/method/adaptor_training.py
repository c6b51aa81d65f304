"""Training an adaptor set on a frozen backbone, by one or several targets, with or without object perception.

Shapes: B batch, D width, V kinds of view, H targets, C classes of a target, n train rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from grappa.backbone.frozen import Backbone
from grappa.core.arrays import Rows
from grappa.core.devices import autocast, moved, staged
from grappa.core.distributed import ALONE, Processes
from grappa.core.randomness import key
from grappa.images.pixels import ImageRows
from grappa.images.transforms import normalize
from grappa.method import losses
from grappa.method.adaptors import AdaptorSet
from grappa.method.losses import Classified, Share
from grappa.objects.backgrounds import Backgrounds
from grappa.training.batches import BatchOrder, Runtime, Views, torch_seed
from grappa.training.loop import FitResult, Group, Optimization, fit
from grappa.training.sharded_proxies import ShardedProxies
from grappa.training.targets import Targets

PLAIN, OBJECT, BACKGROUND = "view", "object view", "background view"
TransferFrom = Literal["better", "all"]
# Of each target: the proxies (C, D), or those that this process holds; the classes of its images (B,); its share.
Classes = Sequence[tuple[Tensor, Tensor, Share]]


@dataclass(frozen=True)
class AdaptorLoss:
    """The loss of an adaptor set: the normalised softmax on the images, and up to three terms on their other views.

    - ``object_weight``: the same softmax on the object views.
    - ``transfer_weight``: ``losses.perception_transfer`` over the proxies, from an image's object view to the image; by
      default only from object views that are classified better than their image (``transfer_from``).
    - ``background_weight``: the softmax on the background views, with one more proxy, which all backgrounds share. A
      background is never pulled to its image's class: with pseudo-labels that would teach the background.

    The paper of these views names its losses; their forms and weights are not known, so these are ours.
    """

    temperature: float = 0.05
    object_weight: float = 0.0
    transfer_weight: float = 0.0
    softening: float = 2.0
    cosine_weight: float = 1.0
    transfer_from: TransferFrom = "better"
    background_weight: float = 0.0


@dataclass(frozen=True)
class Perception:
    """Further views of the images in the cache: object views, and background views of the images that have one."""

    objects: ImageRows | None = None
    backgrounds: Backgrounds | None = None

    def sources(self, views: Views) -> dict[str, Views]:
        """Return where the views of each image of a batch come from, by kind; the image itself is the first kind."""
        further = {OBJECT: self.objects, BACKGROUND: self.backgrounds}
        return {
            PLAIN: views,
            **{kind: replace(views, cache=each) for kind, each in further.items() if each is not None},
        }

    @property
    def num_kinds(self) -> int:
        """How many views are drawn of an image."""
        return 1 + sum(each is not None for each in (self.objects, self.backgrounds))

    def known(self, rows: Rows) -> Tensor:
        """Return which of the rows (n,) have a background view, (n,) bool."""
        every = np.zeros(len(rows), dtype=bool) if self.backgrounds is None else self.backgrounds.known[rows]
        return torch.from_numpy(every)


def train_adaptor_set(
    backbone: Backbone,
    views: Views,
    rows: Rows,
    targets: Sequence[Targets],
    *,
    name: str,
    start: AdaptorSet,
    adaptor_loss: AdaptorLoss,
    proxy_learning_rate: float,
    optimization: Optimization,
    seed: int,
    run: Runtime,
    perception: Perception | None = None,
) -> tuple[AdaptorSet, FitResult]:
    """Train one adaptor set by the normalised softmax over its targets; with several, by the mean of their losses.

    Args:
        rows: (n,) train rows of the cache.
        targets: classifications of these n rows by pseudo-labels, for one pseudo-granularity or more, or by labels.
        name: the instance (``k00256``), part of every random draw's key.
        start: the adaptor set that training begins with (:func:`new_adaptor_set`); it is changed in place and returned.
        perception: the further views that ``adaptor_loss`` uses.

    Returns:
        The adaptor set, and along the steps the metrics ``loss`` and ``accuracy`` (share of augmented views whose class
        is right, mean over the targets); with object views ``object_accuracy`` and ``transfer`` too.
    """
    backbone, adaptors = backbone.on(run.device), start.requires_grad_(True)
    perception = perception or Perception()
    held = sharded_proxies(targets, perception, run.processes)
    classifier = _classifier(held, perception, torch_seed(seed, "adaptors", name, "background"))
    trained = nn.ModuleDict({"set": adaptors, "classifier": classifier}).to(run.device)
    labels_nH = _all_labels(targets)
    order = BatchOrder(views.ids[rows], optimization.batch_size, (seed, "adaptors", name), run.processes)
    sources, known_n = perception.sources(views), perception.known(rows)

    def batch(step: int) -> tuple[Tensor, Tensor, Tensor]:
        chosen, epoch = order.at(step)
        drawn = [each.draw(key(seed, "adaptors", name, epoch, kind), rows[chosen]) for kind, each in sources.items()]
        at = torch.from_numpy(chosen)
        return staged(torch.cat(drawn), run.device), labels_nH[at], known_n[at]

    def loss(made: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        images, labels_BH, known_B = (moved(each, run.device) for each in made)
        with autocast(run.device, run.precision):
            embeddings = backbone(normalize(images, backbone.spec.mean, backbone.spec.std), adaptors)
        embedded = dict(zip(sources, embeddings.chunk(len(sources)), strict=True))
        classes = _classes(held, classifier["proxies"], labels_BH, order.batch_size)
        value, scalars = _loss(embedded, classes, known_B, classifier.get("background"), adaptor_loss)
        share = len(labels_BH) / order.batch_size
        return share * value, {what: share * each for what, each in scalars.items()}

    groups = [
        Group(list(adaptors.parameters()), optimization.learning_rate, optimization.weight_decay),
        Group(list(classifier.parameters()), proxy_learning_rate, 0.0, held.num_rows),
    ]
    result = fit(trained, groups, optimization, order.steps_per_epoch, batch, loss, *run.hooks)
    return adaptors.cpu(), result


def new_adaptor_set(
    backbone: Backbone, bottleneck_dim: int, *, in_context_rank: int = 0, name: str, seed: int
) -> AdaptorSet:
    """Return the adaptor set that the training of instance ``name`` starts from; it leaves the backbone unchanged."""
    seed = torch_seed(seed, "adaptors", name)
    return AdaptorSet.of(backbone, bottleneck_dim, in_context_rank=in_context_rank, seed=seed)


def _all_labels(targets: Sequence[Targets]) -> Tensor:
    """Return the labels of all targets, (n, H) int64."""
    return torch.from_numpy(np.stack([each.labels for each in targets], axis=1).astype(np.int64))


def sharded_proxies(targets: Sequence[Targets], perception: Perception, processes: Processes) -> ShardedProxies:
    """Return which proxies a process holds: its part of them, or all where the images have further views.

    Transfer and backgrounds compare some of a batch's images with all proxies at once; their classes are labels, which
    are far fewer than clusters.
    """
    return ShardedProxies(targets, processes if perception.num_kinds == 1 else ALONE)


def _classifier(held: ShardedProxies, perception: Perception, seed: int) -> nn.ParameterDict:
    """Return the proxies of all targets that are held, (K, D), and with background views their proxy (1, D)."""
    proxies = held.first_values()
    classifier = nn.ParameterDict({"proxies": nn.Parameter(proxies)})
    if perception.backgrounds is not None:
        drawn = torch.randn(1, proxies.shape[1], generator=torch.Generator().manual_seed(seed))
        classifier["background"] = nn.Parameter(F.normalize(drawn, dim=-1))
    return classifier


def _classes(held: ShardedProxies, proxies_KD: Tensor, labels_BH: Tensor, batch_size: int) -> Classes:
    """Return of each target what this process holds. batch_size: the images of all processes."""
    parts = zip(held.by_target(proxies_KD), labels_BH.unbind(1), strict=True)
    return [(part_KD, labels_B, Share(held.processes, batch_size, first)) for (part_KD, first), labels_B in parts]


def _loss(
    embedded: Mapping[str, Tensor], classes: Classes, known_B: Tensor, background: Tensor | None, options: AdaptorLoss
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of a batch and the scalars to record.

    embedded: the embeddings (B, D) of each kind of view. known_B: which images have a background view. background: the
    proxy of the backgrounds (1, D).
    """
    plain = _classify(embedded[PLAIN], classes, options.temperature)
    value, scalars = _mean_loss(plain), {"accuracy": _accuracy(plain)}
    if OBJECT in embedded:
        objects = _classify(embedded[OBJECT], classes, options.temperature)
        on_objects, scalars["object_accuracy"] = _mean_loss(objects), _accuracy(objects)
        better = [one.losses_B < other.losses_B for one, other in zip(objects, plain, strict=True)]
        scalars["transfer"] = _transfer(embedded[PLAIN], embedded[OBJECT], classes, better, options)
        value = value + options.object_weight * on_objects + options.transfer_weight * scalars["transfer"]
    if background is not None:
        on_backgrounds = _on_backgrounds(embedded[BACKGROUND], known_B, classes, background, options)
        value = value + options.background_weight * on_backgrounds
    return value, {what: each.detach() for what, each in scalars.items()}


def _classify(embeddings_BD: Tensor, classes: Classes, temperature: float) -> list[Classified]:
    """Return how a batch is classified, by target."""
    return [losses.classified(embeddings_BD, *each, temperature=temperature) for each in classes]


def _mean_loss(found: Sequence[Classified]) -> Tensor:
    return torch.stack([each.loss for each in found]).mean()


def _accuracy(found: Sequence[Classified]) -> Tensor:
    """Return the share of the batch to whose embedding no proxy is nearer than its class's, mean over the targets."""
    return torch.stack([each.right_B.float().mean() for each in found]).mean()


def _transfer(
    plain_BD: Tensor, object_BD: Tensor, classes: Classes, better: Sequence[Tensor], options: AdaptorLoss
) -> Tensor:
    """Return the perception transfer from the object views to the images, mean over the batch.

    It is 0 for an image that its object view does not teach. Object views get no gradient. better: by target, which
    object views are classified better than their image, (B,) bool.
    """
    how = {
        "temperature": options.temperature,
        "softening": options.softening,
        "cosine_weight": options.cosine_weight,
    }
    values = []
    for (proxies_CD, *_), better_B in zip(classes, better, strict=True):
        taught_B = better_B if options.transfer_from == "better" else torch.ones_like(better_B)
        learning_BD, teaching_BD = plain_BD[taught_B], object_BD[taught_B]
        if not len(learning_BD):
            values.append(plain_BD.sum() * 0.0)
            continue
        value = losses.perception_transfer(learning_BD, teaching_BD, proxies_CD, **how)
        values.append(value * len(learning_BD) / len(plain_BD))
    return torch.stack(values).mean()


def _on_backgrounds(
    embeddings_BD: Tensor, known_B: Tensor, classes: Classes, background: Tensor, options: AdaptorLoss
) -> Tensor:
    """Return the loss that pulls backgrounds to their proxy, and away from the proxies of the classes.

    It is summed over the images that have a background view and divided by B: where few images have one it is small.
    """
    kept_BD = embeddings_BD[known_B]
    if not len(kept_BD):
        return embeddings_BD.sum() * 0.0
    values = []
    for proxies_CD, labels_B, _ in classes:
        own = torch.full_like(labels_B[: len(kept_BD)], len(proxies_CD))
        every = torch.cat([proxies_CD, background])
        values.append(losses.norm_softmax(kept_BD, every, own, temperature=options.temperature))
    return torch.stack(values).mean() * len(kept_BD) / len(embeddings_BD)
