"""R8 and R16: exact nearest neighbours against faiss-cpu; memory and time of an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from unittest.mock import patch

import faiss
import numpy as np
import torch
from numpy.typing import NDArray
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

from grappa.core.devices import has_bfloat16_products
from grappa.metrics.retrieval import evaluate, evaluate_galleries, ranking_metrics, sampled_queries
from grappa.search import screening
from grappa.search.neighbors import nearest_neighbors
from tests.benchmarks import data
from tests.benchmarks.core import Gate, Options, Pair, seconds
from tests.benchmarks.memory import peak_growth

WIDTH, NUM_NEIGHBORS = 384, 20


@contextmanager
def neighbors(options: Options) -> Iterator[Pair]:
    """By the products that this CPU has: of bfloat16 numbers, if it has these in hardware."""
    with _neighbors(options, "bfloat16" if has_bfloat16_products() else "float32") as pair:
        yield pair


@contextmanager
def float32_neighbors(options: Options) -> Iterator[Pair]:
    """As on a CPU without bfloat16 products."""
    with (
        patch.object(screening, "worthwhile", lambda device, num_columns: False),
        _neighbors(options, "float32") as pair,
    ):
        yield pair


@contextmanager
def _neighbors(options: Options, products: str) -> Iterator[Pair]:
    """A tenth of the rows query all rows (each costs the same); faiss returns the image itself too: one more."""
    features = data.features(options.size(options.num_images, 6_000), WIDTH, options.features)
    ids = np.arange(len(features))
    asked = ids[: len(ids) // 10]
    found: dict[str, NDArray[np.int64]] = {}

    def ours() -> None:
        found["ours"] = nearest_neighbors(
            features[asked], features, num_neighbors=NUM_NEIGHBORS, query_ids=asked, candidate_ids=ids
        )[0]

    def peer() -> None:
        index = faiss.IndexFlatIP(WIDTH)
        index.add(features)
        found["peer"] = index.search(features[asked], NUM_NEIGHBORS + 1)[1]

    def check() -> tuple[bool, str]:
        recall = _recall(features, found["ours"], found["peer"])
        return recall == 1.0, f"recall {recall:.6f}"

    setup = f"faiss {faiss.__version__} IndexFlatIP built each time, one call, {options.threads} threads on both sides"
    where = f"{products} products, {len(asked)} queries, n={len(features)}, d={WIDTH}, K={NUM_NEIGHBORS}"
    yield Pair(seconds(ours, options), seconds(peer, options), f"{setup}; {where}", check, repeats=5, warm_up=False)


def _recall(features: NDArray[np.float32], ours: NDArray[np.int64], peer: NDArray[np.int64]) -> float:
    """Share of our neighbours that are as near as the peer's last one, itself left out (ties may differ in id)."""
    hits = 0
    for row in range(0, len(ours), 97):
        others = peer[row][peer[row] != row][:NUM_NEIGHBORS]
        last = (features[others].astype(np.float64) @ features[row]).min()
        hits += int(((features[ours[row]].astype(np.float64) @ features[row]) >= last - 1e-6).sum())
    return hits / (NUM_NEIGHBORS * len(range(0, len(ours), 97)))


@contextmanager
def evaluation_memory(options: Options) -> Iterator[Pair]:
    """Growth of a fresh process that evaluates a merged gallery, against the whole matrix of similarities."""
    number = options.size(60_000, 3_000)
    setup = f"a float32 matrix of {number} x {number}, computed; a fresh process, above the embeddings it holds"
    ours = partial(peak_growth, evaluate_gallery, number)
    yield Pair(ours, lambda: 4.0 * number * number, setup, repeats=1, warm_up=False)


@contextmanager
def evaluation_time(options: Options) -> Iterator[Pair]:
    """Recall@1 and the mean average precision over the full ranking; the peer ranks with faiss."""
    number = options.size(5_000, 500)
    embeddings, labels = data.features(number, WIDTH, None), np.arange(number) // 20
    ids, domains = np.arange(number, dtype=np.uint64), np.full(number, "one", dtype=object)
    calculator = AccuracyCalculator(
        include=("precision_at_1", "mean_average_precision"), k=number - 1, device=torch.device("cpu")
    )
    found: dict[str, tuple[float, float]] = {}

    def ours() -> None:
        per_query = evaluate(
            embeddings, labels=labels.astype(str).astype(object), domains=domains, ids=ids, gallery="merged"
        )
        found["ours"] = float(per_query["recall_at_1"].mean()), float(per_query["average_precision"].mean())

    def peer() -> None:
        scores = calculator.get_accuracy(embeddings, labels)
        found["peer"] = scores["precision_at_1"], scores["mean_average_precision"]

    def check() -> tuple[bool, str]:
        away = max(abs(a - b) for a, b in zip(found["ours"], found["peer"], strict=True))
        return away < 1e-4, f"recall@1 and mAP {away:.1e} apart"

    setup = f"pytorch-metric-learning AccuracyCalculator over faiss; n={number}, d={WIDTH}, full ranking"
    yield Pair(seconds(ours, options), seconds(peer, options), setup, check, repeats=3, warm_up=False)


@contextmanager
def evaluation_sorted(options: Options) -> Iterator[Pair]:
    """Both galleries of some queries, against a sort of all similarities of each, in a product for each gallery."""
    number = options.size(options.num_images, 3_000)
    embeddings, classes = data.features(number, WIDTH, options.features), np.arange(number) // 20
    domains = np.array([f"domain {each}" for each in classes % 4], dtype=object)
    labels, ids = classes.astype(str).astype(object), np.arange(number, dtype=np.uint64)
    queries = sampled_queries(labels, domains, ids, options.size(1_024, 128))
    found: dict[str, float] = {}

    def ours() -> None:
        tables = evaluate_galleries(
            embeddings, labels=labels, domains=domains, ids=ids, max_queries=len(queries), num_threads=options.threads
        )
        found["ours"] = sum(float(table["average_precision"].sum()) for table in tables.values())

    def peer() -> None:
        found["peer"] = 0.0
        for domain in [None, *sorted(set(domains))]:
            own = np.flatnonzero(domains == domain) if domain else np.arange(number)
            found["peer"] += _by_sorting(embeddings[own], classes[own], np.flatnonzero(np.isin(own, queries)))

    def check() -> tuple[bool, str]:
        away = abs(found["ours"] - found["peer"]) / (2 * len(queries))
        return away < 1e-5, f"mAP {away:.1e} apart"

    setup = f"{len(queries)} queries of {number}, d={WIDTH}, 20 images a class, 4 domains; numpy's sort of 64-bit keys"
    yield Pair(seconds(ours, options), seconds(peer, options), setup, check, repeats=3, warm_up=False)


def _by_sorting(points: NDArray[np.float32], classes: NDArray[np.int64], queries: NDArray[np.int64]) -> float:
    """Return the sum of the average precisions of ``queries``, by the full ranking of each."""
    total, rows = 0.0, max(1, min(256, 2**22 // len(points)))
    for start in range(0, len(queries), rows):
        asked = queries[start : start + rows]
        bits = (points[asked] @ points.T).view(np.uint32)
        falling = np.where(bits >> np.uint32(31) == 1, bits, ~bits & np.uint32(0x7FFFFFFF))
        keys = falling.astype(np.uint64) << np.uint64(32) | np.arange(len(points), dtype=np.uint64)
        keys[np.arange(len(asked)), asked] = np.iinfo(np.uint64).max
        keys.sort(axis=1)
        hits = classes[(keys[:, :-1] & np.uint64(0xFFFFFFFF)).astype(np.int64)] == classes[asked, None]
        total += float(ranking_metrics(*np.nonzero(hits), hits.sum(axis=1))["average_precision"].sum())
    return total


def evaluate_gallery(number: int) -> Callable[[], object]:
    """Return the evaluation of so many images in one gallery."""
    embeddings = data.features(number, WIDTH, None)
    labels = (np.arange(number) // 20).astype(str).astype(object)
    domains, ids = np.full(number, "one", dtype=object), np.arange(number, dtype=np.uint64)
    evaluate(embeddings[:200], labels=labels[:200], domains=domains[:200], ids=ids[:200], gallery="merged")
    return partial(evaluate, embeddings, labels=labels, domains=domains, ids=ids, gallery="merged")


GATES = [
    Gate("R8", "kNN graph / faiss-cpu flat: time", 1.1, neighbors),
    Gate("R8 float32", "the same without bfloat16 products: time", 1.05, float32_neighbors),
    Gate("R16 pml", "the same on 5,000 images / pytorch-metric-learning: time", 1.0, evaluation_time),
    Gate("R16 sort", "both galleries of an evaluation / a full sort of each: time", 0.4, evaluation_sorted),
    Gate("R16", "memory of an evaluation / the full matrix", 0.05, evaluation_memory, unit="bytes"),
]
