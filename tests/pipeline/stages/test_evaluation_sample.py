"""A sample of queries: nothing else becomes stale, its queries have the numbers of before, and the sizes are told."""

from __future__ import annotations

import pandas as pd
import pytest

from grappa.pipeline import tables
from grappa.pipeline.commands.init import Request, initialize
from grappa.pipeline.engine.status import read_config, states
from grappa.pipeline.store.artifacts import RunFolder
from tests.helpers.tiny import draw_images, make_run, run_all, split_of, write_table, write_weights

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


def test_a_sample_is_asked_for_and_told(run: RunFolder) -> None:
    whole, before = tables.load_per_query(run.root).set_index(KEYS), tables.load_metrics(run.root)
    assert "num_possible_queries" not in before and not _stale(run)
    initialize(run.root, Request([], None, ["evaluation.max_queries=6"], None), say=lambda line: None)
    assert _stale(run) == {"evaluation"}
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
