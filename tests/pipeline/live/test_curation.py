"""Duplicates, outliers and samples of a run, in Python and on the command line."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

import grappa
from grappa.pipeline.cli import app
from grappa.pipeline.commands.init import Request, initialize
from grappa.pipeline.store.artifacts import RunFolder
from tests.helpers.tiny import draw_images, make_run, run_all, settings, write_weights


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run up to its clusters, whose images have a copy and three copies of another one."""
    folder = tmp_path_factory.mktemp("curated")
    images = draw_images(folder / "images")
    shutil.copy(images / "discs" / "class_0" / "0.png", images / "checks" / "class_0" / "copy.png")
    for number in range(3):
        shutil.copy(images / "stripes" / "class_1" / "1.png", images / "stripes" / "class_1" / f"again{number}.png")
    made = make_run(folder / "run", [images], write_weights(folder / "weights.safetensors"))
    run_all(made, until="clusters")
    run_all(made, stage="embeddings", instance="zero_shot")
    return made


def call(*words: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(word) for word in words])
    return done.exit_code, done.output


def test_copies_come_first_and_once_and_near_duplicates_by_similarity(run: RunFolder) -> None:
    found = grappa.open_run(run.root).duplicates(threshold=0.9999)
    exact, near = found[found["exact"]], found[~found["exact"]]
    assert len(exact) == 4 and found["exact"].tolist() == [True] * 4 + [False] * len(near)
    assert (exact["similarity"] == 1).all() and near["similarity"].is_monotonic_decreasing
    assert {*exact["domain"], *exact["other_domain"]} == {"checks", "discs", "stripes"}
    stripes = exact[exact["domain"] == "stripes"]
    assert stripes["other_id"].nunique() == 1 and stripes["group"].nunique() == 1
    assert not near["image_id"].isin(exact["image_id"]).any() and not near["other_id"].isin(exact["image_id"]).any()


def test_the_similarity_of_a_pair_is_that_of_its_embeddings(run: RunFolder) -> None:
    opened = grappa.open_run(run.root)
    pair = opened.duplicates(threshold=0.99).query("not exact").iloc[0]
    embeddings, ids = opened.embeddings("zero_shot")
    one, other = (embeddings[list(ids).index(pair[name])] for name in ("image_id", "other_id"))
    assert pair["similarity"] == pytest.approx(float(one @ other), abs=1e-6)
    assert opened.images()["path"][pair["other_id"]] == pair["other_path"]


def test_a_sample_is_a_part_of_a_larger_one_and_has_no_copies(run: RunFolder) -> None:
    opened = grappa.open_run(run.root)
    small, large = opened.sample(10), opened.sample(30)
    assert list(large.index[:10]) == list(small.index)
    assert (large["duplicate_of"] == "").all()
    assert set(opened.sample(30, seed=1).index) != set(large.index)
    clusters = opened.assignments().loc[opened.sample(8).index, "k00004"].value_counts()
    assert clusters.max() - clusters.min() <= 1 and len(clusters) == 4


def test_outliers_are_ranked(run: RunFolder) -> None:
    found = grappa.open_run(run.root).outliers()
    assert found["distance"].is_monotonic_decreasing and len(found) == 64
    assert (found["distance"] >= 0).all() and found["ratio"].median() == pytest.approx(1, abs=0.3)


def test_the_tables_are_written_whole_as_parquet(run: RunFolder, tmp_path: Path) -> None:
    code, output = call("duplicates", run.root, "--threshold", 0.9999, "--out", tmp_path / "pairs.parquet")
    assert code == 0 and "4 exact copies" in output and "the same bytes  stripes" in output
    pairs = pd.read_parquet(tmp_path / "pairs.parquet")
    assert [*pairs.columns][:5] == ["image_id", "other_id", "similarity", "exact", "group"]
    code, output = call("outliers", run.root, "--out", tmp_path / "outliers.parquet")
    assert code == 0 and len(pd.read_parquet(tmp_path / "outliers.parquet")) == 64
    assert sorted(path.name for path in tmp_path.iterdir()) == ["outliers.parquet", "pairs.parquet"]


def test_a_sample_is_a_table_that_init_takes(run: RunFolder, tmp_path: Path) -> None:
    code, output = call("sample", run.root, "-n", 24, "--out", tmp_path / "sample.parquet")
    assert code == 0 and output.startswith("24 images: ")
    lines: list[str] = []
    weights = run.root.parent / "weights.safetensors"
    request = Request([str(tmp_path / "sample.parquet")], None, settings(weights), None)
    initialize(tmp_path / "smaller", request, say=lines.append)
    assert lines[0].startswith("24 images of 3 domains, no split")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["sample", "RUN", "-n", 61, "--out", "OUT.parquet"],
            "n is 61, but there are 60 different images (and 4 copies)",
        ),
        (["sample", "RUN", "-n", 5, "--out", "OUT.csv"], "give a name that ends in .parquet"),
        (["duplicates", "RUN", "--threshold", 2], "the threshold is 2.0; give a cosine above 0, at most 1"),
        (["duplicates", "RUN", "--model", "nobody"], "there are no embeddings of a model 'nobody'"),
        (["duplicates", "RUN", "--model", "fused"], "heads/fused is missing"),
        (["duplicates", "NOTHING"], "There is no run folder"),
    ],
)
def test_bad_input_is_one_sentence(run: RunFolder, tmp_path: Path, words: list[object], sentence: str) -> None:
    names = {"RUN": run.root, "NOTHING": tmp_path / "nothing"}
    filled = [names.get(str(word), str(word).replace("OUT", str(tmp_path / "out"))) for word in words]
    code, output = call(*filled)
    assert code == 1 and sentence in output and len(output.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_an_existing_file_is_not_written_over(run: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "mine.parquet").write_text("mine")
    code, output = call("duplicates", run.root, "--out", tmp_path / "mine.parquet")
    assert code == 1 and "exists already" in output and (tmp_path / "mine.parquet").read_text() == "mine"
