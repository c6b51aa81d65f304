"""What a run makes of added images: frozen features, embeddings by the deployed model, clusters, and their drift."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from grappa.backbone.features import extract_features
from grappa.backbone.frozen import Backbone
from grappa.core import memory
from grappa.core.devices import resolve_device, resolve_precision, set_num_threads
from grappa.core.vectors import read_rows
from grappa.images.caching.uncached import open_images
from grappa.images.pixels import ImageRows
from grappa.images.splits import train_rows
from grappa.method.head import apply_head
from grappa.model import GrappaModel, load_model
from grappa.model_folder import read_record
from grappa.pipeline.config.schema import Config
from grappa.pipeline.engine.context import num_cores
from grappa.pipeline.engine.live.additions import assigned_granularities, pictures, roots_of_addition
from grappa.pipeline.engine.memory_limit import require_memory
from grappa.pipeline.engine.progress import Progress
from grappa.pipeline.graph.stages import searched_node
from grappa.pipeline.opening import backbone_in, head_in, read_images, shape_of
from grappa.pipeline.store.artifacts import RunFolder, published, readable_manifest, repair_command
from grappa.search.kmeans import assign
from grappa.search.novelty import drift


def write_vectors(run: RunFolder, config: Config, number: int, out: Path, progress: Progress) -> str:
    """Write features.npy, embeddings.npy, assignments.parquet and drift.json of an addition; return the device."""
    set_num_threads(config.compute.num_threads or num_cores())
    folder = published(run, pictures(number))
    _check_size(run, config, number)
    images, cache = read_images(folder), open_images(folder / "pixels", roots_of_addition(run, number))
    device = resolve_device(config.compute.device)
    backbone, model_folder = backbone_in(published(run, "backbone"), config.backbone.module), published(run, "model")
    model, adapted = load_model(model_folder), bool(read_record(model_folder).sets)
    features = _features(config, backbone, cache, device, progress)
    with progress.task("embedding", len(cache)) as (advance, _):
        embeddings = (
            embed_images(
                model,
                cache,
                device=device,
                precision=resolve_precision(config.embeddings.precision, device),
                batch_size=config.compute.inference_batch_size,
                num_workers=config.compute.num_workers or num_cores(),
                progress=advance,
            )
            if adapted
            else apply_head(model.head, features, device=str(device))
        )
    np.save(out / "features.npy", features, allow_pickle=False)
    np.save(out / "embeddings.npy", embeddings, allow_pickle=False)
    placed = _placed(run, config, features, str(device))
    _write_assignments(run, config, images["image_id"], placed, out, str(device))
    (out / "drift.json").write_text(json.dumps(_drift(run, config, placed, str(device)), indent=2) + "\n")
    return str(device)


def _check_size(run: RunFolder, config: Config, number: int) -> None:
    """Refuse images that were decoded at another size than the run's now: their embeddings would be others."""
    manifest = readable_manifest(run, pictures(number))
    assert manifest is not None, "it is published"
    size, wanted = manifest.fingerprint["config"]["images.cache_size"], config.images.cache_size
    if size != wanted:
        raise ValueError(
            f"{pictures(number)} was decoded at images.cache_size {size}, the run has {wanted} now; add its images "
            f"again by `{repair_command(run, pictures(number).name)}`"
        )


def embed_images(
    model: GrappaModel,
    images: ImageRows,
    *,
    device: torch.device | None = None,
    precision: str = "float32",
    batch_size: int = 64,
    num_workers: int = 1,
    progress: Callable[[int], None] | None = None,
) -> NDArray[np.float32]:
    """Return the model's L2-normalised embeddings (N, D) float32 of images at cache size, as the run makes them: the
    backbone in batches and in ``precision``, then the head in float32."""
    device = device or torch.device("cpu")
    out = np.empty((len(images), model.embedding_dim), dtype=np.float32)
    extract_features(
        model.backbone,
        images,
        out,
        adaptation=model.adaptation,
        batch_size=batch_size,
        device=device,
        precision=precision,
        num_workers=num_workers,
        progress=progress,
    )
    return apply_head(model.head, out, device=str(device))


def _features(
    config: Config, backbone: Backbone, cache: ImageRows, device: torch.device, progress: Progress
) -> NDArray[np.float32]:
    """Return the frozen features (N, D) of images, as the stage ``features`` makes them."""
    precision, out = (
        resolve_precision(config.features.precision, device),
        np.empty((len(cache), backbone.embedding_dim), np.float32),
    )
    most = min(config.compute.inference_batch_size, len(cache))
    if device.type == "cpu":
        require_memory("additions", memory.embedding(shape_of(backbone), most, precision))
    with progress.task("extracting features", len(cache)) as (advance, _):
        extract_features(
            backbone,
            cache,
            out,
            batch_size=config.compute.inference_batch_size,
            device=device,
            precision=precision,
            num_workers=config.compute.num_workers or num_cores(),
            progress=advance,
        )
    return out


def _placed(run: RunFolder, config: Config, features: NDArray[np.float32], device: str) -> NDArray[np.float32]:
    """Return frozen features (N, D) where the run seeks clusters and neighbours: whitened, unless it keeps them raw."""
    node = searched_node(config)
    if node.stage == "features":
        return features
    return apply_head(head_in(published(run, node.name, "head.safetensors")), features, device=device)


def _write_assignments(
    run: RunFolder, config: Config, ids: pd.Series, placed: NDArray[np.float32], out: Path, device: str
) -> None:
    """Write the nearest centroid of each image at each granularity: of all, where a run has two levels too."""
    table = pd.DataFrame({"image_id": ids.to_numpy()})
    for name in assigned_granularities(config):
        file = published(run, f"clusters/{name}", "centroids.npy") / "centroids.npy"
        labels, distances = assign(placed, np.load(file, allow_pickle=False), device=device)
        table[name], table[f"{name}_distance"] = labels, distances
    table.to_parquet(out / "assignments.parquet", index=False)


def _drift(run: RunFolder, config: Config, placed: NDArray[np.float32], device: str) -> dict[str, float | bool]:
    """Return how far the images lie from the train images, where the run seeks neighbours."""
    rows = train_rows(read_images(published(run, "images", "images.parquet")))
    known = read_rows(published(run, searched_node(config).name, "features.npy") / "features.npy", rows)
    nearest = published(run, "neighbors", "similarities.npy") / "similarities.npy"
    learned = 1 - np.load(nearest, mmap_mode="r", allow_pickle=False)[rows, 0]
    _, distances = assign(placed, known, device=device)  # the nearest train image, as if each were a centroid
    found = drift(distances, learned)
    return {**found.to_json(), "worth_adapting": found.worth_adapting}
