"""Models are evaluated one by one. A sample of queries: nothing else becomes stale, its numbers are those of before."""

from __future__ import annotations

import shutil

import pandas as pd
import pytest

from grappa.pipeline import tables
from grappa.pipeline.commands.init import Request, initialize
from grappa.pipeline.engine.status import read_config, states
from grappa.pipeline.store.artifacts import RunFolder
from tests.helpers.tiny import digests, draw_images, make_run, run_all, split_of, write_table, write_weights

KEYS = ["model", "gallery", "image_id"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run of one set whose configuration knows nothing of samples, as older ones."""
    folder = tmp_path_factory.mktemp("sample")
    weights = write_weights(folder / "weights.safetensors")
    draw_images(folder / "images")
    write_table(folder / "images", folder / "table.csv", label=lambda path: path.parent.name, split=split_of)
    one_set = {"model__source": "single", "clusters__num_clusters": "[4]"}
    run = make_run(folder / "run", [folder / "table.csv"], weights, evaluation__max_queries="null", **one_set)
    lines = run.config_path.read_text().splitlines(keepends=True)
    run.config_path.write_text("".join(line for line in lines if not line.startswith("  max_queries:")))
    run_all(run)
    return run


def _stale(run: RunFolder) -> set[str]:
    return {str(each.node) for each in states(run, read_config(run)) if each.state.kind != "fresh"}


def test_one_model_is_evaluated_without_the_others(run: RunFolder) -> None:
    before = digests(run)
    shutil.rmtree(run.root / "retrieval" / "k00004")
    assert _stale(run) == {"retrieval/k00004", "evaluation"}
    lines = run_all(run, stage="retrieval", instance="k00004")
    assert [line.partition(" (")[0] for line in lines] == ["retrieval/k00004: 30 queries among 30 labeled test images"]
    assert digests(run) == before and not _stale(run)


def test_a_models_queries_are_rows_of_the_image_table(run: RunFolder) -> None:
    own = pd.read_parquet(run.root / "retrieval" / "k00004" / "per_query.parquet")
    images = pd.read_parquet(run.root / "images" / "images.parquet")
    assert not {"image_id", "domain", "label"} & set(own)
    drawn = images.iloc[own.pop("row")].reset_index(drop=True)
    own = own.assign(image_id=drawn["image_id"], domain=drawn["domain"])
    joined = pd.read_parquet(run.root / "evaluation" / "per_query.parquet")
    joined = joined[joined["model"] == "k00004"].drop(columns="model").reset_index(drop=True)
    pd.testing.assert_frame_equal(own[joined.columns], joined, check_exact=True)


def test_a_sample_is_asked_for_and_told(run: RunFolder) -> None:
    whole, before = tables.load_per_query(run.root).set_index(KEYS), tables.load_metrics(run.root)
    assert "num_possible_queries" not in before and not _stale(run)
    initialize(run.root, Request([], None, ["evaluation.max_queries=6"], None), say=lambda line: None)
    assert {name.partition("/")[0] for name in _stale(run)} == {"retrieval", "evaluation"}
    run_all(run)
    drawn, metrics = tables.load_per_query(run.root).set_index(KEYS), tables.load_metrics(run.root)
    assert len(drawn) == 6 * 2 * metrics["model"].nunique()
    pd.testing.assert_frame_equal(drawn, whole.loc[drawn.index], check_exact=True)
    mean = metrics[metrics["domain"] == "_mean"]
    assert set(mean["num_queries"]) == {6} and set(mean["num_possible_queries"]) == {30}
    assert set(mean["num_reciprocity_images"]) == {6}
    assert set(metrics[metrics["domain"] != "_mean"]["num_queries"]) == {2}
    initialize(run.root, Request([], None, ["evaluation.max_queries=auto"], None), say=lambda line: None)
    run_all(run)
    again = tables.load_metrics(run.root)
    pd.testing.assert_frame_equal(again[before.columns], before, check_exact=True)
    assert (again["num_reciprocity_images"] == again["num_possible_queries"]).all()
