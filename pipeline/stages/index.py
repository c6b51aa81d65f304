"""Stage ``index``: the search index over the final embeddings of the deployed model."""

from __future__ import annotations

import numpy as np

from grappa.images.splits import chosen_rows
from grappa.pipeline.engine.context import StageContext
from grappa.pipeline.graph.models import final_node
from grappa.pipeline.opening import open_deployed, read_images
from grappa.search.index import INDEX_FILE, SearchIndex, memory_needed, recall
from grappa.search.index_kinds import index_bytes, megabytes, settled_kind


def run(context: StageContext) -> str:
    settings, images = context.config.index, read_images(context.input("images"))
    rows = chosen_rows(images, settings.rows)
    source = final_node(context.config, open_deployed(context))
    folder = context.input(source.stage, source.instance)
    embeddings = np.load(folder / "embeddings.npy", mmap_mode="r", allow_pickle=False)
    kind, width = settled_kind(settings.kind, len(rows), settings.ivf_above), embeddings.shape[1]
    context.need_memory(memory_needed(len(rows), width, kind))
    context.progress.say(f"{context.name}: {kind}, about {megabytes(index_bytes(kind, len(rows), width))} in memory")
    ids, vectors = images["image_id"].iloc[rows].tolist(), np.asarray(embeddings[rows])
    index = SearchIndex.build(vectors, ids, kind=kind)
    index.save(context.path)
    size = (context.path / INDEX_FILE).stat().st_size
    found = 1.0 if kind == "flat" else round(recall(index, vectors, ids), 4)
    for name, value in {"kind": kind, "index_bytes": size, "recall_at_10": found}.items():
        context.resolve(name, value)
    exact = "exact" if kind == "flat" else f"recall@10 {found:.3f}"
    return f"{len(rows)} images can be found, {kind} ({exact}), {megabytes(size)}"
