"""How time and memory of the single steps grow with images, clusters and adaptor sets: measured, fitted, drawn."""

from __future__ import annotations

import csv
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib import pyplot

from grappa.backbone.features import extract_features
from grappa.core import memory
from grappa.core.devices import resolve_precision
from grappa.images.pixels import PixelCache, write_index, write_shard
from grappa.images.transforms import Augmentation
from grappa.method.adaptor_training import AdaptorLoss, new_adaptor_set, train_adaptor_set
from grappa.metrics import retrieval
from grappa.search import kmeans as clustering
from grappa.search import neighbors as neighborhoods
from grappa.search.kmeans import cluster
from grappa.search.neighbors import nearest_neighbors
from grappa.training.batches import Runtime, Views
from grappa.training.loop import Optimization
from grappa.training.targets import Targets
from tests.benchmarks import data
from tests.benchmarks.extraction import CPU
from tests.benchmarks.memory import cost
from tests.benchmarks.retrieval import evaluate_gallery
from tests.benchmarks.scaling.growth import (
    IMAGE_COUNTS,
    Point,
    exponent,
    extrapolated,
    hours,
    measured_at,
    size_of,
    write_table,
)

WIDTH, BOTTLENECK, SIZE = 384, 48, 96
VIT = memory.VitShape(image_size=SIZE, tokens=37, width=192, heads=3, blocks=12, adapted=BOTTLENECK)


@dataclass(frozen=True)
class Curve:
    """One quantity that grows; ``prepare(size)`` returns the work to measure in a fresh process; ``need`` the bytes
    that so many images are said to take."""

    name: str
    what: str
    over: str
    sizes: tuple[int, ...]
    prepare: Callable[[int], Callable[[], object]]
    need: Callable[[int], int] | None = None


def kmeans(number: int, num_clusters: int = 256) -> Callable[[], object]:
    _one_thread()
    features, ids = data.features(number, WIDTH, None), np.arange(number, dtype=np.uint64)
    cluster(features[:600], num_clusters=300, ids=ids[:600], num_iterations=1)  # what is started once is no growth
    return partial(cluster, features, num_clusters=num_clusters, ids=ids, num_iterations=20)


def kmeans_over_k(num_clusters: int) -> Callable[[], object]:
    return kmeans(20_000, num_clusters)


def neighbors(number: int) -> Callable[[], object]:
    _one_thread()
    features, ids = data.features(number, WIDTH, None), np.arange(number)

    def search(part: slice) -> object:
        rows, names = features[part], ids[part]
        return nearest_neighbors(rows, rows, num_neighbors=20, query_ids=names, candidate_ids=names)

    search(slice(600))
    return partial(search, slice(None))


def evaluation(number: int) -> Callable[[], object]:
    _one_thread()
    return evaluate_gallery(number)


def extraction(number: int) -> Callable[[], object]:
    _one_thread()
    backbone, precision = data.backbone(False, "vit_tiny_patch16_224", SIZE), resolve_precision("auto", CPU)
    out = np.empty((number, backbone.embedding_dim), dtype=np.float32)
    extract_features(backbone, _drawn_cache(64), out, precision=precision)
    return partial(extract_features, backbone, _drawn_cache(number), out, precision=precision)


def training(number: int, num_sets: int = 1) -> Callable[[], object]:
    _one_thread()
    backbone = data.backbone(False, "vit_tiny_patch16_224", SIZE)
    views = Views(_drawn_cache(number), np.arange(number, dtype=np.uint64), SIZE, Augmentation(min_crop=0.8))
    proxies = np.random.default_rng(0).normal(size=(16, backbone.embedding_dim)).astype(np.float32)
    once = partial(
        train_adaptor_set,
        backbone,
        views,
        np.arange(number),
        [Targets(np.arange(number) % 16, proxies)],
        name="k00016",
        start=new_adaptor_set(backbone, BOTTLENECK, name="k00016", seed=0),
        adaptor_loss=AdaptorLoss(),
        proxy_learning_rate=0.01,
        optimization=Optimization(num_epochs=1, batch_size=32, learning_rate=1e-3, weight_decay=0.0, warmup=0.1),
        seed=0,
        run=Runtime(CPU, "float32"),
    )
    return lambda: [once() for _ in range(num_sets)]


def training_over_sets(num_sets: int) -> Callable[[], object]:
    return training(128, num_sets)


CURVES = (
    Curve(
        "extraction",
        "embedding, ViT-Tiny at 96 px",
        "images",
        (128, 256, 512, 1024),
        extraction,
        lambda number: memory.embedding(VIT, 64, "bfloat16"),
    ),
    Curve(
        "kmeans",
        "k-means, k = 256, d = 384",
        "images",
        (8_000, 16_000, 32_000, 64_000),
        kmeans,
        lambda number: clustering.memory_needed(number, WIDTH, 256),
    ),
    Curve("kmeans-k", "k-means of 20,000 images, d = 384", "clusters", (256, 512, 1024, 2048), kmeans_over_k),
    Curve(
        "neighbors",
        "20 nearest neighbours, d = 384",
        "images",
        (8_000, 16_000, 32_000, 64_000),
        neighbors,
        lambda number: neighborhoods.memory_needed(number, number, WIDTH, 20),
    ),
    Curve(
        "training",
        "an epoch of one adaptor set",
        "images",
        (128, 256, 512, 1024),
        training,
        lambda number: memory.training(VIT, 32, "float32", 16),
    ),
    Curve("training-sets", "an epoch of 128 images", "adaptor sets", (1, 2, 4, 8), training_over_sets),
    Curve(
        "evaluation",
        "evaluation, merged gallery, d = 384",
        "images",
        (2_000, 4_000, 8_000, 16_000),
        evaluation,
        lambda number: retrieval.memory_needed(number, WIDTH),
    ),
)


def measure_curves(names: Sequence[str], out: Path) -> None:
    """Measure the curves of these names, and write scaling.csv, scaling.svg and scaling.md."""
    measured: dict[Curve, list[Point]] = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TMPDIR"] = folder  # of the fresh processes
        for curve in CURVES:
            if curve.name in names:
                measured[curve] = [_point(curve, size) for size in curve.sizes]
                print(f"{curve.name}: time ~ {curve.over}^{exponent(measured[curve]):.2f}", flush=True)
    _write(out, measured)


def _point(curve: Curve, size: int) -> Point:
    found = Point(size, *cost(curve.prepare, size))
    print(f"{curve.name}: {size} {curve.over}, {found.seconds:.2f} s, {found.memory / 2**20:.0f} MB", flush=True)
    return found


def _write(folder: Path, measured: dict[Curve, list[Point]]) -> None:
    """Write the three files."""
    with (folder / "scaling.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["curve", "over", "size", "cpu_seconds", "peak_bytes"])
        table.writerows(
            (curve.name, curve.over, p.size, p.seconds, p.memory) for curve, points in measured.items() for p in points
        )
    write_table(folder / "scaling.md", _table(measured))
    _draw(folder / "scaling.svg", measured)


def _table(measured: dict[Curve, list[Point]]) -> list[list[str]]:
    lines = []
    for curve, points in measured.items():
        far = [_far(curve, points, number) for number in IMAGE_COUNTS]
        peak = f"{points[-1].memory / 2**20:.0f} MB"
        lines.append([curve.what, curve.over, measured_at(points), f"{exponent(points):.2f}", peak, *far])
    return lines


def _far(curve: Curve, points: list[Point], number: int) -> str:
    if curve.need is None:
        return ""
    return f"{hours(extrapolated(points, number))}, {size_of(curve.need(number))}"


def _draw(file: Path, measured: dict[Curve, list[Point]]) -> None:
    matplotlib.use("svg")
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for curve, points in measured.items():
        label = f"{curve.name}, exponent {exponent(points):.2f}"
        axes.loglog([p.size for p in points], [p.seconds for p in points], marker="o", label=label)
    axes.set_xlabel("images (clusters, adaptor sets)")
    axes.set_ylabel("CPU seconds, one thread")
    axes.legend(fontsize=8)
    figure.savefig(file)


def _one_thread() -> None:
    torch.set_num_threads(1)


def _drawn_cache(number: int) -> PixelCache:
    """Write a pixel cache of random images and open it."""
    folder = Path(tempfile.mkdtemp())
    random = np.random.default_rng(0)
    images = [random.integers(0, 256, (SIZE, SIZE + 12, 3), dtype=np.uint8) for _ in range(number)]
    write_index(folder, write_shard(folder, 0, images))
    return PixelCache.open(folder)
