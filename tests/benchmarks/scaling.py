"""How time and memory grow with images, clusters and adaptor sets: measured, fitted, drawn, extrapolated.

    python -m tests.benchmarks.scaling [--only neighbors] [--out FOLDER]

Each point is a fresh process with one thread, of which the CPU time is counted: a busy machine changes little. Written
are scaling.csv (measured), scaling.svg and scaling.md: the fitted exponents, and what 10^6 to 10^8 images would take by
them: hours of one core of this CPU, and memory as the steps state it (both computed, not measured).

    python -m tests.benchmarks.scaling --runs RUN RUN [--out FOLDER]

takes run folders of different sizes, made by `grappa init`, through every stage that is missing, and adds what each
took to stages.csv (CPU seconds with all threads; memory with and without mapped files; disk). stages.md has lines for
the same table. Interrupted, the same command goes on with the next stage.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import linear_regression
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib import pyplot
from pyarrow import parquet

from grappa.backbone.features import extract_features
from grappa.core import memory
from grappa.core.devices import resolve_precision
from grappa.images.pixels import PixelCache, write_index, write_shard
from grappa.images.transforms import Augmentation
from grappa.method.adaptor_training import AdaptorLoss, new_adaptor_set, train_adaptor_set
from grappa.metrics import retrieval
from grappa.pipeline.engine.execution import Selection, run_stages
from grappa.pipeline.engine.progress import Progress
from grappa.pipeline.engine.status import read_config
from grappa.pipeline.graph.node import Node
from grappa.pipeline.graph.stages import nodes
from grappa.pipeline.store.artifacts import RunFolder
from grappa.search import kmeans as clustering
from grappa.search import neighbors as neighborhoods
from grappa.search.kmeans import cluster
from grappa.search.neighbors import nearest_neighbors
from grappa.training.batches import Runtime, Views
from grappa.training.loop import Optimization
from grappa.training.targets import Targets
from tests.benchmarks import data
from tests.benchmarks.extraction import CPU
from tests.benchmarks.memory import cost, measured
from tests.benchmarks.retrieval import evaluate_gallery

STAGES_FILE = "stages.csv"
STAGE_NUMBERS = ("images", "cpu_seconds", "wall_seconds", "peak_mb", "own_mb", "disk_mb")
IMAGE_COUNTS = (10**6, 10**7, 10**8)
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


@dataclass(frozen=True)
class Point:
    """CPU seconds and bytes at one size."""

    size: int
    seconds: float
    memory: float


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


def main(arguments: list[str] | None = None) -> None:
    """Measure, fit, draw and extrapolate what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [curve.name for curve in CURVES]
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--runs", nargs="+", type=Path, help="run folders to take through their stages")
    parser.add_argument("--out", type=Path, default=Path("runs/scaling"), help="default: runs/scaling")
    given = parser.parse_args(arguments)
    os.environ["OMP_NUM_THREADS"] = "1"
    if given.runs:
        measure_runs(given.runs, given.out)
        return
    measured: dict[Curve, list[Point]] = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TMPDIR"] = folder  # of the fresh processes
        for curve in CURVES:
            if curve.name in given.only:
                measured[curve] = [_point(curve, size) for size in curve.sizes]
                print(f"{curve.name}: time ~ {curve.over}^{exponent(measured[curve]):.2f}", flush=True)
    given.out.mkdir(parents=True, exist_ok=True)
    write(given.out, measured)
    print(f"written to {given.out}: scaling.csv, scaling.svg, scaling.md")


def measure_runs(folders: list[Path], out: Path) -> None:
    """Take runs through their stages, add what each took to stages.csv, and write stages.md."""
    out.mkdir(parents=True, exist_ok=True)
    for folder in folders:
        run = RunFolder.open(folder, writable=True)
        for node in nodes(read_config(run)):
            if run.artifact(node).manifest() is None:
                _add_row(out / STAGES_FILE, _measured_stage(run, node))
    with (out / STAGES_FILE).open(newline="") as file:
        rows = [{**row, **{name: float(row[name]) for name in STAGE_NUMBERS}} for row in csv.DictReader(file)]
    _write_table(out / "stages.md", stage_table(rows))


def _measured_stage(run: RunFolder, node: Node) -> dict[str, object]:
    config, selection = read_config(run), Selection(node.stage, node.instance)
    found = measured(lambda: run_stages(run, config, selection, progress=Progress(), say=print))
    disk = sum(file.stat().st_size for file in run.artifact(node).home.rglob("*") if file.is_file())
    images = parquet.read_metadata(run.artifact("sources").home / "sources.parquet").num_rows
    row = {"run": run.root.name, "images": images, "stage": node.stage, "instance": node.instance or ""}
    row |= {"cpu_seconds": round(found.cpu_seconds, 1), "wall_seconds": round(found.wall_seconds, 1)}
    row |= {"peak_mb": found.peak_bytes >> 20, "own_mb": found.own_bytes >> 20, "disk_mb": round(disk / 2**20, 1)}
    print(*row.values(), flush=True)
    return row


def _add_row(file: Path, row: dict[str, object]) -> None:
    new = not file.exists()
    with file.open("a", newline="") as opened:
        table = csv.DictWriter(opened, list(row))
        if new:
            table.writeheader()
        table.writerow(row)


def stage_table(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Return the lines of the table for the stages of runs, all instances of a stage together: CPU seconds at the
    smallest and the largest size, the exponent between the two largest, largest memory without files (of the whole
    process, in which earlier stages ran) and bytes on disk, and the CPU hours of the far sizes; by the number of images
    where a stage was measured at one size.
    """
    found = []
    for stage in dict.fromkeys(row["stage"] for row in rows):
        points = [
            _stage_point(rows, stage, size) for size in sorted({r["images"] for r in rows if r["stage"] == stage})
        ]
        disk = sum(row["disk_mb"] for row in rows if (row["stage"], row["images"]) == (stage, points[-1].size))
        peak = f"{points[-1].memory / 2**20:,.0f} MB; {disk * 2**20 / points[-1].size:,.0f} B an image on disk"
        power = f"{exponent(points[-2:]):.2f}" if len(points) > 1 else "1, assumed"
        far = [_far_stage(points, number) for number in IMAGE_COUNTS]
        found.append([f"stage `{stage}`", "images", _measured_at(points), power, peak, *far])
    return found


def _stage_point(rows: list[dict[str, Any]], stage: str, size: float) -> Point:
    own = [row for row in rows if (row["images"], row["stage"]) == (size, stage)]
    seconds, memory = sum(row["cpu_seconds"] for row in own), max(row["own_mb"] for row in own)
    return Point(int(size), max(seconds, 0.1), memory * 2**20)


def _far_stage(points: list[Point], number: int) -> str:
    power, last = exponent(points[-2:]) if len(points) > 1 else 1.0, points[-1]
    return _hours(last.seconds * (number / last.size) ** power)


def _measured_at(points: list[Point]) -> str:
    ends = dict.fromkeys((points[0], points[-1]))
    return " ... ".join(f"{point.size:,} in {point.seconds:.2f} s" for point in ends)


def _point(curve: Curve, size: int) -> Point:
    found = Point(size, *cost(curve.prepare, size))
    print(f"{curve.name}: {size} {curve.over}, {found.seconds:.2f} s, {found.memory / 2**20:.0f} MB", flush=True)
    return found


def exponent(points: list[Point]) -> float:
    """Return the slope of the least-squares line through the logarithms of size and seconds."""
    return linear_regression([math.log(p.size) for p in points], [math.log(p.seconds) for p in points]).slope


def extrapolated(points: list[Point], size: int) -> float:
    """Return the seconds at ``size`` by the fitted exponent, from the largest size measured."""
    last = points[-1]
    return last.seconds * (size / last.size) ** exponent(points)


def write(folder: Path, measured: dict[Curve, list[Point]]) -> None:
    """Write the three files."""
    with (folder / "scaling.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["curve", "over", "size", "cpu_seconds", "peak_bytes"])
        table.writerows(
            (curve.name, curve.over, p.size, p.seconds, p.memory) for curve, points in measured.items() for p in points
        )
    _write_table(folder / "scaling.md", _table(measured))
    _draw(folder / "scaling.svg", measured)


def _table(measured: dict[Curve, list[Point]]) -> list[list[str]]:
    lines = []
    for curve, points in measured.items():
        far = [_far(curve, points, number) for number in IMAGE_COUNTS]
        peak = f"{points[-1].memory / 2**20:.0f} MB"
        lines.append([curve.what, curve.over, _measured_at(points), f"{exponent(points):.2f}", peak, *far])
    return lines


def _write_table(file: Path, lines: list[list[str]]) -> None:
    header = ["step", "over", "measured", "exponent", "peak", *(f"10^{len(str(n)) - 1}" for n in IMAGE_COUNTS)]
    rows = [f"| {' | '.join(header)} |", "|" + "---|" * len(header), *(f"| {' | '.join(line)} |" for line in lines)]
    file.write_text("\n".join(rows) + "\n")


def _far(curve: Curve, points: list[Point], number: int) -> str:
    if curve.need is None:
        return ""
    return f"{_hours(extrapolated(points, number))}, {_size(curve.need(number))}"


def _size(number: float) -> str:
    return f"{number / 1e9:,.1f} GB" if number < 1e11 else f"{number / 1e9:,.0f} GB"


def _hours(seconds: float) -> str:
    hours = seconds / 3600
    return f"{hours:.1f} h" if hours < 100 else f"{hours / 24:,.0f} days"


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


if __name__ == "__main__":
    main()
