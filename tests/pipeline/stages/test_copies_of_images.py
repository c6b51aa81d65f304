"""Copies of one file have one cluster, also where some are learned from and others tested."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from grappa.pipeline.stages import clusters
from grappa.pipeline.tables import load_assignments
from tests.helpers.tiny import draw_images, make_run, run_all, write_table, write_weights


def test_the_cluster_of_a_learned_copy_counts_for_all() -> None:
    ids = ["a", "a-2", "a-3", "b", "c", "c-2"]
    images = pd.DataFrame({"image_id": ids, "duplicate_of": ["", "a", "a", "", "", "c"]})
    images["split"] = ["test", "train", "train", "train", "test", "test"]
    features = np.array([[1.0], [1.0], [1.0], [1.0], [2.0], [3.0]], np.float32)
    found = dict(clusters.copies(images, features))
    assert {row: other for row, other in found.items() if row != other} == {0: 1, 2: 1}


@pytest.mark.parametrize("learned", ["train", "test"])
def test_copies_have_one_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, learned: str) -> None:
    draw_images(tmp_path / "images", num_classes=2, num_images=4)
    for file in sorted((tmp_path / "images").rglob("0.png")):
        shutil.copy(file, file.with_name("z.png"))
    split = {"z.png": learned, "0.png": "test" if learned == "train" else "train"}
    table = write_table(tmp_path / "images", tmp_path / "t.csv", split=lambda path: split.get(path.name, "train"))
    weights = write_weights(tmp_path / "weights.safetensors")
    run = make_run(tmp_path / "run", [table], weights, compute__inference_batch_size=4)
    monkeypatch.setattr(clusters, "assign", other_clusters)
    run_all(run, until="clusters")
    found = load_assignments(run.root)
    copied = found.groupby(found.index.str.partition("-").get_level_values(0))
    assert (copied.size() == 2).sum() == 6
    assert (copied[["k00004", "k00008", "k00004_distance", "k00008_distance"]].nunique() == 1).all(axis=None)


def other_clusters(features: np.ndarray, centroids: np.ndarray, *, device: str) -> tuple[np.ndarray, np.ndarray]:
    """In place of the nearest centroids, by the number of the row: the ties of the worst rounding."""
    rows = np.arange(len(features))
    return rows % len(centroids), rows.astype(np.float32) / 100
