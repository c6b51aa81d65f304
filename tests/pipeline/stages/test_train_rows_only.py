"""What learns sees train images only: other pixels and features of the test images change nothing that is learned."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from grappa.images.pixels import PixelCache, shard_file
from grappa.pipeline.engine import execution
from grappa.pipeline.store.artifacts import RunFolder
from tests.helpers.tiny import digests, draw_images, make_run, run_all, split_of, write_table, write_weights

LEARNED = {
    "whitening": "head.safetensors",
    "clusters": "centroids.npy",
    "adaptors": "adaptors.safetensors",
    "fusion": "fusion.safetensors",
    "student": "student.safetensors",
    "heads": "head.safetensors",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run with test images of other pixels, features and embeddings than it was made of."""
    folder = tmp_path_factory.mktemp("train_rows")
    table = write_table(draw_images(folder / "images"), folder / "table.csv", split=split_of)
    made = make_run(folder / "run", [table], write_weights(folder / "weights.safetensors"))
    run_all(made, until="heads")
    test = (pd.read_parquet(made.root / "images/images.parquet")["split"] == "test").to_numpy()
    _invert(made.root / "images/pixels", test)
    features = [made.root / name for name in ("features/features.npy", "whitening/features/features.npy")]
    for file in [*features, *made.root.glob("embeddings/*/embeddings.npy")]:
        rows = np.load(file)
        rows[test] = -rows[test][::-1]
        np.save(file, rows)
    return made


def _invert(folder: Path, chosen: np.ndarray) -> None:
    cache = PixelCache.open(folder)
    for shard, start, height, width in cache.index[chosen].tolist():
        pixels = np.load(shard_file(folder, shard), mmap_mode="r+")
        pixels[start : start + height * width * 3] ^= 255


@pytest.mark.parametrize("stage", LEARNED)
def test_test_images_teach_nothing(run: RunFolder, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "_refuse_damaged_inputs", lambda *arguments: None)
    before = {name: digest for name, digest in digests(run).items() if name.endswith(LEARNED[stage])}
    lines = run_all(run, stage=stage, force=True)
    if stage == "whitening":
        run_all(run, stage="neighbors", force=True)  # those of test images are others now
    assert len(before) >= len(lines) >= 1
    after = digests(run)
    assert {name: after[name] for name in before} == before


def test_neighbors_are_train_images(run: RunFolder) -> None:
    train = (pd.read_parquet(run.root / "images/images.parquet")["split"] == "train").to_numpy()
    assert train[np.load(run.root / "neighbors/neighbors.npy")].all()
