"""R5 to R7: k-means at one k and at several, against faiss-cpu, and its peak memory."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import faiss
import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.cluster import KMeans

from grappa.core.vectors import read_rows
from grappa.search.kmeans import cluster, cluster_many
from tests.benchmarks import data
from tests.benchmarks.core import Gate, Options, Pair, seconds
from tests.benchmarks.memory import peak_growth

WIDTH, NUM_ITERATIONS = 384, 20
NUM_CLUSTERS = [64, 128, 256, 512, 1024, 2048, 4096, 8192]
ALLOWANCE = 256 * 2**20
MAX_LOSS = 0.002
SMALL = 128
PRODUCTS = {False: "", True: "; without products in bfloat16 (GRAPPA_BFLOAT16=0)"}


def products(forced: bool) -> AbstractContextManager[object]:
    """Return a context in which k-means computes, if ``forced``, as on a CPU without bfloat16 products."""
    return patch.dict(os.environ, {"GRAPPA_BFLOAT16": "0"} if forced else {})


@contextmanager
def against_faiss(options: Options, *, num_clusters: int | None = None, forced: bool = False) -> Iterator[Pair]:
    """The largest k, or a given one, the same number of Lloyd iterations on both sides, every point used by both."""
    features, ids, sizes = _problem(options)
    number, found = num_clusters or sizes[-1], dict[str, NDArray[np.float32]]()

    def ours() -> None:
        with products(forced):
            result = cluster(features, num_clusters=number, ids=ids, num_iterations=NUM_ITERATIONS)
        found["ours"] = result.centroids

    def peer() -> None:
        found["peer"] = _faiss_centroids(features, number)

    setup = f"faiss {faiss.__version__} Kmeans, spherical, niter={NUM_ITERATIONS}, no sub-sampling, its random start"
    where = f"n={len(features)}, d={WIDTH}, k={number}, {options.threads} threads on both sides{PRODUCTS[forced]}"

    def check() -> tuple[bool, str]:
        more = _inertia(features, found["ours"]) / _inertia(features, found["peer"]) - 1.0
        return more <= MAX_LOSS, f"inertia {more:+.2%} of faiss's"

    yield Pair(seconds(ours, options), seconds(peer, options), f"{setup}; {where}", check, repeats=3, warm_up=False)


@contextmanager
def all_at_once(options: Options, *, forced: bool = False) -> Iterator[Pair]:
    """All values of k in one call against the largest alone."""
    features, ids, sizes = _problem(options)

    def run(chosen: Sequence[int]) -> Callable[[], None]:
        def work() -> None:
            with products(forced):
                cluster_many(features, chosen, ids=ids, num_iterations=NUM_ITERATIONS)

        return work

    setup = f"k = {', '.join(map(str, sizes))} against k = {sizes[-1]} alone; n={len(features)}, d={WIDTH}"
    sides = seconds(run(sizes), options), seconds(run(sizes[-1:]), options)
    yield Pair(*sides, setup + PRODUCTS[forced], repeats=3, warm_up=False)


@contextmanager
def memory(options: Options) -> Iterator[Pair]:
    """Growth of a fresh process that reads the features as the stage does and clusters them, against what must be held
    anyway."""
    features, _, sizes = _problem(options)
    allowed = float(features.nbytes + sizes[-1] * WIDTH * 4 + ALLOWANCE)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "features.npy"
        np.save(file, features, allow_pickle=False)
        setup = f"features + centroids + 256 MB; a fresh process, above what it held before, k = {sizes[-1]}"
        ours = partial(peak_growth, _load_and_cluster, file, sizes[-1], options.threads)
        yield Pair(ours, lambda: allowed, setup, repeats=2, warm_up=False)


def _load_and_cluster(file: Path, num_clusters: int, threads: int) -> Callable[[], object]:
    """Return the work, everything imported and every library started."""
    torch.set_num_threads(threads)
    small = np.eye(600, dtype=np.float32)
    cluster(small, num_clusters=300, ids=np.arange(600, dtype=np.uint64), num_iterations=1)

    def run() -> object:
        number = len(np.load(file, mmap_mode="r", allow_pickle=False))
        rows = np.random.default_rng(1).permutation(number)
        ids = np.arange(number, dtype=np.uint64)
        return cluster(read_rows(file, rows), num_clusters=num_clusters, ids=ids, num_iterations=2)

    return run


@contextmanager
def against_sklearn(options: Options) -> Iterator[Pair]:
    """Fewer images and clusters than against faiss: scikit-learn takes long."""
    features, ids, _ = _problem(replace(options, num_images=min(options.num_images, 20_000)))
    number, found = 512 if not options.quick else 64, dict[str, NDArray[np.float32]]()

    def ours() -> None:
        found["ours"] = cluster(features, num_clusters=number, ids=ids, num_iterations=NUM_ITERATIONS).centroids

    def peer() -> None:
        kmeans = KMeans(number, init="random", n_init=1, max_iter=NUM_ITERATIONS, tol=0.0, random_state=1)
        centers = kmeans.fit(features).cluster_centers_
        found["peer"] = (centers / np.linalg.norm(centers, axis=1, keepdims=True)).astype(np.float32)

    def check() -> tuple[bool, str]:
        more = _inertia(features, found["ours"]) / _inertia(features, found["peer"]) - 1.0
        return more <= MAX_LOSS, f"inertia {more:+.2%} of scikit-learn's, its centroids normalised"

    setup = f"scikit-learn KMeans, Lloyd, its random start, at most {NUM_ITERATIONS} iterations"
    where = f"n={len(features)}, d={WIDTH}, k={number}, {options.threads} threads on both sides"
    yield Pair(seconds(ours, options), seconds(peer, options), f"{setup}; {where}", check, repeats=3, warm_up=False)


def _problem(options: Options) -> tuple[NDArray[np.float32], NDArray[np.uint64], list[int]]:
    features = data.features(options.size(options.num_images, 4_000), WIDTH, options.features)
    ids = np.random.default_rng(1).permutation(len(features)).astype(np.uint64)
    return features, ids, [k for k in NUM_CLUSTERS if k <= len(features) // 12]


def _faiss_centroids(features: NDArray[np.float32], num_clusters: int) -> NDArray[np.float32]:
    kmeans: Any = faiss.Kmeans(
        WIDTH,
        num_clusters,
        niter=NUM_ITERATIONS,
        spherical=True,
        max_points_per_centroid=len(features),
        min_points_per_centroid=1,
        seed=1,
    )
    kmeans.train(features)
    centroids: NDArray[np.float32] = kmeans.centroids
    return centroids


def _inertia(features: NDArray[np.float32], centroids: NDArray[np.float32]) -> float:
    """Sum of squared distances to the nearest centroid, by faiss for both sides."""
    index = faiss.IndexFlatL2(WIDTH)
    index.add(np.ascontiguousarray(centroids))
    return float(index.search(features, 1)[0].astype(np.float64).sum())


GATES = [
    Gate("R5", "exact k-means / faiss-cpu: time", 1.0, against_faiss),
    Gate("R5 float32", "the same without bfloat16: time", 1.0, partial(against_faiss, forced=True)),
    Gate("R5 small", "the same at k = 128: time", 1.0, partial(against_faiss, num_clusters=SMALL, forced=True)),
    Gate("R5 sklearn", "the same at k = 512 / scikit-learn: time", 1.0, against_sklearn),
    Gate("R6", "all k's in one go / the largest alone: time", 2.2, all_at_once),
    Gate("R6 float32", "the same without bfloat16: time", 2.2, partial(all_at_once, forced=True)),
    Gate("R7", "peak memory of clustering / (features + centroids + 256 MB)", 1.2, memory, unit="bytes"),
]
