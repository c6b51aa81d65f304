"""The losses, pure functions of tensors, each with its equation; the softmax over many classes is computed in chunks.

Shapes: B batch (pairs), D width, C classes, K classes of a chunk, M rows of a bank, L blocks, G pseudo-granularities.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from grappa.core.distributed import ALONE, Processes

LARGE = 2**22  # products of a batch with the proxies from which on they are computed in chunks
CHUNK = 4096  # classes of a chunk
MIN_LENGTH = 1e-12  # as in torch's normalize


class Classified(NamedTuple):
    """A batch's loss by the normalised softmax, ``()``, and of each image, without gradient: its own loss ``losses_B``,
    and ``right_B`` bool, whether no proxy is nearer than that of its class.
    """

    loss: Tensor
    losses_B: Tensor
    right_B: Tensor


@dataclass(frozen=True)
class Share:
    """What one of several processes holds of a softmax: its ``own_slice`` of ``batch_size`` images, and the classes
    from number ``first`` on. A single process holds everything.
    """

    processes: Processes = ALONE
    batch_size: int = 0
    first: int = 0


WHOLE = Share()


def norm_softmax(embeddings_BD: Tensor, proxies_CD: Tensor, labels_B: Tensor, *, temperature: float) -> Tensor:
    """Return the normalised softmax loss, mean over B (Zhai & Wu 2019; no bias).

    ``-log softmax_c(<x, p_c> / temperature)[y]`` with x and every p_c L2-normalised. ``labels_B`` int64 in 0..C-1. From
    ``LARGE`` products on it is computed in chunks of classes, with the same result up to the rounding of float32.
    """
    return classified(embeddings_BD, proxies_CD, labels_B, temperature=temperature).loss


def classified(
    embeddings_BD: Tensor, proxies_CD: Tensor, labels_B: Tensor, share: Share = WHOLE, *, temperature: float
) -> Classified:
    """Return the loss of :func:`norm_softmax`, and what the same products tell of each image.

    Of several processes each gives the embeddings and labels of its own images, and the proxies that it holds; it gets
    what is told of its own images, compared with the proxies of all. The gradients are those of the mean over the whole
    batch if each process counts its loss by its part of the batch's images; a process then has the whole gradients of
    its embeddings and of its proxies.
    """
    large = len(embeddings_BD) * len(proxies_CD) >= LARGE and embeddings_BD.dtype != torch.float64
    if large or share.processes.world_size > 1:
        units_BD = F.normalize(_full(embeddings_BD), dim=-1)
        return large_norm_softmax(units_BD, _full(proxies_CD), labels_B, temperature, share)
    cosines_BC = F.normalize(_full(embeddings_BD), dim=-1) @ F.normalize(_full(proxies_CD), dim=-1).T
    logs_BC = (cosines_BC / temperature).log_softmax(-1)
    own_B1, largest_B1 = labels_B[:, None], cosines_BC.detach().amax(-1, keepdim=True)
    right_B = (cosines_BC.detach().gather(1, own_B1) >= largest_B1)[:, 0]
    return Classified(F.nll_loss(logs_BC, labels_B), -logs_BC.detach().gather(1, own_B1)[:, 0], right_B)


def barlow_twins(first_BD: Tensor, second_BD: Tensor, *, off_diagonal: float) -> Tensor:
    """Return Barlow Twins' loss (Zbontar et al. 2021) divided by D, on batch-standardised columns.

    ``sum_d (C_dd - 1)^2 + off_diagonal * sum_{d != e} C_de^2`` with ``C = x^T y / B``, B >= 2. Columns are centred and
    divided by ``sqrt(variance + 1e-6)``.
    """
    correlation = _standardised(first_BD).T @ _standardised(second_BD) / len(first_BD)
    diagonal = correlation.diagonal()
    on = (diagonal - 1).square().sum()
    off = correlation.square().sum() - diagonal.square().sum()
    return (on + off_diagonal * off) / correlation.shape[0]


def attention_propagation(first_BLG: Tensor, second_BLG: Tensor, *, marginal_weight: float = 1.0) -> Tensor:
    """Return the loss by which neighbours come to share granularity attention, mean over L; at least -w log G.

    ``-log <a_i, a_j> + mean entropy of each attention - marginal_weight * entropy of the batch-mean attention``. The
    first term is agreement (SCAN, Van Gansbeke et al. 2020); the last two keep it from the trivial optimum, the same
    attention for every image (mutual information). Ours: the paper's own loss is not known.

    Args:
        first_BLG, second_BLG: granularity attentions of the pairs, sum 1 over G.
    """
    agreement = -(first_BLG * second_BLG).sum(-1).clamp_min(1e-12).log().mean()
    both = torch.cat([first_BLG, second_BLG])
    return agreement + entropy(both).mean() - marginal_weight * entropy(both.mean(0)).mean()


def swapped_attention(first_BLG: Tensor, second_BLG: Tensor, *, sharpness: float, num_iterations: int = 3) -> Tensor:
    """Return the swapped prediction loss (SwAV, Caron et al. 2020) on granularity attentions, mean over B and L.

    Each image predicts its partner's attention, sharpened (power ``sharpness``) and balanced over the batch
    (Sinkhorn-Knopp, so that all sets stay in use), without gradient.
    """
    targets = [_balanced(a.detach(), sharpness, num_iterations) for a in (first_BLG, second_BLG)]
    logs = [a.clamp_min(1e-12).log() for a in (first_BLG, second_BLG)]
    return -((targets[1] * logs[0]).sum(-1).mean() + (targets[0] * logs[1]).sum(-1).mean()) / 2


def perception_transfer(
    student_BD: Tensor,
    teacher_BD: Tensor,
    bank_MD: Tensor,
    *,
    temperature: float,
    softening: float = 2.0,
    cosine_weight: float = 1.0,
) -> Tensor:
    """Return the loss by which a student takes over what its teacher sees, mean over B; 0 where the two agree.

    ``T^2 KL(p(teacher) || p(student)) + cosine_weight (1 - <teacher, student>)`` with ``p(x) = softmax_m(<x, c_m> /
    (temperature T))``, T = ``softening``, over the rows c_m of a fixed bank (Hinton et al. 2015; DVA's own form is not
    known). All embeddings are L2-normalised here; neither teacher nor bank gets a gradient.
    """
    student, teacher, bank = (F.normalize(_full(each), dim=-1) for each in (student_BD, teacher_BD, bank_MD))
    teacher, scale = teacher.detach(), temperature * softening
    logs, wanted = ((each @ bank.detach().T / scale).log_softmax(-1) for each in (student, teacher))
    divergence = F.kl_div(logs, wanted, log_target=True, reduction="batchmean")
    return softening**2 * divergence + cosine_weight * (1 - (teacher * student).sum(-1)).mean()


def entropy(attention: Tensor) -> Tensor:
    """Return the entropy over the last dimension in nats: 0 .. log G."""
    return -(attention * attention.clamp_min(1e-12).log()).sum(-1)


def _balanced(attention_BLG: Tensor, sharpness: float, num_iterations: int) -> Tensor:
    target = attention_BLG.clamp_min(1e-12).pow(sharpness)
    for _ in range(num_iterations):
        target = target / target.sum(0, keepdim=True)
        target = target / target.sum(-1, keepdim=True)
    return target


def _full(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _standardised(columns_BD: Tensor) -> Tensor:
    columns = _full(columns_BD) - _full(columns_BD).mean(0)
    return columns / columns.square().mean(0).add(1e-6).sqrt()


def large_norm_softmax(
    units_BD: Tensor, proxies_CD: Tensor, labels_B: Tensor, temperature: float, share: Share = WHOLE
) -> Classified:
    """Return :func:`classified` of L2-normalised embeddings; the loss can be differentiated once."""
    return Classified(*_LargeNormSoftmax.apply(units_BD, proxies_CD, labels_B, temperature, share))


class _LargeNormSoftmax(torch.autograd.Function):
    """The softmax in chunks of classes, without a (B, C) tensor of gradients or a normalised copy of the proxies.

    Several processes exchange the embeddings, three numbers an image, and the embeddings' gradients: each compares the
    whole batch with the proxies that it holds.
    """

    @staticmethod
    def forward(
        ctx: Any, units_BD: Tensor, proxies_CD: Tensor, labels_B: Tensor, temperature: float, share: Share
    ) -> tuple[Tensor, Tensor, Tensor]:
        units_BD, labels_B = (share.processes.all_gather(each, share.batch_size) for each in (units_BD, labels_B))
        labels_B = labels_B - share.first
        scales_C = proxies_CD.norm(dim=1).clamp_min_(MIN_LENGTH).reciprocal_()
        largest_B = units_BD.new_full((len(units_BD),), -torch.inf)
        sums_B, own_B = torch.zeros_like(largest_B), torch.zeros_like(largest_B)
        chunks = []
        for chunk in _chunks(len(proxies_CD)):
            logits_BK = (units_BD @ proxies_CD[chunk].T).mul_(scales_C[chunk] / temperature)
            before_B, largest_B = largest_B, torch.maximum(largest_B, logits_BK.amax(1))
            sums_B *= (before_B - largest_B).exp()
            sums_B += (logits_BK - largest_B[:, None]).exp_().sum(1)
            rows, columns = _inside(labels_B, chunk)
            own_B[rows] = logits_BK[rows, columns]
            chunks.append(logits_BK)
        largest_B, sums_B, own_B = _combined(share.processes, largest_B, sums_B, own_B)
        normalizers_B = largest_B + sums_B.log()
        ctx.temperature, ctx.processes = temperature, share.processes
        ctx.save_for_backward(units_BD, proxies_CD, labels_B, scales_C, normalizers_B, *chunks)
        images = share.processes.own_slice(len(units_BD))
        losses_B, right_B = (normalizers_B - own_B)[images], (own_B >= largest_B)[images]
        ctx.mark_non_differentiable(losses_B, right_B)
        return losses_B.mean(), losses_B, right_B

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        units_BD, proxies_CD, labels_B, scales_C, normalizers_B, *chunks = ctx.saved_tensors
        images = ctx.processes.own_slice(len(units_BD))
        factors_C = scales_C * (gradient / ((images.stop - images.start) * ctx.temperature))
        of_units_BD, of_proxies_CD = torch.zeros_like(units_BD), torch.empty_like(proxies_CD)
        for chunk, logits_BK in zip(_chunks(len(proxies_CD)), chunks, strict=True):
            weights_BK = (logits_BK - normalizers_B[:, None]).exp_()
            weights_BK[_inside(labels_B, chunk)] -= 1.0
            weights_BK *= factors_C[chunk]
            of_units_BD.addmm_(weights_BK, proxies_CD[chunk])
            part_KD = torch.mm(weights_BK.T, units_BD, out=of_proxies_CD[chunk])
            along_K = (part_KD * proxies_CD[chunk]).sum(1) * scales_C[chunk].square()
            part_KD.addcmul_(proxies_CD[chunk], along_K[:, None], value=-1.0)
        ctx.processes.all_reduce([of_units_BD])
        return of_units_BD[images], of_proxies_CD, None, None, None


def _combined(processes: Processes, largest_B: Tensor, sums_B: Tensor, own_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return each image's largest logit, sum of exponentials above it and own logit over the classes of all processes.

    Each process gives those over its own classes; the own logit is 0 where it does not hold the class.
    """
    parts_PB3 = processes.all_gather(torch.stack([largest_B, sums_B, own_B], dim=-1)[None], processes.world_size)
    largest_PB, sums_PB, own_PB = parts_PB3.unbind(-1)
    largest_B = largest_PB.amax(0)
    return largest_B, (sums_PB * (largest_PB - largest_B).exp()).sum(0), own_PB.sum(0)


def _chunks(num_classes: int) -> Iterator[slice]:
    return (slice(start, min(start + CHUNK, num_classes)) for start in range(0, num_classes, CHUNK))


def _inside(labels_B: Tensor, chunk: slice) -> tuple[Tensor, Tensor]:
    """Return the rows whose class lies in the chunk, and the columns of these classes in it."""
    rows = torch.nonzero((labels_B >= chunk.start) & (labels_B < chunk.stop))[:, 0]
    return rows, labels_B[rows] - chunk.start
