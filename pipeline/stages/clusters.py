"""Stage ``clusters``: a partition of the train images for each granularity, of very many clusters in two levels.

Test images get their nearest centroid as train images do: of many clusters, among those of the parts near the image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from grappa.core.vectors import read_rows
from grappa.images.splits import train_rows_by_id
from grappa.pipeline.config.schema import num_clusters_of
from grappa.pipeline.engine.context import StageContext
from grappa.pipeline.graph.stages import clustered_node
from grappa.pipeline.opening import read_images, settle_device
from grappa.search import kmeans, two_levels
from grappa.search.kmeans import Clustering, assign, cluster, cluster_health
from grappa.search.shared_points import most_rows, own_parts, own_rows
from grappa.search.two_levels import assign_in_two_levels, cluster_in_two_levels

Nearest = Callable[[NDArray[np.float32]], tuple[NDArray[np.int64], NDArray[np.float32]]]


def run(context: StageContext) -> str:
    images = read_images(context.input("images"))
    node = clustered_node(context.config)
    file = context.input(node.stage, node.instance) / "features.npy"
    features = np.load(file, mmap_mode="r", allow_pickle=False)
    rows, ids = train_rows_by_id(images)
    num_clusters = num_clusters_of(str(context.instance))
    two = context.config.clusters.in_two_levels(num_clusters)
    memory_needed, clustered = (
        (two_levels.memory_needed, _in_two_levels) if two else (kmeans.memory_needed, _in_one_level)
    )
    context.need_memory(memory_needed(len(rows), features.shape[1], num_clusters, context.team.size))
    own, settings = own_rows(len(rows), context.processes), context.config.clusters
    given = {"num_clusters": num_clusters, "ids": ids, "num_iterations": settings.num_iterations, "seed": settings.seed}
    given |= {"device": str(settle_device(context)), "processes": context.processes}
    found, nearest = clustered(context, read_rows(file, rows[own]), given)
    labels, distances = _all_rows(context, file, rows, found, nearest)
    if not context.leads:
        return ""
    for row, other in copies(images, features):
        labels[row], distances[row] = labels[other], distances[other]
    _write(context, images["image_id"].tolist(), labels, distances)
    np.save(context.path / "centroids.npy", found.centroids, allow_pickle=False)
    return _summary(found, len(rows))


def _in_one_level(context: StageContext, own: NDArray[np.float32], given: dict[str, Any]) -> tuple[Clustering, Nearest]:
    """Return the clusters, and how other images get theirs; given: the arguments of ``cluster``."""
    number, k, num_iterations = len(given["ids"]), given["num_clusters"], given["num_iterations"]
    total = kmeans.num_assignments(number, [k], num_iterations) // number * len(own)
    with context.task("clustering", total, unit="assignments") as advance:
        found = cluster(own, progress=advance, **given)
    return found, partial(assign, centroids=found.centroids, device=given["device"])


def _in_two_levels(
    context: StageContext, own: NDArray[np.float32], given: dict[str, Any]
) -> tuple[Clustering, Nearest]:
    """Return the same of clusters in two levels."""
    number, k, num_iterations = len(given["ids"]), given["num_clusters"], given["num_iterations"]
    total = two_levels.num_assignments(number, k, num_iterations) // number * len(own)
    with context.task("clustering in two levels", total, unit="assignments") as advance:
        found, parts = cluster_in_two_levels(own, progress=advance, **given)
    return found, partial(assign_in_two_levels, centroids=found.centroids, parts=parts, device=given["device"])


def _all_rows(
    context: StageContext, file: Path, rows: NDArray[np.int64], found: Clustering, nearest: Nearest
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return labels and distances of all images in the first process; the images that are in no train row are assigned
    now, each process its parts of them."""
    number = len(np.load(file, mmap_mode="r", allow_pickle=False))
    others = np.setdiff1d(np.arange(number), rows, assume_unique=True)
    parts = [others[part] for part in own_parts(len(others), context.processes)]
    assigned = [nearest(read_rows(file, part)) for part in parts]
    labels, distances = np.empty(number, dtype=np.int64), np.empty(number, dtype=np.float32)
    for place, own, values in (
        (labels, found.pseudo_labels, [one for one, _ in assigned]),
        (distances, found.distances, [one for _, one in assigned]),
    ):
        of_train = _gathered(context, own, len(rows))
        of_others = _gathered(context, np.concatenate([own[:0], *values]), len(others))
        if context.leads:
            place[rows], place[others] = of_train, of_others
    return labels, distances


def _gathered(context: StageContext, own: NDArray[Any], number: int) -> NDArray[Any]:
    """Return the values of all ``number`` rows in the first process; in another process return its own ones."""
    parts = context.processes.gather(torch.from_numpy(own), most_rows(number, context.team.size))
    return torch.cat(parts).numpy() if parts else own


def copies(images: pd.DataFrame, features: NDArray[np.float32]) -> Iterator[tuple[int, int]]:
    """Yield (row, other) for each copy of a file, where ``other`` is the copy whose cluster counts for all.

    This is the first one that is learned from, or else the first one. Copies that have other features (views of other
    boxes) have clusters of their own.
    """
    originals = images["duplicate_of"].where(images["duplicate_of"] != "", images["image_id"])
    shared = images[originals.isin(images["duplicate_of"])]
    for _, group in shared.groupby(originals, sort=False):
        other = min(group.index, key=lambda row: (images["split"][row] == "test", row))
        yield from ((row, other) for row in group.index if np.array_equal(features[row], features[other]))


def _write(
    context: StageContext, image_ids: list[str], labels: NDArray[np.int64], distances: NDArray[np.float32]
) -> None:
    table = pd.DataFrame({"image_id": image_ids, "pseudo_label": labels, "distance": distances})
    table.to_parquet(context.path / "assignments.parquet", index=False)


def _summary(found: Clustering, num_train: int) -> str:
    health = cluster_health(found.sizes)
    return (
        f"{len(found.sizes)} clusters of {num_train} images, mean cosine {found.objective:.3f}, median size "
        f"{health.median_size:g}, {health.num_empty} empty, {health.num_singletons} singletons, largest share "
        f"{health.largest_share:.1%}"
    )
