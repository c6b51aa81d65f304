"""The student: the backbone with one adaptor set, taught to embed as the fused model does, at the cost of one set.

Teacher and student see the same augmented view; what passes over is ``grappa.losses.perception_transfer``. No label and
no pseudo-label is read. The bank of reference points are the teacher's embeddings of some train images, where the paper
of the loss has the proxies of a classifier, which a fused model lacks.

Shapes: B batch, D width, S image side, M bank, n train rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from grappa import losses
from grappa.adaptors import AdaptorSet
from grappa.backbone import Adaptation, Backbone, embed
from grappa.batches import BatchOrder, Rows, Run, Views
from grappa.devices import autocast
from grappa.fitting import FitResult, Group, Optimization, fit
from grappa.randomness import key, shuffled
from grappa.transforms import eval_batch, normalize


@dataclass(frozen=True)
class Transfer:
    """How perception is transferred (``grappa.losses.perception_transfer`` has the equation), over a bank of at most
    ``bank_size`` train images."""

    temperature: float = 0.1
    softening: float = 2.0
    cosine_weight: float = 1.0
    bank_size: int = 1024


def new_student(backbone: Backbone, bottleneck_dim: int, *, in_context_rank: int = 0, seed: int) -> AdaptorSet:
    """Return the set that a student starts from: the backbone unchanged."""
    return AdaptorSet(
        backbone.num_blocks,
        backbone.width,
        bottleneck_dim,
        in_context_rank=in_context_rank,
        seed=key(seed, "student") >> 1,
    )


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
    run: Run,
) -> tuple[AdaptorSet, FitResult]:
    """Train one adaptor set to embed the views of the train ``rows`` (n,) as the teacher does.

    Args:
        teacher: what adapts the teacher (a folded fusion) on the same backbone; frozen.
        start: the set that training begins with (:func:`new_student`); it is changed in place and returned.

    Returns:
        The set, and the metrics ``loss`` and ``similarity`` (mean cosine to the teacher) along the steps.
    """
    backbone = backbone.on(run.device)
    bank_MD = _bank(backbone, teacher, views, rows, transfer.bank_size, seed, run)
    student = start.requires_grad_(True).to(run.device)
    order = BatchOrder(views.ids[rows], optimization.batch_size, (seed, "student"), run.processes)

    def batch(step: int) -> Tensor:
        chosen, epoch = order.at(step)
        return views.draw(key(seed, "student", epoch, "view"), rows[chosen])

    def loss(made: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        images = normalize(made.to(run.device), backbone.spec.mean, backbone.spec.std)
        with autocast(run.device, run.precision):
            with torch.no_grad():
                taught_BD = embed(backbone, images, teacher)
            learned_BD = backbone(images, student)
        value = losses.perception_transfer(
            learned_BD,
            taught_BD,
            bank_MD,
            temperature=transfer.temperature,
            softening=transfer.softening,
            cosine_weight=transfer.cosine_weight,
        )
        similarity = F.cosine_similarity(learned_BD.detach().float(), taught_BD).mean()
        share = len(images) / order.batch_size
        return share * value, {"similarity": share * similarity}

    groups = [Group(list(student.parameters()), optimization.learning_rate, optimization.weight_decay)]
    result = fit(
        student, groups, optimization, order.steps_per_epoch, batch, loss, run.checkpoint, run.progress, run.processes
    )
    return student.cpu(), result


def _bank(
    backbone: Backbone, teacher: Adaptation, views: Views, rows: Rows, bank_size: int, seed: int, run: Run
) -> Tensor:
    """Return the teacher's embeddings (M, D) of train images drawn by their ids, as retrieval sees them."""
    spec = backbone.spec
    chosen = rows[shuffled(key(seed, "student", "bank"), views.ids[rows])[:bank_size]]
    parts = []
    for block in np.array_split(chosen, -(-len(chosen) // 64)):
        images = eval_batch(
            views.cache,
            block,
            image_size=spec.image_size,
            crop_fraction=spec.crop_fraction,
            num_workers=views.num_workers,
        )
        with torch.no_grad(), autocast(run.device, run.precision):
            parts.append(embed(backbone, normalize(images.to(run.device), spec.mean, spec.std), teacher))
    return torch.cat(parts)
