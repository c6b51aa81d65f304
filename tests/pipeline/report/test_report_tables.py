"""The tables of a report: gains with their intervals, what is stressed, and shares of domains."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from grappa.pipeline.pages.report import figures, summary


def test_a_deployed_model_that_needs_no_training_has_no_gain() -> None:
    found = summary.comparisons(*_frames(), "domain", deployed="zero_shot")
    assert set(found["candidate"]) == {"mean", "fused"}


def _frames() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Metrics and queries of two domains of two: whitening is the better zero-shot row for birds, plain for cars."""
    values = {
        "zero_shot": [0.2, 0.4, 0.6, 0.6],
        "zero_shot_whitened": [0.4, 0.4, 0.1, 0.3],
        "mean": [0.5, 0.5, 0.5, 0.5],
        "fused": [0.5, 0.7, 0.5, 0.3],
    }
    rows = [
        {"image_id": f"i{place}", "domain": "birds" if place < 2 else "cars", "model": model, "gallery": "domain"}
        | {"num_positives": 1, "average_precision": value}
        for model, own in values.items()
        for place, value in enumerate(own)
    ]
    per_query = pd.DataFrame(rows)
    means = per_query.groupby(["model", "gallery", "domain"], sort=False)["average_precision"].mean().rename("map")
    both = means.groupby(["model", "gallery"], sort=False).mean().reset_index().assign(domain="_mean")
    return pd.concat([means.reset_index(), both], ignore_index=True), per_query


def test_gains_count_against_the_better_zero_shot_row_of_each_column() -> None:
    found = summary.comparisons(*_frames(), "domain").set_index(["candidate", "against", "domain"])
    assert found.loc[("fused", "zero-shot", "birds"), "reference"] == "zero_shot_whitened"
    assert found.loc[("fused", "zero-shot", "cars"), "reference"] == "zero_shot"
    assert found.loc[("fused", "zero-shot", "_mean"), "reference"] == "zero_shot"
    differences = found["difference"]
    assert differences["fused", "zero-shot", "birds"] == pytest.approx(0.2)
    assert differences["fused", "zero-shot", "cars"] == pytest.approx(-0.2)
    assert differences["fused", "zero-shot", "_mean"] == pytest.approx(0.05)
    assert differences["fused", "mean", "_mean"] == pytest.approx(0.0)
    assert found.loc[("fused", "zero-shot", "birds"), "relative"] == pytest.approx(0.5)
    # Birds gain .1 or .3, each of two draws: between .1 and .3 on average.
    assert found.loc[("fused", "zero-shot", "birds"), ["low", "high"]].tolist() == pytest.approx([0.1, 0.3])
    assert ("student", "zero-shot", "birds") not in found.index


def test_only_gains_beyond_their_interval_are_stressed_and_called_above() -> None:
    found = summary.comparisons(*_frames(), "domain")
    table = summary.gain_table(found)
    assert table.header == ["", "birds", "cars", "mean"]
    assert [row[0] for row in table.rows] == [
        "mean vs the best zero-shot",
        "fused vs the best zero-shot",
        "fused vs mean",
    ]
    assert table.rows[1][1] == "+.200 [+.100,\u00a0+.300]"
    assert (1, 1) in table.strong and (1, 2) not in table.strong and (1, 3) not in table.strong
    lines = dict(zip(zip(found["candidate"], found["against"], found["domain"], strict=True), found.iloc, strict=True))
    assert summary.gain_sentence(lines["fused", "zero-shot", "birds"]).startswith(
        "fused is above zero_shot_whitened (+50.0%, "
    )
    assert summary.gain_sentence(lines["fused", "zero-shot", "cars"]).startswith("fused is below zero_shot (")
    assert "not to be told apart from" in summary.gain_sentence(lines["fused", "zero-shot", "_mean"])


@pytest.mark.parametrize("reader", ["oracle", "supervised"])
def test_the_best_of_a_column_is_stressed_what_saw_labels_aside(reader: str) -> None:
    metrics = _frames()[0]
    oracle = pd.DataFrame({"model": reader, "gallery": "domain", "domain": ["birds", "cars", "_mean"], "map": 0.9})
    table = summary.result_table(pd.concat([metrics, oracle]), "domain")
    assert table.strong == {(3, 1), (0, 2), (2, 3), (3, 3)}, "the two means are equal"
    assert table.markdown().splitlines()[2] == "| zero_shot | .300 | **.600** | .450 |"


def test_the_best_granularity_of_a_domain_is_stressed() -> None:
    values = {"k00004": [0.5, 0.1, 0.3], "k00008": [0.2, 0.4, 0.3]}
    rows = [
        {"granularity": name, "domain": domain, "num_images": 9, "purity": 0.9, "nmi": 0.8, "ami": ami}
        for name, own in values.items()
        for domain, ami in zip(["birds", "cars", "_mean"], own, strict=True)
    ]
    table = summary.agreement_table(pd.DataFrame(rows))
    assert table is not None and table.strong == {(0, 1), (1, 2), (0, 3), (1, 3)}
    assert table.rows[0] == ["k00004", ".500", ".100", ".300", ".800", ".900"]
    assert summary.agreement_table(pd.DataFrame(rows).assign(num_images=0)) is None


def test_numbers_are_short() -> None:
    assert [summary.number(value) for value in (0.0864, -0.05, 1.3863, 0.0, 1.0)] == [
        ".086",
        "-.050",
        "1.386",
        ".000",
        "1.000",
    ]
    assert summary.number(float("nan")) == "-"


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_models_that_are_all_perfect_or_all_useless_read_well(value: float) -> None:
    metrics, per_query = _frames()
    metrics["map"], per_query["average_precision"] = value, value
    found = summary.comparisons(metrics, per_query, "domain")
    shown = "1.000" if value else ".000"
    assert summary.result_table(metrics, "domain").rows[0] == ["zero_shot", shown, shown, shown]
    same = "+.000 [+.000,\u00a0+.000]"
    table = summary.gain_table(found)
    assert {*table.rows[0][1:]} == {same} and not table.strong
    share = "+0.0%, " if value else ""
    assert summary.gain_sentence(found.iloc[0]) == f"mean is not to be told apart from zero_shot ({share}{same})"
    main = summary.before_after_table(metrics, {"domain": found}, "fused")
    assert main.rows[0] == ["birds", shown, shown, shown, same] and not main.strong


def test_differences_of_any_size_are_told_whole() -> None:
    row = {"difference": 10.0, "low": -12.3456, "high": -0.0001}
    assert summary.gain_text(row) == "+10.000 [-12.346,\u00a0+.000]"


def test_shares_of_domains_in_clusters() -> None:
    mix = pd.DataFrame(
        {"pseudo_label": [0, 0, 1], "domain": ["a", "b", "a"], "num_images": [1, 3, 1], "share": [0.25, 0.75, 1.0]}
    )
    np.testing.assert_allclose(figures.domain_shares(mix, ["a", "b"]), [[(0.25 + 1) / 2, 0.375], [0.25, 0.75]])


def test_the_table_that_matters_has_before_after_and_the_gain() -> None:
    metrics, per_query = _frames()
    found = {"domain": summary.comparisons(metrics, per_query, "domain")}
    table = summary.before_after_table(metrics, found, "fused")
    assert table.header == ["mAP", "frozen", "free", "fused", "gain"]
    assert table.rows[0] == ["birds", ".300", ".400", ".600", "+.200 [+.100,\u00a0+.300]"]
    assert [row[0] for row in table.rows] == ["birds", "cars", "mean"] and table.strong == {(0, 4)}


def test_the_share_of_the_own_domain_by_granularity() -> None:
    mix = pd.DataFrame(
        {"granularity": "k00004", "pseudo_label": [0, 0, 1], "domain": ["a", "b", "a"], "num_images": [1, 3, 1]}
    ).assign(share=[0.25, 0.75, 1.0])
    table = summary.by_domain_table(summary.own_domain(mix), "share", "own domain")
    assert table.header == ["own domain", "a", "b", "mean"]
    assert table.rows == [["k00004", ".625", ".750", ".688"]]
