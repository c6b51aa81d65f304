"""Stage ``retrieval``: the queries of one model on the test rows; stage ``evaluation``: the metrics of all models.

``run_on_model`` is the stage ``retrieval``: for one model a row for each query, per domain and over the merged
gallery, and its ``reciprocity`` (``grappa.metrics.indicators``), which reads no label. ``run`` joins the tables of all
models, adds the oracle, and averages; where no test image has a label, reciprocity is the only metric.

``clusters.csv`` says how well the clusters agree with the labels of the train rows, which were clustered.

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
    memory_of_tables,
    oracle,
    sampled_queries,
    summarize,
    with_positives,
)
from grappa.metrics.samples import even_sample
from grappa.pipeline.config.schema import Config
from grappa.pipeline.engine.context import StageContext
from grappa.pipeline.graph.models import FREE, deployed_model, evaluated_models
from grappa.pipeline.opening import read_images, settle_device
from grappa.pipeline.store.csv_cells import csv_bytes

AUTOMATIC_QUERIES = 10_000
MIN_RECIPROCITY_IMAGES = 1000
NO_LABEL = "no test image has a label: only the reciprocity of neighbours is known"


def run_on_model(context: StageContext) -> str:
    images, labels = read_images(context.input("images")), _read_labels(context)
    rows, _ = test_rows(images)
    tested, known = images.iloc[rows], labels.iloc[rows]
    embeddings, num_queries = _embeddings(context), _num_queries(context.config, tested, known)
    width, threads = embeddings.shape[1], context.num_threads
    context.need_memory(memory_needed(len(rows), width, num_queries=num_queries, num_threads=threads))
    chosen, device = np.asarray(embeddings[rows]), str(settle_device(context))
    per_query = _per_query(context, chosen, tested, known, num_queries, device)
    # The image table has ids and domains: the join puts them back, and the same texts are not kept for every model.
    per_query = per_query.assign(row=rows[per_query["row"].to_numpy(dtype=np.int64)]).drop(columns="domain")
    per_query.to_parquet(context.path / "per_query.parquet", index=False, compression="zstd")
    _reciprocity(context, chosen, tested, device).to_parquet(context.path / "reciprocity.parquet", index=False)
    return f"{num_queries} queries among {int(known.notna().sum())} labeled test images" if num_queries else NO_LABEL


def run(context: StageContext) -> str:
    images, labels = read_images(context.input("images")), _read_labels(context)
    rows, transductive = test_rows(images)
    tested, known = images.iloc[rows], labels.iloc[rows]
    num_labeled, num_models = int(known.notna().sum()), len(evaluated_models(context.config))
    context.need_memory(memory_of_tables(_num_queries(context.config, tested, known), num_models))
    per_query = _all_queries(context, images) if num_labeled else _nothing()
    metrics = _with_sizes(context, _metrics(per_query, _all_reciprocities(context)), tested, known)
    per_query.to_parquet(context.path / "per_query.parquet", index=False)
    (context.path / "metrics.csv").write_bytes(csv_bytes(metrics))
    (context.path / "clusters.csv").write_bytes(csv_bytes(_clusters(context, images, labels)))
    if not num_labeled:
        return f"{NO_LABEL} (model and index are complete)"
    where = "transductive: no image is split, all rows are both" if transductive else "test rows"
    return f"{_headline(metrics, _deployed(context.config))} ({where}, {num_labeled} of {len(rows)} labeled)"


def _read_labels(context: StageContext) -> pd.Series:
    return pd.read_parquet(context.input("images") / "labels.parquet")["label"]


def _most_queries(config: Config) -> int | None:
    asked = config.evaluation.max_queries
    return AUTOMATIC_QUERIES if asked == "auto" else asked


def _num_queries(config: Config, images: pd.DataFrame, labels: pd.Series) -> int:
    ids, domains = id_numbers(images["image_id"].tolist()), images["domain"].to_numpy()
    most, seed = _most_queries(config), config.evaluation.seed
    return len(sampled_queries(labels.to_numpy(), domains, ids, most, seed=seed))


def _embeddings(context: StageContext) -> NDArray[np.float32]:
    """Return the final embeddings of the model that is evaluated, of all images, mapped."""
    node = evaluated_models(context.config)[str(context.instance)]
    mapped: NDArray[np.float32] = np.load(
        context.input(node.stage, node.instance) / "embeddings.npy", mmap_mode="r", allow_pickle=False
    )
    return mapped


def _per_query(
    context: StageContext,
    embeddings: NDArray[np.float32],
    images: pd.DataFrame,
    labels: pd.Series,
    num_queries: int,
    device: str,
) -> pd.DataFrame:
    """Return the queries of one model in both galleries; ``row`` counts the test images."""
    with context.task("evaluating", num_queries, unit="queries") as advance:
        tables = evaluate_galleries(
            embeddings,
            labels=labels.to_numpy(),
            domains=images["domain"].to_numpy(),
            ids=id_numbers(images["image_id"].tolist()),
            seed=context.config.evaluation.seed,
            max_queries=_most_queries(context.config),
            device=device,
            num_threads=context.num_threads,
            progress=advance,
        )
    return pd.concat([table.assign(gallery=gallery) for gallery, table in tables.items()], ignore_index=True)


def _reciprocity(
    context: StageContext, embeddings: NDArray[np.float32], images: pd.DataFrame, device: str
) -> pd.DataFrame:
    """Return domain, gallery and reciprocity of one model; no label is read."""
    domains, sample, parts = images["domain"].to_numpy(), _reciprocity_sample(context.config, images), []
    with context.task("reciprocity", len(GALLERIES), unit="tables") as advance:
        for gallery in GALLERIES:
            found = reciprocity_table(embeddings, domains, gallery=gallery, rows=sample, device=device)
            parts.append(found.assign(gallery=gallery))
            advance(1)
    return pd.concat(parts, ignore_index=True)


def _reciprocity_sample(config: Config, images: pd.DataFrame) -> NDArray[np.int64]:
    """Return the images whose reciprocity is computed: all, or of more than ``max_queries`` so many that they and their
    neighbours, whose neighbours are sought too, are no more than these; at least 1,000, or ``max_queries`` if less."""
    most = _most_queries(config)
    if most is None or len(images) <= most:
        return np.arange(len(images))
    number = min(most, max(MIN_RECIPROCITY_IMAGES, most // (NUM_NEIGHBORS + 1)))
    drawn = key(config.evaluation.seed, "reciprocity")
    return even_sample(images["domain"].to_numpy(), id_numbers(images["image_id"].tolist()), number, seed=drawn)


def _all_queries(context: StageContext, images: pd.DataFrame) -> pd.DataFrame:
    """Return the queries of all models, with the ids and domains of the images, and those of the oracle."""
    names, domains, parts = images["image_id"].to_numpy(), images["domain"].to_numpy(), []
    for name in evaluated_models(context.config):
        table = pd.read_parquet(context.input("retrieval", name) / "per_query.parquet")
        rows, gallery = table.pop("row").to_numpy(), table.pop("gallery")
        table.insert(0, "image_id", names[rows])
        table.insert(1, "domain", domains[rows])
        parts.append(table.assign(model=name, gallery=gallery))
    per_query = pd.concat(parts, ignore_index=True)
    if context.config.model.source == "single":
        return per_query
    return pd.concat([per_query, oracle(per_query, list(context.config.granularities))], ignore_index=True)


def _nothing() -> pd.DataFrame:
    return pd.DataFrame(
        {"image_id": pd.Series(dtype=str), "model": pd.Series(dtype=str), "gallery": pd.Series(dtype=str)}
    )


def _all_reciprocities(context: StageContext) -> pd.DataFrame:
    """Return model, domain, gallery and reciprocity of every model except the oracle."""
    parts = [
        pd.read_parquet(context.input("retrieval", name) / "reciprocity.parquet").assign(model=name)
        for name in evaluated_models(context.config)
    ]
    return pd.concat(parts, ignore_index=True)[["model", "domain", "gallery", "reciprocity"]]


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
