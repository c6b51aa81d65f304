"""Stage ``evaluation``: retrieval metrics of every model on the test rows, per domain and over the merged gallery.

``clusters.csv`` says how well the clusters agree with the labels of the train rows, which were clustered.

``reciprocity`` (``grappa.metrics.indicators``) reads no label; where no test image has a label, it is the only metric.

With ``evaluation.max_queries`` a sample of the test images queries all of them, and ``metrics.csv`` has two more
columns: ``num_possible_queries``, of which ``num_queries`` were drawn, and ``num_reciprocity_images``, over which the
mean reciprocity is.

Adapted models are evaluated with their embedding head. ``zero_shot_head`` is the frozen backbone with a head (a free
competitor, as ``zero_shot_whitened`` is), ``fused_raw`` the fused model without its head.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from grappa.core.names import GALLERIES, MEAN
from grappa.core.randomness import id_numbers, key
from grappa.images.splits import test_rows, train_rows
from grappa.metrics.clustering import COLUMNS, cluster_metrics
from grappa.metrics.indicators import NUM_NEIGHBORS, reciprocity_table
from grappa.metrics.retrieval import (
    SUMMARY_COLUMNS,
    evaluate_galleries,
    memory_needed,
    oracle,
    sampled_queries,
    summarize,
    with_positives,
)
from grappa.metrics.samples import even_sample
from grappa.pipeline.config.schema import Config
from grappa.pipeline.engine.context import StageContext
from grappa.pipeline.graph.models import FREE, deployed_model, evaluated_models
from grappa.pipeline.graph.node import Node
from grappa.pipeline.opening import read_images, settle_device
from grappa.pipeline.store.csv_cells import csv_bytes

AUTOMATIC_QUERIES = 10_000
MIN_RECIPROCITY_IMAGES = 1000


def run(context: StageContext) -> str:
    images, device = read_images(context.input("images")), str(settle_device(context))
    labels = pd.read_parquet(context.input("images") / "labels.parquet")["label"]
    rows, transductive = test_rows(images)
    tested, known = images.iloc[rows], labels.iloc[rows]
    num_labeled = int(known.notna().sum())
    per_query = _evaluate_all(context, tested, known, rows, device) if num_labeled else _nothing()
    metrics = _with_sizes(context, _metrics(per_query, _reciprocity(context, tested, rows, device)), tested, known)
    per_query.to_parquet(context.path / "per_query.parquet", index=False)
    (context.path / "metrics.csv").write_bytes(csv_bytes(metrics))
    (context.path / "clusters.csv").write_bytes(csv_bytes(_clusters(context, images, labels)))
    if not num_labeled:
        return "no test image has a label: only the reciprocity of neighbours is known (model and index are complete)"
    where = "transductive: no image is split, all rows are both" if transductive else "test rows"
    return f"{_headline(metrics, _deployed(context.config))} ({where}, {num_labeled} of {len(rows)} labeled)"


def _most_queries(config: Config) -> int | None:
    asked = config.evaluation.max_queries
    return AUTOMATIC_QUERIES if asked == "auto" else asked


def _evaluate_all(
    context: StageContext, images: pd.DataFrame, labels: pd.Series, rows: NDArray[np.int64], device: str
) -> pd.DataFrame:
    nodes, settings = evaluated_models(context.config), context.config.evaluation
    names, known, domains = images["image_id"].to_numpy(), labels.to_numpy(), images["domain"].to_numpy()
    ids, most = id_numbers(names.tolist()), _most_queries(context.config)
    width = max(_embeddings(context, node).shape[1] for node in nodes.values())
    asked = len(sampled_queries(known, domains, ids, most, seed=settings.seed))
    context.need_memory(memory_needed(len(rows), width, len(nodes), num_queries=asked, num_threads=context.num_threads))
    parts = []
    with context.task("evaluating", len(nodes) * asked, unit="queries") as advance:
        for name, node in nodes.items():
            tables = evaluate_galleries(
                np.asarray(_embeddings(context, node)[rows]),
                labels=known,
                domains=domains,
                ids=ids,
                seed=settings.seed,
                max_queries=most,
                device=device,
                num_threads=context.num_threads,
                progress=advance,
            )
            for gallery, table in tables.items():
                table.insert(0, "image_id", names[table.pop("row").to_numpy()])
                parts.append(table.assign(model=name, gallery=gallery))
    per_query = pd.concat(parts, ignore_index=True)
    if context.config.model.source == "single":
        return per_query
    return pd.concat([per_query, oracle(per_query, list(context.config.granularities))], ignore_index=True)


def _embeddings(context: StageContext, node: Node) -> NDArray[np.float32]:
    mapped: NDArray[np.float32] = np.load(
        context.input(node.stage, node.instance) / "embeddings.npy", mmap_mode="r", allow_pickle=False
    )
    return mapped


def _nothing() -> pd.DataFrame:
    return pd.DataFrame(
        {"image_id": pd.Series(dtype=str), "model": pd.Series(dtype=str), "gallery": pd.Series(dtype=str)}
    )


def _reciprocity(context: StageContext, images: pd.DataFrame, rows: NDArray[np.int64], device: str) -> pd.DataFrame:
    """Return model, domain, gallery and reciprocity of every model except the oracle; no label is read."""
    nodes, domains = evaluated_models(context.config), images["domain"].to_numpy()
    sample, parts = _reciprocity_sample(context.config, images), []
    with context.task("reciprocity", len(nodes) * len(GALLERIES), unit="tables") as advance:
        for name, node in nodes.items():
            chosen = np.asarray(_embeddings(context, node)[rows])
            for gallery in GALLERIES:
                found = reciprocity_table(chosen, domains, gallery=gallery, rows=sample, device=device)
                parts.append(found.assign(model=name, gallery=gallery))
                advance(1)
    return pd.concat(parts, ignore_index=True)[["model", "domain", "gallery", "reciprocity"]]


def _reciprocity_sample(config: Config, images: pd.DataFrame) -> NDArray[np.int64]:
    """Return the images whose reciprocity is computed: all, or of more than ``max_queries`` so many that they and their
    neighbours, whose neighbours are sought too, are no more than these; at least 1,000, or ``max_queries`` if less."""
    most = _most_queries(config)
    if most is None or len(images) <= most:
        return np.arange(len(images))
    number = min(most, max(MIN_RECIPROCITY_IMAGES, most // (NUM_NEIGHBORS + 1)))
    drawn = key(config.evaluation.seed, "reciprocity")
    return even_sample(images["domain"].to_numpy(), id_numbers(images["image_id"].tolist()), number, seed=drawn)


def _metrics(per_query: pd.DataFrame, reciprocity: pd.DataFrame) -> pd.DataFrame:
    keys = ["model", "domain", "gallery"]
    metrics = summarize(per_query)
    known = metrics if len(metrics) else reciprocity[keys].reindex(columns=SUMMARY_COLUMNS).assign(num_queries=0)
    return known.merge(reciprocity, how="left", on=keys, validate="one_to_one")


def _with_sizes(context: StageContext, metrics: pd.DataFrame, images: pd.DataFrame, labels: pd.Series) -> pd.DataFrame:
    """Add how many images could query, how many there are, and of how many the reciprocity is known, where a sample is
    allowed."""
    if _most_queries(context.config) is None:
        return metrics
    domains = images["domain"].to_numpy()
    rows = {
        "num_possible_queries": with_positives(labels.to_numpy(), domains),
        "num_images": np.arange(len(images)),
        "num_reciprocity_images": _reciprocity_sample(context.config, images),
    }
    for name, chosen in rows.items():
        counts = {**pd.Series(domains[chosen]).value_counts(), MEAN: len(chosen)}
        metrics[name] = metrics["domain"].map(counts).fillna(0).astype(np.int64)
    return metrics


def _deployed(config: Config) -> str:
    """Return the model that the sentence names beside others: where the verdict chooses, its choice is told there."""
    return "student" if config.model.source == "auto" else deployed_model(config)


def _clusters(context: StageContext, images: pd.DataFrame, labels: pd.Series) -> pd.DataFrame:
    """Return the agreement of clusters and labels on the train rows, by granularity; no row where there are none."""
    names, rows = context.config.granularities, train_rows(images)
    columns = ["granularity", *COLUMNS]
    if not names:
        return pd.DataFrame(columns=columns)
    classes, domains, parts = labels.to_numpy(dtype=object)[rows], images["domain"].to_numpy()[rows], []
    with context.task("clusters", len(names), unit="granularities") as advance:
        for name in names:
            file = context.input("clusters", name) / "assignments.parquet"
            pseudo_labels = pd.read_parquet(file, columns=["pseudo_label"])["pseudo_label"].to_numpy()[rows]
            found = cluster_metrics(pseudo_labels, labels=classes, domains=domains)
            parts.append(found.assign(granularity=name))
            advance(1)
    return pd.concat(parts, ignore_index=True)[columns]


def _headline(metrics: pd.DataFrame, deployed: str) -> str:
    means = metrics[(metrics["domain"] == MEAN) & (metrics["gallery"] == "domain")].set_index("model")["map"]
    free = max(means[name] for name in FREE if name in means)
    ours = (name for name in ("mean", "fused", deployed) if name in means)
    found = ", ".join(f"{means[name]:.3f} {name}" for name in dict.fromkeys(ours))
    return f"mean mAP {means['zero_shot']:.3f} zero_shot, {free:.3f} the best free competitor, {found}"
