"""Stage ``neighbors``: the train images nearest to every image by the frozen backbone's whitened features, except the
image itself."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from grappa.images.splits import train_rows
from grappa.pipeline.engine.context import StageContext
from grappa.pipeline.graph.stages import searched_node
from grappa.pipeline.opening import read_images, settle_device
from grappa.search.neighbors import memory_needed, nearest_neighbors


def run(context: StageContext) -> str:
    node = searched_node(context.config)
    features = np.load(context.input(node.stage, node.instance) / "features.npy", mmap_mode="r", allow_pickle=False)
    rows = train_rows(read_images(context.input("images")))
    number = min(context.config.neighbors.num_neighbors, len(rows) - 1)
    own = np.arange(len(features))[context.processes.own_slice(len(features))]
    context.need_memory(memory_needed(len(own), len(rows), features.shape[1], number))
    with context.task("searching", len(own)) as advance:
        found = nearest_neighbors(
            features[own],
            features[rows],
            num_neighbors=number,
            query_ids=own,
            candidate_ids=rows,
            device=str(settle_device(context)),
            progress=advance,
        )
    neighbors, similarities = (_collected(context, part, len(features)) for part in found)
    if not context.leads:
        return ""
    np.save(context.path / "neighbors.npy", neighbors, allow_pickle=False)
    np.save(context.path / "similarities.npy", similarities, allow_pickle=False)
    return f"{number} neighbours of {len(features)} images, mean similarity {similarities.mean():.3f}"


def _collected(context: StageContext, own: NDArray[Any], number: int) -> NDArray[Any]:
    """Return all ``number`` rows in the first process; in another process return its part, ``own``."""
    parts = context.processes.gather(torch.from_numpy(own), math.ceil(number / context.team.size))
    return torch.cat(parts).numpy() if parts else own
