"""Embedding many images with a frozen model, batch by batch, so that interrupted work can go on.

Shapes: N images, B batch, D width, S image side, L blocks, G pseudo-granularities.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from grappa.backbone.frozen import Adaptation, Backbone, embed
from grappa.core.devices import autocast, moved, staged
from grappa.core.distributed import ALONE, Processes
from grappa.images.pixels import ImageRows, repeated_rows
from grappa.images.transforms import eval_batch, normalize, prefetch

Read = Callable[[Backbone, Tensor, Adaptation | None], Tensor]
Batch = Callable[[ImageRows, NDArray[np.int64]], Tensor]


def extract_features(
    backbone: Backbone,
    cache: ImageRows,
    out: NDArray[np.float32] | None,
    *,
    adaptation: Adaptation | None = None,
    read: Read = embed,
    view: Batch | None = None,
    start: int = 0,
    batch_size: int = 64,
    device: torch.device | None = None,
    precision: str = "float32",
    num_workers: int = 1,
    progress: Callable[[int], None] | None = None,
    processes: Processes = ALONE,
) -> None:
    """Write the L2-normalised embeddings of the cache's images ``start``..N-1 into ``out`` (N, D) float32.

    Images with the same pixels in neighbouring rows, as copies of one file are, get the same bits: a batch of another
    size may round otherwise.

    Args:
        out: an array or a memory map; its rows are the cache's rows. Of several processes only rank 0 has one.
        adaptation: an adaptor set, a fusion; None: the plain backbone.
        read: from (backbone, images, adaptation) to what is written of a batch (B, ...): ``embed``, or another function
            such as ``grappa.method.fusion.class_token_attention``; ``out`` is then (N, ...).
        view: from rows (B,) of the cache to a uint8 batch; None: the crop that the backbone's spec asks for.
        start: the first row to write; a multiple of ``batch_size``, so that the batches are those of a whole pass.
        progress: called with the number of rows newly written, after they are written.
        processes: the processes that take turns at the batches; the batches are those of a single process.
    """
    device = device or torch.device("cpu")
    spec = backbone.spec
    view = view or (lambda cache, rows: eval_batch(cache, rows, num_workers=num_workers, **spec.framing))
    backbone = backbone.on(device)
    adaptation = adaptation.to(device) if isinstance(adaptation, nn.Module) else adaptation
    bounds = range(start, len(cache), batch_size)
    rounds = [bounds[first : first + processes.world_size] for first in range(0, len(bounds), processes.world_size)]

    def make(number: int) -> Tensor:
        turn = min(processes.rank, len(rounds[number]) - 1)  # without a batch in this round: the last one again
        begin = rounds[number][turn]
        rows = np.arange(begin, min(begin + batch_size, len(cache)))
        return staged(view(cache, rows), device)

    for begins, images in zip(rounds, prefetch(make, len(rounds)), strict=True):
        with torch.inference_mode(), autocast(device, precision):
            found = read(backbone, normalize(moved(images, device), spec.mean, spec.std), adaptation)
        parts = processes.gather(found, batch_size)
        for begin, part in zip(begins, parts or (), strict=False):
            assert out is not None, "rank 0 writes"
            out[begin : begin + len(part)] = part.cpu().numpy()
        if progress:
            progress(min(begins[-1] + batch_size, len(cache)) - begins[0])
    if out is not None:
        for row, first in repeated_rows(cache):
            out[row] = out[first]
