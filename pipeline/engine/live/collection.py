"""The collection as it is now: the run's images without the removed ones, then the added ones.

Images that were added and that the run has learned since (`grappa init` on the grown folder, `grappa run`) count as the
run's own. Added images that the deployed model has not embedded are left out: no table ever mixes two models.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from grappa.pipeline.config.schema import Config
from grappa.pipeline.engine.live.additions import (
    Additions,
    assigned_granularities,
    pictures,
    read_additions,
    vectors,
)
from grappa.pipeline.engine.verdict_file import made_of
from grappa.pipeline.graph.models import final_node
from grappa.pipeline.graph.node import Node
from grappa.pipeline.store.artifacts import RunFolder, check_same_origin, published, readable_manifest

if TYPE_CHECKING:
    from numpy.typing import NDArray

FROZEN = Node("embeddings", "zero_shot")


def live_images(run: RunFolder, config: Config, table: pd.DataFrame) -> pd.DataFrame:
    """Return the images of the collection as it is now, from those of the run (index image_id), with ``addition``."""
    kept, added = _live(run, config, table.index)
    table = table.assign(addition=0)
    return pd.concat([table[kept], added[[*table.columns]]]) if len(added) else table[kept]


def live_assignments(run: RunFolder, config: Config, table: pd.DataFrame) -> pd.DataFrame:
    """Return the assignments of the collection as it is now, from those of the run (index image_id)."""
    kept, added = _live(run, config, table.index)
    if added.empty:
        return table[kept]
    found = pd.concat([added[["path", "domain", "split", "label"]], added_assignments(run, config, added)], axis=1)
    return pd.concat([table[kept], found.reindex(columns=table.columns)])


def live_embeddings(
    run: RunFolder, config: Config, node: Node, embeddings: NDArray[np.float32], ids: NDArray[np.object_]
) -> tuple[NDArray[np.float32], NDArray[np.object_]]:
    """Return the embeddings and ids of the collection as it is now, from those of the run by the artifact ``node``.

    ValueError where images were added and ``node`` holds neither the features nor the deployed model's embeddings.
    """
    kept, added = _live(run, config, pd.Index(ids))
    if kept.all() and added.empty:
        return embeddings, ids
    files = {FROZEN: "features.npy", final_node(config, made_of(run, "model")): "embeddings.npy"}
    if len(added) and node not in files:
        names = " and ".join(dict.fromkeys(map(str, files)))
        raise ValueError(f"added images have no embeddings of {node}, but those of {names}; ask for these")
    if len(added):
        check_same_origin(run, "features" if node == FROZEN else "model", node.name)
    new = added_vectors(run, added, files.get(node, ""), embeddings.shape[1])
    return np.concatenate([embeddings[kept], new]), np.concatenate([ids[kept], added.index.to_numpy(dtype=object)])


def _live(run: RunFolder, config: Config, ids: pd.Index) -> tuple[NDArray[np.bool_], pd.DataFrame]:
    """Return which of the run's images are not removed, (N,), and the table of the added images."""
    found = read_additions(run, config)
    return ~ids.isin(list(found.removed)), added_images(run, found, ids)


def added_images(run: RunFolder, found: Additions, known: pd.Index) -> pd.DataFrame:
    """Return the added images that are neither among ``known`` nor removed: index image_id.

    Columns: those of an image table, label (str or None), file (the path that opens), addition (its number) and row
    (the row within it).
    """
    parts = []
    for number in found.ready:
        images = read_pictures(run, number)
        images["addition"], images["row"] = number, np.arange(len(images))
        parts.append(images)
    if not parts:
        return pd.DataFrame(columns=["addition", "row"], index=pd.Index([], name="image_id"))
    table = pd.concat(parts)
    kept = ~(table.index.isin(known) | table.index.isin(list(found.removed)) | table.index.duplicated())
    return table[kept]


def read_pictures(run: RunFolder, number: int) -> pd.DataFrame:
    """Return the image table of one addition, with label and file: index image_id."""
    from grappa.images.table import image_file

    folder = published(run, pictures(number), "images.parquet", "labels.parquet")
    images = pd.read_parquet(folder / "images.parquet").set_index("image_id")
    manifest = readable_manifest(run, pictures(number))
    assert manifest is not None, "it is published"
    roots = manifest.provenance["roots"]
    files = [image_file(roots[root], path) for root, path in zip(images["root"], images["path"], strict=True)]
    images["file"] = pd.Series(files, index=images.index, dtype=object)
    images["label"] = pd.read_parquet(folder / "labels.parquet").set_index("image_id")["label"]
    return images


def added_vectors(run: RunFolder, added: pd.DataFrame, file: str, width: int) -> NDArray[np.float32]:
    """Return the rows of ``added`` in ``features.npy`` or ``embeddings.npy`` of their additions, (n, width) float32."""
    out = np.empty((len(added), width), dtype=np.float32)
    for number in added["addition"].unique():
        where = np.flatnonzero(added["addition"] == number)
        folder = published(run, vectors(int(number)), file)
        found = np.load(folder / file, mmap_mode="r", allow_pickle=False)
        out[where] = found[added["row"].to_numpy(dtype=np.int64)[where]]
    return out


def added_assignments(run: RunFolder, config: Config, added: pd.DataFrame) -> pd.DataFrame:
    """Return cluster and distance of added images at each granularity, with their index; empty columns without any."""
    parts = [
        pd.read_parquet(published(run, vectors(int(number)), "assignments.parquet") / "assignments.parquet")
        for number in added["addition"].unique()
    ]
    names = [column for name in assigned_granularities(config) for column in (name, f"{name}_distance")]
    if not parts:
        return pd.DataFrame(columns=names, index=added.index)
    return pd.concat(parts).set_index("image_id").loc[added.index, names]
