"""Stage ``neighbors``: the train images nearest to every image by the frozen backbone's whitened features, except the
image itself.

The recall of an approximate engine (``neighbors.engine``) is measured, written down, and told where it is low.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from grappa.images.splits import train_rows
from grappa.pipeline.engine.context import StageContext
from grappa.pipeline.graph.stages import searched_node
from grappa.pipeline.opening import read_images, settle_device
from grappa.search.approximate_neighbors import approximate_neighbors, memory_with_index, trained_index
from grappa.search.index import num_found, recall_rows
from grappa.search.neighbors import memory_needed, nearest_neighbors

MIN_RECALL = 0.95
Found = tuple[NDArray[np.int64], NDArray[np.float32]]


@dataclass(frozen=True)
class _Candidates:
    """Whose K nearest to a query are sought: features (M, D) and rows (M,) of the train images."""

    features: NDArray[np.float32]
    rows: NDArray[np.int64]
    number: int
    device: str

    def exact(
        self, queries: NDArray[np.float32], ids: NDArray[np.int64], progress: Callable[[int], None] | None = None
    ) -> Found:
        return nearest_neighbors(
            queries,
            self.features,
            num_neighbors=self.number,
            query_ids=ids,
            candidate_ids=self.rows,
            device=self.device,
            progress=progress,
        )

    def found_by(
        self, index: bytes, queries: NDArray[np.float32], ids: NDArray[np.int64], progress: Callable[[int], None]
    ) -> Found:
        return approximate_neighbors(
            queries,
            self.features,
            index=index,
            num_neighbors=self.number,
            query_ids=ids,
            candidate_ids=self.rows,
            progress=progress,
        )


def run(context: StageContext) -> str:
    node, engine = searched_node(context.config), context.config.neighbors.settled_engine
    features = np.load(context.input(node.stage, node.instance) / "features.npy", mmap_mode="r", allow_pickle=False)
    images = read_images(context.input("images"))
    rows, own = train_rows(images), np.arange(len(features))[context.processes.own_slice(len(features))]
    number = min(context.config.neighbors.num_neighbors, len(rows) - 1)
    sizes = (len(own), len(rows), features.shape[1], number)
    context.need_memory(memory_needed(*sizes) if engine == "exact" else memory_with_index(engine, *sizes))
    candidates, recall = _Candidates(features[rows], rows, number, str(settle_device(context))), ""
    if engine == "exact":
        with context.task("searching", len(own)) as advance:
            found = candidates.exact(features[own], own, advance)
    else:
        index = trained_index(engine, candidates.features) if context.leads else b""
        context.team.wait_for_all("lists")  # a collective would not wait for hours
        index = context.processes.broadcast(index)
        with context.task("searching", len(own)) as advance:
            found = candidates.found_by(index, features[own], own, advance)
        recall = _recall(context, candidates, features, found[1], recall_rows(images["image_id"].tolist()))
    neighbors, similarities = (_collected(context, part, len(features)) for part in found)
    if not context.leads:
        return ""
    np.save(context.path / "neighbors.npy", neighbors, allow_pickle=False)
    np.save(context.path / "similarities.npy", similarities, allow_pickle=False)
    return f"{number} neighbours of {len(features)} images, mean similarity {similarities.mean():.3f}{recall}"


def _recall(
    context: StageContext,
    candidates: _Candidates,
    features: NDArray[np.float32],
    similarities: NDArray[np.float32],
    asked: NDArray[np.int64],
) -> str:
    """Write down the share of the nearest images of the rows ``asked`` that was found, and return it in words.

    similarities: of what this process found for its slice of the rows; it searches those of ``asked`` exactly.
    """
    own = range(len(features))[context.processes.own_slice(len(features))]
    mine = asked[(asked >= own.start) & (asked < own.stop)]
    exact = candidates.exact(features[mine], mine)[1] if len(mine) else similarities[:0]
    total = torch.tensor([num_found(similarities[mine - own.start], exact)])
    context.processes.all_reduce([total])
    name, share = f"recall@{candidates.number}", int(total) / (len(asked) * candidates.number)
    share = context.resolve(name.replace("@", "_at_"), round(share, 4))
    engine = context.config.neighbors.engine
    if share < MIN_RECALL and context.leads:
        context.progress.say(
            f"warning: neighbors: {engine} finds {share:.1%} of the nearest images (below {MIN_RECALL:.0%}, measured "
            f"on {len(asked)} images); for all of them: `grappa init RUN --set neighbors.engine=exact`"
        )
    return f", {engine} ({name} {share:.3f})"


def _collected(context: StageContext, own: NDArray[Any], number: int) -> NDArray[Any]:
    """Return all ``number`` rows in the first process; in another process return its part, ``own``."""
    parts = context.processes.gather(torch.from_numpy(own), math.ceil(number / context.team.size))
    return torch.cat(parts).numpy() if parts else own
