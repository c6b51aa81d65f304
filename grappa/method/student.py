"""The student: the backbone with one adaptor set, trained to embed like the fused model at the cost of one adaptor set.

The loss is ``losses.perception_transfer``. Teacher and student see the same augmented view; for a share of the loss the
teacher sees the image's object view instead (DVA's perception transfer, with the fused model as teacher). No label and
no pseudo-label is read. The bank of reference points holds the teacher's embeddings of some train images; the paper of
the loss uses the proxies of a classifier instead, which a fused model does not have. All three are compared whitened by
what the bank varies in, as a head will compare them: of plain embeddings a few directions make up nearly all of the
cosine, and a student that agrees in these alone loses a tenth of what the teacher gained (ours).

Shapes: B batch, D width, S image side, M bank, n train rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from grappa.backbone.frozen import Adaptation, Backbone, embed
from grappa.core.arrays import Rows
from grappa.core.devices import autocast, moved, staged
from grappa.core.randomness import key, shuffled
from grappa.images.pixels import ImageRows
from grappa.images.transforms import eval_batch, normalize
from grappa.method import losses
from grappa.method.adaptors import AdaptorSet
from grappa.method.head import MIN_WHITENED_SHARE
from grappa.metrics.whitening import MIN_VARIANCE, principal_axes
from grappa.training.batches import BatchOrder, Runtime, Views
from grappa.training.loop import FitResult, Group, Optimization, fit


@dataclass(frozen=True)
class Transfer:
    """The settings of ``losses.perception_transfer``, which has the equation.

    bank_size: train images in the bank, at most. object_share: share (0-1) of the loss whose teacher sees object views.
    whitening_power: 0 (plain embeddings) to 1 (equal variances) of the space in which embeddings are compared.
    """

    temperature: float = 0.1
    softening: float = 2.0
    cosine_weight: float = 1.0
    bank_size: int = 1024
    object_share: float = 0.0
    whitening_power: float = 0.5


class Compared:
    """From embeddings (B, D) to where the loss compares them, (B, D) float32: whitened by what the bank varies in.

    Directions in which the bank hardly varies, or not at all because it is small, count as if they had
    ``MIN_WHITENED_SHARE`` of the largest variance: else nothing would hold the student there.
    """

    def __init__(self, bank_MD: Tensor, power: float) -> None:
        mean, variances, axes = principal_axes(F.normalize(bank_MD.float(), dim=-1).cpu().numpy())
        raised = np.maximum(variances, MIN_WHITENED_SHARE * variances[-1] + MIN_VARIANCE)
        made = (torch.from_numpy(each).float() for each in (mean, axes * raised ** (-power / 2)))
        self._mean, self._matrix = (each.to(bank_MD.device) for each in made)

    def __call__(self, embeddings: Tensor) -> Tensor:
        return (F.normalize(embeddings.float(), dim=-1) - self._mean) @ self._matrix


def new_student(backbone: Backbone, bottleneck_dim: int, *, in_context_rank: int = 0, seed: int) -> AdaptorSet:
    """Return the adaptor set that a student starts from; it leaves the backbone unchanged."""
    seed = key(seed, "student") >> 1
    return AdaptorSet.of(backbone, bottleneck_dim, in_context_rank=in_context_rank, seed=seed)


def train_student(
    backbone: Backbone,
    teacher: Adaptation,
    views: Views,
    rows: Rows,
    *,
    start: AdaptorSet,
    transfer: Transfer,
    optimization: Optimization,
    seed: int,
    run: Runtime,
    objects: ImageRows | None = None,
) -> tuple[AdaptorSet, FitResult]:
    """Train one adaptor set to embed the views of the train ``rows`` (n,) as the teacher does.

    Args:
        teacher: what adapts the teacher (a folded fusion) on the same backbone; frozen.
        start: the set that training begins with (:func:`new_student`); it is changed in place and returned.
        objects: the object views of the cache's rows, if ``transfer.object_share`` is above 0.

    Returns:
        The set, and the metrics ``loss`` and ``similarity`` (mean cosine to the teacher) along the steps.
    """
    backbone = backbone.on(run.device)
    bank_MD = _bank(backbone, teacher, views, rows, transfer.bank_size, seed, run)
    compared = Compared(bank_MD, transfer.whitening_power) if transfer.whitening_power else nn.Identity()
    bank_MD = compared(bank_MD)
    student = start.requires_grad_(True).to(run.device)
    order = BatchOrder(views.ids[rows], optimization.batch_size, (seed, "student"), run.processes)

    sources = {"view": views} if objects is None else {"view": views, "object view": replace(views, cache=objects)}

    def batch(step: int) -> Tensor:
        chosen, epoch = order.at(step)
        drawn = [each.draw(key(seed, "student", epoch, kind), rows[chosen]) for kind, each in sources.items()]
        return staged(torch.stack(drawn), run.device)

    def loss(made: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        images = normalize(moved(made, run.device).flatten(0, 1), backbone.spec.mean, backbone.spec.std)
        with autocast(run.device, run.precision):
            with torch.no_grad():
                taught = embed(backbone, images, teacher).chunk(len(sources))
            learned_BD = backbone(images[: made.shape[1]], student)
        value = _transferred(compared(learned_BD), [compared(each) for each in taught], bank_MD, transfer)
        similarity = F.cosine_similarity(learned_BD.detach().float(), taught[0]).mean()
        share = made.shape[1] / order.batch_size
        return share * value, {"similarity": share * similarity}

    groups = [Group(list(student.parameters()), optimization.learning_rate, optimization.weight_decay)]
    result = fit(student, groups, optimization, order.steps_per_epoch, batch, loss, *run.hooks)
    return student.cpu(), result


def _transferred(learned_BD: Tensor, taught: Sequence[Tensor], bank_MD: Tensor, transfer: Transfer) -> Tensor:
    """Return the loss of compared embeddings; taught: the teacher's (B, D) of the images, then of their object views
    if there are any.
    """
    how = {
        "temperature": transfer.temperature,
        "softening": transfer.softening,
        "cosine_weight": transfer.cosine_weight,
    }
    values = [losses.perception_transfer(learned_BD, each, bank_MD, **how) for each in taught]
    return values[0] if len(values) == 1 else torch.lerp(values[0], values[1], transfer.object_share)


def _bank(
    backbone: Backbone, teacher: Adaptation, views: Views, rows: Rows, bank_size: int, seed: int, run: Runtime
) -> Tensor:
    """Return the teacher's embeddings (M, D) of train images drawn by their ids, as retrieval sees them."""
    spec = backbone.spec
    chosen = rows[shuffled(key(seed, "student", "bank"), views.ids[rows])[:bank_size]]
    parts = []
    for block in np.array_split(chosen, -(-len(chosen) // 64)):
        images = eval_batch(views.cache, block, num_workers=views.num_workers, **spec.framing)
        with torch.no_grad(), autocast(run.device, run.precision):
            parts.append(embed(backbone, normalize(images.to(run.device), spec.mean, spec.std), teacher))
    return torch.cat(parts)
