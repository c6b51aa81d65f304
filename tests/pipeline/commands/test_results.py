"""The result table from a metrics.csv, and the stage times."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import pytest

from grappa.pipeline.commands.run import caption, print_table, read_table, times_line

METRICS = """\
model,domain,gallery,num_queries,map,map_se
zero_shot,birds,domain,10,0.25,0.01
zero_shot,[cars],domain,10,nan,
zero_shot,_mean,domain,20,0.25,0.01
zero_shot,birds,merged,10,0.2,0.01
zero_shot,_mean,merged,20,0.2,0.01
fused,birds,domain,10,0.51249,0.01
fused,[cars],domain,10,0.125,0.01
fused,_mean,domain,20,0.318,0.01
fused,_mean,merged,20,0.30,0.01
"""
GAPS = (
    "birds,domain,10,0.5,0.01",
    "[cars],domain,10,0.5,0.01",
    "_mean,domain,20,0.35,0.01",
    "_mean,merged,20,0.19,0.01",
)


PLACES = ("birds,domain", "_mean,domain", "birds,merged", "_mean,merged")


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def metrics(tmp_path: Path) -> Path:
    path = tmp_path / "metrics.csv"
    path.write_text(METRICS)
    return path


def test_rows_are_models_and_columns_domains_then_the_means(metrics: Path) -> None:
    header, rows = read_table(metrics)
    assert header == ["mAP", "birds", "[cars]", "mean", "gain", "merged mean"]
    assert rows == [
        ["zero_shot", "0.250", "-", "0.250", "-", "0.200"],
        ["fused", "0.512", "0.125", "0.318", "+27.2%", "0.300"],
    ]


def test_a_perfect_collection_has_a_table(tmp_path: Path) -> None:
    rows = [f"{model},{place},1,1.0,0.0" for model in ("zero_shot", "fused", "supervised") for place in PLACES]
    (tmp_path / "metrics.csv").write_text("\n".join(["model,domain,gallery,num_queries,map,map_se", *rows, ""]))
    _, found = read_table(tmp_path / "metrics.csv")
    assert found[1] == ["fused", "1.000", "1.000", "-", "1.000"] and found[-1] == ["gap closed", "-", "-", "", "-"]


def test_plain_columns_without_a_terminal(metrics: Path) -> None:
    stream = StringIO()
    print_table(metrics, stream)
    assert stream.getvalue().splitlines() == [
        "mAP        birds  [cars]   mean    gain  merged mean",
        "zero_shot  0.250       -  0.250       -        0.200",
        "fused      0.512   0.125  0.318  +27.2%        0.300",
    ]


def test_the_gain_counts_against_the_better_of_the_two_zero_shot_rows(metrics: Path) -> None:
    with metrics.open("a") as file:
        file.write("zero_shot_whitened,_mean,domain,20,0.4,0.01\n")
    assert [(row[0], row[-2]) for row in read_table(metrics)[1]] == [
        ("zero_shot", "-37.5%"),
        ("fused", "-20.5%"),
        ("zero_shot_whitened", "-"),
    ]


def test_a_ruled_table_on_a_terminal(metrics: Path) -> None:
    stream = Terminal()
    print_table(metrics, stream)
    assert "[cars]" in stream.getvalue() and "─" in stream.getvalue()


def test_the_last_column_is_told_without_labels_too(metrics: Path) -> None:
    lines = metrics.read_text().splitlines()
    shares = ["reciprocity"] + ["0.7" if ",merged," in line else "0.6" for line in lines[1:]]
    metrics.write_text("".join(f"{line},{share}\n" for line, share in zip(lines, shares, strict=True)))
    header, rows = read_table(metrics)
    assert header[-2:] == ["merged mean", "reciprocity"]
    assert rows[1] == ["fused", "0.512", "0.125", "0.318", "+27.2%", "0.300", "0.700"]
    number = lines[0].split(",").index("map")
    blank = [",".join("" if at == number else cell for at, cell in enumerate(line.split(","))) for line in lines[1:]]
    metrics.write_text("".join(f"{a},{b}\n" for a, b in zip([lines[0], *blank], shares, strict=True)))
    assert read_table(metrics) == (["", "reciprocity"], [["zero_shot", "0.700"], ["fused", "0.700"]])


def test_a_sample_of_queries_is_told_and_only_that(metrics: Path) -> None:
    assert caption(metrics) == "", "as older runs have it"
    lines = metrics.read_text().splitlines()
    header = f"{lines[0]},num_possible_queries,num_images,num_reciprocity_images\n"
    queries = "20 of 50,000 queries, each against all images (evaluation.max_queries)"
    reciprocity = "reciprocity is that of 1,000 of 60,000 images"
    for sizes, said in (
        ("50000,60000,1000", f"{queries}; {reciprocity}"),
        ("20,60000,1000", reciprocity),
        ("0,60000,1000", reciprocity),
        ("20,20,20", ""),
    ):
        metrics.write_text(header + "".join(f"{line},{sizes}\n" for line in lines[1:]))
        assert caption(metrics) == said


def test_nothing_is_printed_without_labels(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text(METRICS.splitlines()[0] + "\n")
    stream = StringIO()
    print_table(tmp_path / "metrics.csv", stream)
    assert stream.getvalue() == ""


def test_times_are_one_line() -> None:
    assert times_line({"images": 1.23, "fusion": 125.0}) == "times: images 1.2 s, fusion 2:05; together 2:06"


def test_the_closed_gap_is_told_where_labels_bring_something(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    supervised = "".join(f"supervised,{cells}\n" for cells in GAPS)
    path.write_text(METRICS + supervised)
    _, rows = read_table(path)
    assert [row[0] for row in rows] == ["zero_shot", "fused", "supervised", "gap closed"]
    assert rows[-1][1:] == ["105%", "-", "68%", "", "-"]
