"""The search index of the collection as it is now: the run's index, the embeddings of added images, none removed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from grappa.pipeline.config.schema import Config
from grappa.pipeline.engine.live.additions import INDEX, INDEX_FILES, REMOVED, Additions, index_fingerprint
from grappa.pipeline.engine.live.collection import added_images, added_vectors, live_embeddings
from grappa.pipeline.engine.verdict_file import made_of
from grappa.pipeline.graph.models import final_node
from grappa.pipeline.store.artifacts import RunFolder, published, readable_manifest
from grappa.search.index import INDEX_FILE, SearchIndex, recall
from grappa.search.index_kinds import kind_of


def write_index(run: RunFolder, config: Config, found: Additions, out: Path) -> dict[str, Any]:
    """Write index.faiss and ids.parquet of the collection as it is now; return kind, size, recall for the provenance.

    What the former index with additions holds already is not computed again. Lists and codes of an approximate index
    stay those of the run's index; its recall is measured anew.
    """
    base = SearchIndex.load(_base(run, found))
    table = pd.read_parquet(published(run, "images", "images.parquet") / "images.parquet", columns=["image_id"])
    added = added_images(run, found, pd.Index(table["image_id"]))
    new = added[~added.index.isin(base.ids)]
    vectors = added_vectors(run, new, "embeddings.npy", base.faiss_index.d)
    index = base.grown(vectors, new.index.tolist()).without(found.removed)
    index.save(out)
    kind = kind_of(index.faiss_index)
    measured = 1.0 if kind == "flat" else round(_recall(run, config, index, table["image_id"]), 4)
    size = (out / INDEX_FILE).stat().st_size
    return {"num_images": len(index), "kind": kind, "index_bytes": size, "recall_at_10": measured}


def _base(run: RunFolder, found: Additions) -> Path:
    """Return the folder of the index to go on from: the former one with additions where its inputs are as they were."""
    former, wanted = run.artifact(INDEX), index_fingerprint(run, found.ready)["inputs"]
    manifest = readable_manifest(run, INDEX) if former.home.exists() else None
    if manifest is not None:
        known = {name: files for name, files in manifest.fingerprint["inputs"].items() if name != REMOVED.name}
        if all(wanted.get(name) == files for name, files in known.items()) and not former.check(read=INDEX_FILES):
            return former.home
    return published(run, "index")


def _recall(run: RunFolder, config: Config, index: SearchIndex, ids: pd.Series) -> float:
    node = final_node(config, made_of(run, "index"))
    embeddings = np.load(published(run, node, "embeddings.npy") / "embeddings.npy", mmap_mode="r", allow_pickle=False)
    vectors, names = live_embeddings(run, config, node, embeddings, ids.to_numpy(dtype=object))
    rows = np.flatnonzero(np.isin(names, index.ids))  # of an index of train images alone, only these and the added ones
    return recall(index, np.asarray(vectors[rows]), names[rows].tolist())
