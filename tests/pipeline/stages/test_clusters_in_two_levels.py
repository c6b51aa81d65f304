"""Very many clusters are made in two levels: the files are those of one level, and only such clusters become stale."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from grappa.pipeline.commands.init import Request, initialize
from grappa.pipeline.config.yaml_file import load_config
from grappa.pipeline.engine.status import read_config, states
from grappa.pipeline.graph.node import Node
from grappa.pipeline.graph.stages import settings_of
from grappa.pipeline.store.artifacts import RunFolder
from tests.helpers.tiny import draw_images, make_run, run_all, split_of, write_table, write_weights

MANY = "clusters/k00040"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run up to its clusters, whose configuration knows nothing of two levels, as older ones; half the images are
    test images."""
    folder = tmp_path_factory.mktemp("levels")
    images = write_table(
        draw_images(folder / "images", num_images=20), folder / "images.csv", split=lambda p: split_of(p)
    )
    weights = write_weights(folder / "weights.safetensors")
    run = make_run(folder / "run", [images], weights, clusters__num_clusters="[4, 9, 40]")
    lines = run.config_path.read_text().splitlines(keepends=True)
    run.config_path.write_text("".join(line for line in lines if not line.startswith("  two_level_above:")))
    run_all(run, until="clusters")
    return run


@pytest.fixture
def run(made: RunFolder, tmp_path: Path) -> RunFolder:
    shutil.copytree(made.root, tmp_path / "run", symlinks=True)
    return RunFolder.open(tmp_path / "run")


def _set(run: RunFolder, above: object) -> set[str]:
    """Change the setting; return the artifacts that are stale then."""
    initialize(run.root, Request([], None, [f"clusters.two_level_above={above}"], None), say=lambda line: None)
    return _stale(run)


def _stale(run: RunFolder) -> set[str]:
    return {str(each.node) for each in states(run, read_config(run)) if each.state.kind not in ("fresh", "missing")}


def _found(run: RunFolder) -> tuple[pd.DataFrame, np.ndarray]:
    folder = run.artifact(MANY).home
    return pd.read_parquet(folder / "assignments.parquet"), np.load(folder / "centroids.npy")


def test_older_runs_know_one_level_and_stay_fresh(run: RunFolder) -> None:
    assert load_config(run.config_path).clusters.two_level_above is None and not _stale(run)


def test_a_bound_makes_stale_only_what_it_makes_in_another_way(run: RunFolder) -> None:
    assert not _set(run, 100_000) and not _set(run, 40)
    assert _set(run, 39) == {MANY}
    run_all(run, until="clusters")
    assert not _stale(run)
    assert not _set(run, 12), "k00040 is made as before"
    assert _set(run, 5) == {"clusters/k00009"}
    assert _set(run, "null") == {MANY}


def test_the_reason_says_what_changed(run: RunFolder) -> None:
    _set(run, 12)
    state = next(each.state for each in states(run, read_config(run)) if str(each.node) == MANY)
    assert state.reasons == ["config clusters.in_two_levels: (not there) -> true"]
    assert settings_of(Node("clusters", "k00040"), read_config(run))["clusters.in_two_levels"] is True
    assert set(settings_of(Node("clusters", "k00009"), read_config(run))) == {
        "clusters.num_iterations",
        "clusters.seed",
    }


def test_the_files_have_the_same_form(run: RunFolder) -> None:
    """Labels are those of near centroids; test images have theirs too."""
    before, centroids = _found(run)
    _set(run, 12)
    lines = run_all(run, until="clusters")
    after, others = _found(run)
    assert (after.dtypes == before.dtypes).all() and (after["image_id"] == before["image_id"]).all()
    assert others.shape == centroids.shape and others.dtype == centroids.dtype and (others != centroids).any()
    features = np.load(run.artifact("whitening/features").home / "features.npy").astype(np.float32)
    cosines = (features * others[after["pseudo_label"]]).sum(1)
    np.testing.assert_allclose(after["distance"], 1 - cosines, atol=1e-5)
    assert (after["pseudo_label"] == (features @ others.T).argmax(1)).mean() > 0.9
    assert any("40 clusters of 120 images" in line and "0 empty" in line for line in lines), lines
