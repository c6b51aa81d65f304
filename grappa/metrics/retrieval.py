"""Retrieval metrics: every labelled image queries all others, per domain or over the merged gallery.

Images are first put in a seeded order of their ids, and ties go to the earlier image of that order: rows sorted by
class leak nothing, and the order of the rows changes nothing. Products are made in blocks of queries, never N x N, and
once for both galleries (``grappa.metrics.ranking``).
"""

# B queries of a block, P pairs of a query and a positive, D width

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from grappa.core.memory import FLOAT, INTEGER, WORK
from grappa.core.names import GALLERIES, MEAN, ORACLE
from grappa.core.randomness import key, shuffled
from grappa.core.vectors import check_unit_vectors
from grappa.metrics import ranking
from grappa.metrics.ranking import QUERY_BLOCK, Gallery, ranked
from grappa.metrics.samples import even_sample

RECALL_AT = (1, 2, 4, 8)
METRICS = ["average_precision", "r_precision", "map_at_r", *(f"recall_at_{depth}" for depth in RECALL_AT)]
SUMMARY_COLUMNS = ["model", "domain", "gallery", "num_queries", "map", "map_se", "r_precision", "map_at_r"]
SUMMARY_COLUMNS += ["recall_at_1", "recall_at_1_se", "recall_at_2", "recall_at_4", "recall_at_8"]


def evaluate(
    embeddings: NDArray[np.float32],
    *,
    labels: NDArray[np.object_],
    domains: NDArray[np.object_],
    ids: NDArray[np.uint64],
    gallery: str,
    seed: int = 0,
    max_queries: int | None = None,
    block_size: int = QUERY_BLOCK,
    device: str = "cpu",
    num_threads: int = 1,
    progress: Callable[[int], None] | None = None,
) -> pd.DataFrame:
    """Score every labelled row of embeddings (N, D), L2-normalised, as a query against all other labelled rows.

    labels (N,), domains (N,) and ids (N,) uint64, unique, belong to the rows; a class is a (domain, label) pair. Rows
    with a null label take no part and are counted in ``.attrs["num_unlabeled"]``. ``gallery`` is "domain" (images of
    the query's own domain) or "merged" (all). Returns one row a query, by row: row, domain, num_positives,
    average_precision over the full ranking, r_precision, map_at_r, recall_at_1/2/4/8, each in [0, 1], NaN for a query
    without positives. Similarities are compared as float32; equal ones in an order hashed from (seed, id).

    Of more than ``max_queries`` queries with positives, that many are drawn evenly over domains (``sampled_queries``);
    each is still compared with all rows. ``device`` and ``num_threads`` compute; ``progress`` is called with the
    queries newly done.
    """
    if gallery not in GALLERIES:
        raise ValueError(f"gallery is {gallery!r}; expected one of {', '.join(GALLERIES)}")
    return evaluate_galleries(
        embeddings,
        labels=labels,
        domains=domains,
        ids=ids,
        galleries=(gallery,),
        seed=seed,
        max_queries=max_queries,
        block_size=block_size,
        device=device,
        num_threads=num_threads,
        progress=progress,
    )[gallery]


def evaluate_galleries(
    embeddings: NDArray[np.float32],
    *,
    labels: NDArray[np.object_],
    domains: NDArray[np.object_],
    ids: NDArray[np.uint64],
    galleries: Sequence[str] = GALLERIES,
    seed: int = 0,
    max_queries: int | None = None,
    block_size: int = QUERY_BLOCK,
    device: str = "cpu",
    num_threads: int = 1,
    progress: Callable[[int], None] | None = None,
) -> dict[str, pd.DataFrame]:
    """Return what :func:`evaluate` does for each gallery, in the time of the larger one: products are made once."""
    embeddings = check_unit_vectors("embeddings", embeddings)
    _check(embeddings, labels, domains, ids, block_size)
    labelled = np.flatnonzero(~pd.isna(labels))
    order = labelled[shuffled(key(seed, "evaluation"), ids[labelled])]
    asked = np.zeros(len(embeddings), dtype=bool)
    asked[sampled_queries(labels, domains, ids, max_queries, seed=seed)] = True
    classes = _classes(labels[order], domains[order])
    num_positives = np.bincount(classes)[classes] - 1
    groups = np.zeros(len(order), dtype=np.int64) if "domain" not in galleries else pd.factorize(domains[order])[0]
    parts: dict[str, list[pd.DataFrame]] = {gallery: [] for gallery in galleries}
    for group in range(groups.max(initial=-1) + 1):
        own, others = (np.flatnonzero(mask) for mask in (groups == group, groups != group))
        if not asked[order[own]].any():
            continue
        places = np.concatenate([own, others]) if "merged" in galleries else own
        searched = Gallery(embeddings[order[places]], classes[places], places, len(own))
        queries = np.flatnonzero(asked[order[own]])
        for block, ranks in ranked(searched, queries, block_size=block_size, device=device, num_threads=num_threads):
            rows = order[own[block]]
            for gallery, part in parts.items():
                found = ranks.own if gallery == "domain" else ranks.merged
                scores = ranking_metrics(ranks.query, found, num_positives[own[block]])
                part.append(scores.assign(row=rows, domain=domains[rows]))
            if progress is not None:
                progress(len(block))
    return {gallery: _table(part, len(embeddings) - len(labelled)) for gallery, part in parts.items()}


def _classes(labels: NDArray[np.object_], domains: NDArray[np.object_]) -> NDArray[np.int64]:
    return pd.factorize(pd.MultiIndex.from_arrays([domains, labels]))[0].astype(np.int64)


def _table(parts: list[pd.DataFrame], num_unlabeled: int) -> pd.DataFrame:
    frame = pd.concat(parts) if parts else pd.DataFrame(columns=["row", "domain", "num_positives", *METRICS])
    frame = frame[["row", "domain", "num_positives", *METRICS]].sort_values("row", ignore_index=True)
    frame.attrs["num_unlabeled"] = num_unlabeled
    return frame


def with_positives(labels: NDArray[np.object_], domains: NDArray[np.object_]) -> NDArray[np.int64]:
    """Return the rows, ascending, that are queries with positives: those of a class of two labelled images or more."""
    labelled = np.flatnonzero(~pd.isna(labels))
    classes = _classes(labels[labelled], domains[labelled])
    return labelled[np.bincount(classes)[classes] > 1]


def sampled_queries(
    labels: NDArray[np.object_],
    domains: NDArray[np.object_],
    ids: NDArray[np.uint64],
    max_queries: int | None,
    *,
    seed: int = 0,
) -> NDArray[np.int64]:
    """Return the rows that query, ascending: all labelled ones, or a sample of ``max_queries``.

    It is drawn of those with positives, where there are more, and evenly over domains
    (``grappa.metrics.samples.even_sample``).
    """
    scored = with_positives(labels, domains)
    if max_queries is None or len(scored) <= max_queries:
        return np.flatnonzero(~pd.isna(labels))
    return scored[even_sample(domains[scored], ids[scored], max_queries, seed=key(seed, "queries"))]


def memory_needed(num_images: int, width: int, *, num_queries: int | None = None, num_threads: int = 1) -> int:
    """Return the bytes that the evaluation of one model takes at its peak.

    Counted are its embeddings in their file, as given and in order, the tables of ``num_queries`` queries (by default
    one an image), and a block of products with what is compared at once.
    """
    embeddings = 3 * num_images * width * FLOAT
    tables = memory_of_tables(num_images if num_queries is None else num_queries)
    return embeddings + tables + ranking.memory_needed(num_images, num_threads) + WORK // 4


def memory_of_tables(num_queries: int, num_models: int = 1) -> int:
    """Return the bytes of a table in each gallery of every model, each twice while they are put together."""
    num_columns = len(["row", "domain", "num_positives", *METRICS, "model", "gallery"])
    return 2 * len(GALLERIES) * num_models * num_queries * num_columns * INTEGER


def _check(
    embeddings: NDArray[np.float32],
    labels: NDArray[np.object_],
    domains: NDArray[np.object_],
    ids: NDArray[np.uint64],
    block_size: int,
) -> None:
    lengths = {"embeddings": len(embeddings), "labels": len(labels), "domains": len(domains), "ids": len(ids)}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"expected one label, domain and id a row of embeddings, found {lengths}")
    if len(np.unique(ids)) != len(ids):
        raise ValueError("ids holds the same id twice; give each image its own")
    if block_size < 1:
        raise ValueError(f"block_size is {block_size}; expected at least 1")


def ranking_metrics(
    query: NDArray[np.int64], rank: NDArray[np.int64], num_positives: NDArray[np.int64]
) -> pd.DataFrame:
    """Return num_positives and METRICS of B rankings.

    query (P,) and rank (P,) tell of each positive which ranking it is in, and its rank there from 0: by query,
    ascending for each; num_positives (B,): how many are in the gallery (R). Average precision is the mean over the R
    positives of (positives up to its rank) / rank, MAP@R the same with positives below rank R counted 0 (Musgrave et
    al. 2020), R-precision the share of positives among the first R, recall at k whether one is among the first k. NaN
    where R = 0.
    """
    first = np.concatenate([[0], np.cumsum(np.bincount(query, minlength=len(num_positives)))])[query]
    precision = (np.arange(len(query)) - first + 1) / (rank + 1)
    inside = rank < num_positives[query]

    def per_query(values: NDArray[np.float64]) -> NDArray[np.float64]:
        sums = np.bincount(query, weights=values, minlength=len(num_positives))
        return np.where(num_positives > 0, sums / np.maximum(num_positives, 1), np.nan)

    columns = {
        "num_positives": num_positives,
        "average_precision": per_query(precision),
        "r_precision": per_query(inside.astype(np.float64)),
        "map_at_r": per_query(precision * inside),
    }
    for depth in RECALL_AT:
        hits = np.bincount(query[rank < depth], minlength=len(num_positives)) > 0
        columns[f"recall_at_{depth}"] = np.where(num_positives > 0, hits, np.nan)
    return pd.DataFrame(columns)


def summarize(per_query: pd.DataFrame) -> pd.DataFrame:
    """Average per-query rows (with columns model and gallery) to one row a (model, domain, gallery), tidy.

    Queries without positives are not averaged nor counted in num_queries; a domain without any other has 0 and NaN. The
    domain "_mean" is the mean over the domains that have queries, its num_queries their sum, its standard errors
    sqrt(sum se^2) / number of domains. Models and galleries keep the order of first appearance, domains are sorted.
    """
    rows = []
    for (model, gallery), part in per_query.groupby(["model", "gallery"], sort=False):
        domains = pd.DataFrame([_summary(str(name), group) for name, group in part.groupby("domain", sort=True)])
        both = pd.concat([domains, pd.DataFrame([_mean_summary(domains)])], ignore_index=True)
        rows.append(both.assign(model=str(model), gallery=str(gallery)))
    if not rows:
        return pd.DataFrame(columns=SUMMARY_COLUMNS)
    return pd.concat(rows, ignore_index=True)[SUMMARY_COLUMNS]


def _summary(domain: str, queries: pd.DataFrame) -> dict[str, Any]:
    scored = queries[queries["num_positives"] > 0]
    number = len(scored)
    errors = scored[["average_precision", "recall_at_1"]].std(ddof=1) / np.sqrt(max(number, 1))
    means = scored[METRICS].mean()
    named = {name: means[name] for name in METRICS[1:]}
    standard_errors = {"map_se": errors["average_precision"], "recall_at_1_se": errors["recall_at_1"]}
    return {"domain": domain, "num_queries": number, "map": means["average_precision"], **named, **standard_errors}


def _mean_summary(domains: pd.DataFrame) -> dict[str, Any]:
    scored = domains[domains["num_queries"] > 0]
    numbers = scored.drop(columns=["domain", "num_queries"])
    means = numbers.mean(skipna=False) if len(scored) else numbers.mean()
    for name in ("map_se", "recall_at_1_se"):
        means[name] = np.sqrt((scored[name] ** 2).sum(skipna=False)) / len(scored) if len(scored) else np.nan
    return {"domain": MEAN, "num_queries": int(scored["num_queries"].sum()), **dict(means)}


def oracle(per_query: pd.DataFrame, granularities: Sequence[str]) -> pd.DataFrame:
    """Return per-query rows of the model "oracle": for each domain those of its best granularity, in every gallery.

    Best is the highest mAP in the gallery "domain" (labels are used: for evaluation only); ties go to the one named
    first. ``.attrs["granularities"]`` maps each domain to its choice. ValueError when a granularity has no rows.
    """
    missing = [name for name in granularities if name not in set(per_query["model"])]
    if missing or not granularities:
        raise ValueError(
            f"no per-query rows for {', '.join(missing) or 'any granularity'}; evaluate each granularity first"
        )
    own = per_query[(per_query["gallery"] == "domain") & per_query["model"].isin(granularities)]
    table = own.groupby(["domain", "model"])["average_precision"].mean().unstack("model")[list(granularities)]
    chosen = table.fillna(-1.0).idxmax(axis=1)
    rows = per_query[per_query["domain"].map(chosen) == per_query["model"]].assign(model=ORACLE)
    rows.attrs["granularities"] = chosen.to_dict()
    return rows.reset_index(drop=True)


def paired_bootstrap(
    difference: NDArray[np.float64],
    *,
    domains: NDArray[np.object_] | None = None,
    seed: int = 0,
    num_samples: int = 2000,
    confidence: float = 0.95,
) -> tuple[float, float]:
    """Return the percentile interval of the mean of ``difference`` (Q,): one value a query, A minus B, queries
    resampled.

    With ``domains`` (Q,) it is the interval of the mean over domains (``_mean``): queries are resampled within their
    domain. Average over training seeds first. NaN (queries without positives) are left out; ValueError when nothing is
    left.
    """
    values = np.asarray(difference, dtype=np.float64)
    scored = ~np.isnan(values)
    if not scored.any():
        raise ValueError("difference holds no query with positives; there is nothing to resample")
    groups = np.zeros(len(values)) if domains is None else np.asarray(domains)
    if len(groups) != len(values):
        raise ValueError(f"found {len(groups)} domains for {len(values)} queries; give each its own")
    parts = [values[scored & (groups == group)] for group in np.unique(groups[scored])]
    generator = np.random.default_rng(key(seed, "bootstrap"))
    means = [_resampled_mean(parts, generator) for _ in range(num_samples)]
    low, high = np.quantile(means, [(1.0 - confidence) / 2.0, (1.0 + confidence) / 2.0])
    return float(low), float(high)


def _resampled_mean(parts: Sequence[NDArray[np.float64]], generator: np.random.Generator) -> float:
    return float(np.mean([part[generator.integers(0, len(part), len(part))].mean() for part in parts]))
