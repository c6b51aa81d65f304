"""The normalised softmax loss over very many classes: same loss, same gradients, a fraction of memory and time.

Classes are handled in chunks that stay in the CPU's cache. No normalised copy of the proxies is made: a column of
products is divided by its proxy's length instead. Kept for the gradient are the logits and nothing else of that size.
"""

# B batch, D width, C classes, K classes of a chunk

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 4096
MIN_LENGTH = 1e-12  # as in torch's normalize


def large_norm_softmax(units_BD: Tensor, proxies_CD: Tensor, labels_B: Tensor, temperature: float) -> Tensor:
    """Return what ``grappa.losses.norm_softmax`` does of L2-normalised embeddings; once differentiable."""
    loss: Tensor = _LargeNormSoftmax.apply(units_BD, proxies_CD, labels_B, temperature)
    return loss


class _LargeNormSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, units_BD: Tensor, proxies_CD: Tensor, labels_B: Tensor, temperature: float) -> Tensor:
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
        normalizers_B = largest_B + sums_B.log()
        ctx.temperature = temperature
        ctx.save_for_backward(units_BD, proxies_CD, labels_B, scales_C, normalizers_B, *chunks)
        return (normalizers_B - own_B).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        units_BD, proxies_CD, labels_B, scales_C, normalizers_B, *chunks = ctx.saved_tensors
        factors_C = scales_C * (gradient / (len(units_BD) * ctx.temperature))
        of_units_BD, of_proxies_CD = torch.zeros_like(units_BD), torch.empty_like(proxies_CD)
        for chunk, logits_BK in zip(_chunks(len(proxies_CD)), chunks, strict=True):
            weights_BK = (logits_BK - normalizers_B[:, None]).exp_()
            weights_BK[_inside(labels_B, chunk)] -= 1.0
            weights_BK *= factors_C[chunk]
            of_units_BD.addmm_(weights_BK, proxies_CD[chunk])
            part_KD = torch.mm(weights_BK.T, units_BD, out=of_proxies_CD[chunk])
            along_K = (part_KD * proxies_CD[chunk]).sum(1) * scales_C[chunk].square()
            part_KD.addcmul_(proxies_CD[chunk], along_K[:, None], value=-1.0)
        return of_units_BD, of_proxies_CD, None, None


def _chunks(num_classes: int) -> Iterator[slice]:
    return (slice(start, start + CHUNK) for start in range(0, num_classes, CHUNK))


def _inside(labels_B: Tensor, chunk: slice) -> tuple[Tensor, Tensor]:
    """Return the rows whose class lies in the chunk, and where there."""
    rows = torch.nonzero((labels_B >= chunk.start) & (labels_B < chunk.stop))[:, 0]
    return rows, labels_B[rows] - chunk.start
