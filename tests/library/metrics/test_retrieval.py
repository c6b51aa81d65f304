from __future__ import annotations

import tracemalloc

import numpy as np
import pandas as pd
import pytest
import torch
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from sklearn.metrics import average_precision_score

from grappa.core.randomness import id_numbers
from grappa.metrics.retrieval import (
    METRICS,
    SUMMARY_COLUMNS,
    evaluate,
    evaluate_galleries,
    oracle,
    paired_bootstrap,
    summarize,
    with_positives,
)


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def names(number: int) -> np.ndarray:
    return id_numbers([f"image {i}" for i in range(number)])


def at_angles(*degrees: float) -> np.ndarray:
    radians = np.deg2rad(degrees)
    return np.stack([np.cos(radians), np.sin(radians)], axis=1).astype(np.float32)


def objects(*values: object) -> np.ndarray:
    return np.array(values, dtype=object)


def random_table(number: int = 240, num_classes: int = 12) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    labels = random.integers(0, num_classes, number)
    centers = random.normal(size=(num_classes, 8))
    embeddings = unit(centers[labels] + 1.5 * random.normal(size=(number, 8)))
    return (
        embeddings,
        labels.astype(str).astype(object),
        np.where(random.random(number) < 0.4, "birds", "cars").astype(object),
    )


def test_an_example_worked_by_hand() -> None:
    # Images on a circle, at 0, 10, 25, 45, 70 degrees, of classes a b a a b: the nearer in angle, the more similar.
    found = evaluate(
        at_angles(0, 10, 25, 45, 70),
        labels=objects("a", "b", "a", "a", "b"),
        domains=objects(*["d"] * 5),
        ids=names(5),
        gallery="domain",
    )
    # query 0 (a,  0): 10b 25a 45a 70b -> hits at ranks 2, 3; R = 2.  AP = (1/2 + 2/3) / 2 = 7/12
    #   R-precision: one hit in the first 2 = 1/2; MAP@R = (1/2) / 2 = 1/4; R@1 = 0, R@2 = 1
    # query 1 (b, 10): 0a (10) 25a (15) 45a (35) 70b (60) -> hit at rank 4; R = 1. AP = 1/4; rest 0; R@4 = 1
    # query 2 (a, 25): 10b (15) 45a (20) 0a (25) 70b (45) -> hits at 2, 3; as query 0
    # query 3 (a, 45): 25a (20) 70b (25) 10b (35) 0a (45) -> hits at 1, 4; AP = (1 + 2/4) / 2 = 3/4; R-prec 1/2; MAP 1/2
    # query 4 (b, 70): 45a 25a 10b 0a -> hit at 3; R = 1; AP = 1/3; R@4 = 1
    assert found["row"].tolist() == [0, 1, 2, 3, 4]
    assert found["num_positives"].tolist() == [2, 1, 2, 2, 1]
    np.testing.assert_allclose(found["average_precision"], [7 / 12, 1 / 4, 7 / 12, 3 / 4, 1 / 3])
    np.testing.assert_allclose(found["r_precision"], [1 / 2, 0, 1 / 2, 1 / 2, 0])
    np.testing.assert_allclose(found["map_at_r"], [1 / 4, 0, 1 / 4, 1 / 2, 0])
    assert found["recall_at_1"].tolist() == [0, 0, 0, 1, 0]
    assert found["recall_at_2"].tolist() == [1, 0, 1, 1, 0]
    assert found["recall_at_4"].tolist() == [1, 1, 1, 1, 1]


@pytest.mark.parametrize("gallery", ["domain", "merged"])
def test_agrees_with_pytorch_metric_learning(gallery: str) -> None:
    embeddings, labels, domains = random_table()
    found = evaluate(embeddings, labels=labels, domains=domains, ids=names(240), gallery=gallery)
    classes = pd.factorize(pd.Series(domains + labels))[0]
    parts = [np.flatnonzero(domains == d) for d in np.unique(domains)] if gallery == "domain" else [np.arange(240)]
    calculator = AccuracyCalculator(
        include=("r_precision", "mean_average_precision_at_r", "precision_at_1"),
        k="max_bin_count",
        device=torch.device("cpu"),
    )
    for rows in parts:
        theirs = calculator.get_accuracy(embeddings[rows], classes[rows])
        ours = found[found["row"].isin(rows)].mean(numeric_only=True)
        assert ours["r_precision"] == pytest.approx(theirs["r_precision"], abs=1e-6)
        assert ours["map_at_r"] == pytest.approx(theirs["mean_average_precision_at_r"], abs=1e-6)
        assert ours["recall_at_1"] == pytest.approx(theirs["precision_at_1"], abs=1e-6)


def test_average_precision_agrees_with_scikit_learn() -> None:
    embeddings, labels, domains = random_table()
    found = evaluate(embeddings, labels=labels, domains=domains, ids=names(240), gallery="merged", block_size=17)
    for query in range(240):
        others = np.arange(240) != query
        relevant = ((labels == labels[query]) & (domains == domains[query]))[others]
        expected = average_precision_score(relevant, (embeddings @ embeddings[query])[others])
        assert found["average_precision"][query] == pytest.approx(expected, abs=1e-9)


def test_ties_do_not_leak_the_order_of_the_rows() -> None:
    # All images equal, rows sorted by class (20 classes of 20): chance is (20 - 1) / (400 - 1) = 0.048 at rank 1.
    embeddings, labels = np.repeat(unit(np.ones((1, 33))), 400, axis=0), np.repeat(np.arange(20), 20).astype(object)
    for seed in range(3):
        found = evaluate(
            embeddings, labels=labels, domains=objects(*["d"] * 400), ids=names(400), gallery="domain", seed=seed
        )
        assert found["recall_at_1"].mean() < 0.11
        assert found["average_precision"].mean() < 0.10


def test_the_order_of_the_rows_changes_nothing() -> None:
    embeddings, labels, domains = random_table()
    embeddings[::3] = embeddings[0]
    order = np.random.default_rng(1).permutation(240)
    plain = evaluate(embeddings, labels=labels, domains=domains, ids=names(240), gallery="merged")
    other = evaluate(
        embeddings[order], labels=labels[order], domains=domains[order], ids=names(240)[order], gallery="merged"
    )
    pd.testing.assert_frame_equal(
        plain[METRICS].iloc[order].reset_index(drop=True), other[METRICS].reset_index(drop=True), check_exact=True
    )


def test_negative_and_zero_similarities_are_ranked_too() -> None:
    # From 0 degrees: 80 (cos > 0), 90 (0), 120, 180 (< 0); the only other image of class a is the last.
    found = evaluate(
        at_angles(0, 120, 80, 180, 90),
        labels=objects("a", "b", "b", "a", "b"),
        domains=objects(*["d"] * 5),
        ids=names(5),
        gallery="domain",
    )
    assert found["average_precision"][0] == pytest.approx(1 / 4)
    assert found["average_precision"][3] == pytest.approx(1 / 4)


def test_a_class_belongs_to_its_domain_and_lone_queries_are_reported() -> None:
    found = evaluate(
        at_angles(0, 1, 2, 50, 51),
        labels=objects("x", "x", "x", "x", None),
        domains=objects("birds", "birds", "cars", "cars", "cars"),
        ids=names(5),
        gallery="merged",
    )
    assert found["num_positives"].tolist() == [1, 1, 1, 1]
    alone = evaluate(
        at_angles(0, 1, 2),
        labels=objects("x", "x", "y"),
        domains=objects("birds", "birds", "birds"),
        ids=names(3),
        gallery="domain",
    )
    assert alone["num_positives"].tolist() == [1, 1, 0]
    assert alone.loc[2, METRICS].isna().all() and alone.loc[:1, METRICS].notna().all(axis=None)


def test_rows_without_a_label_take_no_part_and_are_counted() -> None:
    embeddings, labels, domains = random_table()
    kept = np.arange(240) % 5 != 0
    holes = labels.copy()
    holes[~kept] = None
    found = evaluate(embeddings, labels=holes, domains=domains, ids=names(240), gallery="merged")
    expected = evaluate(
        embeddings[kept], labels=labels[kept], domains=domains[kept], ids=names(240)[kept], gallery="merged"
    )
    assert found.attrs["num_unlabeled"] == 48
    assert found["row"].tolist() == np.flatnonzero(kept).tolist()
    np.testing.assert_array_equal(found[METRICS], expected[METRICS])


def test_no_labels_at_all_give_an_empty_table() -> None:
    found = evaluate(
        at_angles(0, 1), labels=objects(None, None), domains=objects("d", "d"), ids=names(2), gallery="domain"
    )
    assert len(found) == 0 and found.attrs["num_unlabeled"] == 2


@pytest.mark.parametrize("gallery", ["domain", "merged"])
def test_both_galleries_at_once_have_the_bits_of_each_alone(gallery: str) -> None:
    embeddings, labels, domains = random_table()
    embeddings[::7] = embeddings[3]
    arguments = {"labels": labels, "domains": domains, "ids": names(240)}
    both = evaluate_galleries(embeddings, **arguments, num_threads=2)
    pd.testing.assert_frame_equal(
        both[gallery], evaluate(embeddings, **arguments, gallery=gallery, block_size=7), check_exact=True
    )


def test_a_sample_of_queries_has_the_numbers_of_all_of_them() -> None:
    embeddings, labels, domains = random_table()
    labels[:3] = objects("alone", "alone too", None)
    arguments = {"labels": labels, "domains": domains, "ids": names(240), "gallery": "merged"}
    whole = evaluate(embeddings, **arguments)
    drawn = evaluate(embeddings, **arguments, max_queries=40)
    assert drawn["domain"].value_counts().to_dict() == {"birds": 20, "cars": 20}
    pd.testing.assert_frame_equal(drawn, whole.set_index("row", drop=False).loc[drawn["row"]].reset_index(drop=True))
    assert drawn["num_positives"].min() > 0, "whoever has no positive would say nothing"
    assert set(drawn["row"]) <= set(evaluate(embeddings, **arguments, max_queries=60)["row"])
    assert set(drawn["row"]) != set(evaluate(embeddings, **arguments, max_queries=40, seed=1)["row"])
    scored = len(with_positives(labels, domains))
    assert scored == 237
    pd.testing.assert_frame_equal(evaluate(embeddings, **arguments, max_queries=scored), whole)


def test_memory_is_of_the_size_of_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grappa.metrics.ranking.BLOCK_ELEMENTS", 2**17)
    number = 3000
    embeddings = unit(np.random.default_rng(0).normal(size=(number, 4)))
    labels = (np.arange(number) % 300).astype(object)
    tracemalloc.start()
    evaluate(embeddings, labels=labels, domains=objects(*["d"] * number), ids=names(number), gallery="merged")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < number * number * 4 / 3


def per_query_table() -> pd.DataFrame:
    """Two granularities, two domains; birds are best served by k00002, cars by k00004; one query has no positives."""
    rows = []
    for gallery in ("domain", "merged"):
        for model, precisions in {"k00002": [0.8, 0.6, 0.1, 0.3], "k00004": [0.2, 0.4, 0.5, 0.7]}.items():
            for row, precision in enumerate([*precisions, np.nan]):
                metrics = dict.fromkeys(METRICS, precision)
                domain = "birds" if row < 2 else "cars"
                rows.append(
                    {"row": row, "domain": domain, "num_positives": int(row < 4), **metrics}
                    | {"model": model, "gallery": gallery}
                )
    return pd.DataFrame(rows)


def test_summary_has_the_columns_and_the_numbers() -> None:
    summary = summarize(per_query_table())
    assert list(summary.columns) == SUMMARY_COLUMNS
    assert len(summary) == 2 * 2 * 3
    chosen = summary[(summary["model"] == "k00002") & (summary["gallery"] == "merged")].set_index("domain")
    assert chosen["num_queries"].to_dict() == {"birds": 2, "cars": 2, "_mean": 4}
    # birds: (0.8 + 0.6) / 2 = 0.7; deviation of two values 0.2 apart: 0.2 / sqrt 2; error 0.2 / sqrt 2 / sqrt 2
    assert chosen["map"].to_dict() == pytest.approx({"birds": 0.7, "cars": 0.2, "_mean": 0.45})
    # both domains have error 0.1: sqrt(0.1^2 + 0.1^2) / 2
    assert chosen["map_se"].to_dict() == pytest.approx({"birds": 0.1, "cars": 0.1, "_mean": 0.1 / 2**0.5})
    assert chosen["recall_at_1_se"]["birds"] == pytest.approx(0.1)


def test_a_domain_without_scored_queries_is_shown_and_left_out_of_the_mean() -> None:
    table = per_query_table()
    table.loc[table["domain"] == "cars", "num_positives"] = 0
    table.loc[table["domain"] == "cars", METRICS] = np.nan
    summary = summarize(table[table["model"] == "k00002"]).set_index(["gallery", "domain"])
    assert summary.loc[("domain", "cars"), "num_queries"] == 0 and np.isnan(summary.loc[("domain", "cars"), "map"])
    assert summary.loc[("domain", "_mean"), "map"] == pytest.approx(0.7)


def test_oracle_takes_each_domains_best_granularity_in_both_galleries() -> None:
    table = per_query_table()
    found = oracle(table, ["k00002", "k00004"])
    assert found.attrs["granularities"] == {"birds": "k00002", "cars": "k00004"}
    assert set(found["model"]) == {"oracle"} and len(found) == 10
    summary = summarize(found).set_index(["gallery", "domain"])["map"]
    assert summary["merged", "birds"] == pytest.approx(0.7) and summary["merged", "cars"] == pytest.approx(0.6)
    # The choice is made in the gallery "domain" only.
    table.loc[table["gallery"] == "merged", METRICS] = 0.0
    assert oracle(table, ["k00002", "k00004"]).attrs == found.attrs
    with pytest.raises(ValueError, match="k00008"):
        oracle(table, ["k00002", "k00008"])


def test_paired_bootstrap_covers_the_mean_and_repeats() -> None:
    difference = np.random.default_rng(0).normal(0.1, 1.0, size=400)
    low, high = paired_bootstrap(np.append(difference, np.nan), seed=1)
    assert low < difference.mean() < high
    # 1.96 standard errors to each side
    assert high - low == pytest.approx(2 * 1.96 * difference.std() / 20, rel=0.1)
    assert paired_bootstrap(difference, seed=1) == (low, high) != paired_bootstrap(difference, seed=2)
    with pytest.raises(ValueError, match="no query"):
        paired_bootstrap(np.array([np.nan]))


def test_paired_bootstrap_of_the_mean_over_domains_resamples_within_each() -> None:
    random = np.random.default_rng(0)
    # Far apart, so that resampling over all queries would vary the mix of domains and give a wide interval.
    difference = np.concatenate([random.normal(5.0, 0.1, 90), random.normal(-5.0, 0.1, 10), [np.nan]])
    domains = objects(*["birds"] * 90, *["cars"] * 10, "flowers")
    low, high = paired_bootstrap(difference, domains=domains)
    assert low < (difference[:90].mean() + difference[90:100].mean()) / 2 < high
    error = np.hypot(difference[:90].std() / 90**0.5, difference[90:100].std() / 10**0.5) / 2
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert paired_bootstrap(difference, domains=objects(*["d"] * 101)) == paired_bootstrap(difference)
    with pytest.raises(ValueError, match="found 2 domains for 101 queries"):
        paired_bootstrap(difference, domains=objects("birds", "cars"))


def test_refuses_what_makes_no_sense() -> None:
    embeddings, labels, domains = random_table()
    arguments = {"labels": labels, "domains": domains, "ids": names(240), "gallery": "merged"}
    for change, message in [
        ({"gallery": "all"}, "expected one of domain, merged"),
        ({"labels": labels[:5]}, "one label, domain and id a row"),
        ({"ids": np.zeros(240, dtype=np.uint64)}, "the same id twice"),
        ({"block_size": 0}, "block_size is 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            evaluate(embeddings, **{**arguments, **change})
