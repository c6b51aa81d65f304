"""Stage ``index``: the search index over the final embeddings of the deployed model."""

from __future__ import annotations

import numpy as np

from grappa.images.splits import chosen_rows
from grappa.pipeline.engine.context import StageContext
from grappa.pipeline.graph.models import final_node
from grappa.pipeline.opening import open_deployed, read_images
from grappa.search.index import SearchIndex, memory_needed


def run(context: StageContext) -> str:
    settings, images = context.config.index, read_images(context.input("images"))
    rows = chosen_rows(images, settings.rows)
    source = final_node(context.config, open_deployed(context))
    folder = context.input(source.stage, source.instance)
    embeddings = np.load(folder / "embeddings.npy", mmap_mode="r", allow_pickle=False)
    context.need_memory(memory_needed(len(rows), embeddings.shape[1]))
    ids = images["image_id"].iloc[rows].tolist()
    SearchIndex.build(np.asarray(embeddings[rows]), ids, ivf_above=settings.ivf_above).save(context.path)
    return f"{len(rows)} images can be found"
