"""The stages `objects` and `object_features` and the row of the gate, in whole runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from grappa.images.caching.uncached import Originals
from grappa.images.pixels import PixelCache
from grappa.images.table import BOX_COLUMNS
from grappa.objects import grounding
from grappa.pipeline import tables
from grappa.pipeline.config.yaml_file import ConfigError
from grappa.pipeline.engine.status import read_config, states
from grappa.pipeline.store.artifacts import RunFolder
from tests.helpers.tiny import digests, draw_images, make_run, run_all, split_of, write_table, write_weights
from tests.helpers.tiny_detector import needs_transformers, write_detector

GATE = "[zero_shot_objects]"


def _table(folder: Path, name: str, has_box: str = "discs") -> Path:
    """Write a table in which the images of a domain have the box (9, 5, 43, 39)."""

    boxes = {column: _cell(value, has_box) for column, value in zip(BOX_COLUMNS, "9 5 43 39".split(), strict=True)}
    return write_table(folder / "images", folder / name, label=lambda path: path.parent.name, split=split_of, **boxes)


def _cell(value: str, has_box: str) -> Callable[[Path], str]:
    return lambda path: value if has_box in path.parts else ""


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("material")
    draw_images(folder / "images", num_images=3)
    write_weights(folder / "weights.safetensors")
    _table(folder, "table.csv")
    return folder


@pytest.fixture(scope="module")
def seen(material: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A finished run with the backbone's boxes; tests that change it copy it first."""
    run = _make(tmp_path_factory.mktemp("runs") / "seen", material, "backbone", evaluation__extra_rows=GATE)
    run_all(run)
    return run


@pytest.fixture
def copy(seen: RunFolder, tmp_path: Path) -> RunFolder:
    return RunFolder.open(Path(shutil.copytree(seen.root, tmp_path / "copy")))


def _make(folder: Path, material: Path, provider: str, **changes: object) -> RunFolder:
    changes = {"objects__provider": provider, **changes}
    return make_run(folder, [material / "table.csv"], material / "weights.safetensors", **changes)


def _objects(run: RunFolder) -> pd.DataFrame:
    return pd.read_parquet(run.root / "objects" / "objects.parquet")


def test_without_a_provider_there_is_no_such_artifact(material: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [material / "table.csv"], material / "weights.safetensors")
    assert not [each.name for each in states(run, read_config(run)) if "object" in each.name]
    with pytest.raises(ValueError, match="nothing to run: objects has no artifact with this configuration"):
        run_all(run, stage="objects")


def test_the_artifact_holds_a_row_an_image_its_view_a_report_and_a_sheet(seen: RunFolder) -> None:
    table, images = _objects(seen), pd.read_parquet(seen.root / "images" / "images.parquet")
    assert list(table.columns) == ["image_id", *BOX_COLUMNS, "confidence", "provider", "accepted", "reason"]
    assert table["image_id"].equals(images["image_id"])
    loaded = tables.load_objects(seen.root)
    assert loaded["domain"].tolist() == images["domain"].tolist()
    assert loaded["box_x1"].tolist() == table["box_x1"].tolist()
    assert set(table["provider"]) == {"backbone"} and table["accepted"].any()
    assert table["accepted"].equals(table["reason"] == "")
    views = PixelCache.open(seen.root / "objects" / "pixels")
    assert len(views) == len(table) == 36
    report = pd.read_csv(seen.root / "objects" / "report.csv")
    assert report.groupby("domain")["num_images"].sum().tolist() == [12, 12, 12]
    with Image.open(seen.root / "objects" / "contact_sheet.jpg") as sheet:
        assert sheet.width > 500 and np.asarray(sheet).std() > 10
    log = (seen.root / "objects" / "log.jsonl").read_text().splitlines()
    assert "boxes accepted (checks " in json.loads(log[-1])["result"]


def test_object_features_are_the_frozen_backbones_of_the_views_and_the_gates_row(seen: RunFolder) -> None:
    features = np.load(seen.root / "object_features" / "features.npy")
    assert (features.shape, features.dtype) == ((36, 32), np.float32)
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=1e-5)
    plain, refused = np.load(seen.root / "features" / "features.npy"), ~_objects(seen)["accepted"].to_numpy()
    assert not np.allclose(features[~refused], plain[~refused], atol=1e-3)
    kept = np.load(seen.root / "embeddings" / "zero_shot_objects" / "embeddings.npy")
    np.testing.assert_array_equal(kept, features)
    metrics = tables.load_metrics(seen.root)
    rows = "zero_shot zero_shot_whitened zero_shot_head zero_shot_objects".split()
    assert list(dict.fromkeys(metrics["model"]))[:4] == rows
    assert not (seen.root / "heads" / "zero_shot_objects").exists()


def test_refused_images_keep_their_features(copy: RunFolder, material: Path) -> None:
    _make(copy.root, material, "backbone", objects__min_confidence=1.0)
    run_all(copy, until="object_features")
    assert set(_objects(copy)["reason"]) == {"low confidence"}
    plain, found = (np.load(copy.root / name / "features.npy") for name in ("features", "object_features"))
    np.testing.assert_array_equal(found, plain)


def test_the_gate_makes_nothing_else_stale(material: Path, seen: RunFolder, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [material / "table.csv"], material / "weights.safetensors")
    run_all(run)
    before = digests(run)
    _make(run.root, material, "backbone", evaluation__extra_rows=GATE)
    kinds = {each.name: each.state.kind for each in states(run, read_config(run))}
    assert {name for name, kind in kinds.items() if kind != "fresh"} == {
        *("objects", "object_features", "embeddings/zero_shot_objects", "retrieval/zero_shot_objects", "evaluation")
    }
    run_all(run)
    after = digests(run)
    changed = {name for name in before if after[name] != before[name]}
    assert changed == {"evaluation/metrics.csv", "evaluation/per_query.parquet"}
    assert after == digests(seen), "a run in one go gives the same bytes"


def test_boxes_of_the_table_are_taken_and_images_without_one_stay_whole(material: Path, tmp_path: Path) -> None:
    run = _make(tmp_path / "run", material, "columns", objects__enlargement=1.0, objects__max_aspect=1.0)
    run_all(run, until="objects")
    table, images = _objects(run), pd.read_parquet(run.root / "images" / "images.parquet")
    discs = (images["domain"] == "discs").to_numpy()
    assert table["accepted"].tolist() == discs.tolist()
    assert set(table["reason"][~discs]) == {"no box"} and table["confidence"][~discs].isna().all()
    assert table.loc[discs, list(BOX_COLUMNS)].drop_duplicates().to_numpy().tolist() == [[9, 5, 43, 39]]
    views, cache = (PixelCache.open(run.root / name / "pixels") for name in ("objects", "images"))
    for row in range(len(table)):
        whole = np.asarray(Image.open(Path("/") / images["path"][row]))
        np.testing.assert_array_equal(views.image(row), whole[5:39, 9:43] if discs[row] else cache.image(row))


def test_random_boxes_are_as_large_as_the_backbones_and_depend_on_the_seed(
    copy: RunFolder, seen: RunFolder, material: Path
) -> None:
    found = _objects(seen)
    _make(copy.root, material, "random")
    run_all(copy, until="objects")
    first = _objects(copy)
    sides = [set(zip(*(_side(each, axis) for axis in "xy"), strict=True)) for each in (first, found)]
    assert sides[0] <= sides[1] and first["provider"].eq("random").all()
    assert not first["box_x0"].equals(found["box_x0"])
    _make(copy.root, material, "random", objects__seed=1)
    run_all(copy, until="objects")
    assert not _objects(copy)["box_x0"].equals(first["box_x0"])


def _side(table: pd.DataFrame, axis: str) -> list[float]:
    return (table[f"box_{axis}1"] - table[f"box_{axis}0"]).round(6).tolist()


def test_a_table_without_boxes_is_refused_by_init_and_by_the_stage(material: Path, tmp_path: Path) -> None:
    none = _table(material, "none.csv", has_box="nowhere")
    changes = {"objects__provider": "columns"}
    with pytest.raises(ConfigError, match="objects.provider is columns, but no image has a box; give a table with"):
        make_run(tmp_path / "run", [none], material / "weights.safetensors", **changes)
    run = make_run(tmp_path / "run", [none], material / "weights.safetensors")
    text = run.config_path.read_text()
    run.config_path.write_text(text.replace("provider: none", "provider: columns"))
    with pytest.raises(ValueError, match="objects.provider is columns, but no image has a box"):
        run_all(run, until="objects")
    assert not (run.root / "objects").exists()


def test_originals_that_moved_are_named_and_init_mends_it(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = Path(shutil.copytree(material / "images", tmp_path / "images"))
    changes = {"objects__provider": "backbone", "compute__num_workers": 1}
    run = make_run(tmp_path / "run", [images], material / "weights.safetensors", **changes)
    run_all(run, until="features")
    first = images / pd.read_parquet(run.root / "images/images.parquet")["path"][0]
    away = first.rename(tmp_path / "away.png")
    with pytest.raises(ValueError, match=rf"original {first} cannot be read now .*grappa init RUN --images"):
        run_all(run, stage="objects")
    away.rename(first)
    moved = images.rename(tmp_path / "moved")
    with monkeypatch.context() as patch:
        patch.setattr("grappa.pipeline.stages.objects.extract", None)  # no box is sought for nothing
        with pytest.raises(ValueError, match=rf"folder {images} of the originals is gone: .*grappa init RUN --images"):
            run_all(run, stage="objects", force=True)
    make_run(run.root, [moved], material / "weights.safetensors", **changes)
    assert [line.partition(":")[0] for line in run_all(run, until="objects")] == ["objects"]


def test_interrupted_work_goes_on_and_ends_with_the_same_bytes(
    copy: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, full = digests(copy), Originals.full
    calls: list[int] = []

    def stop(originals: Originals, row: int) -> Any:
        calls.append(row)
        if len(calls) == 25:
            raise KeyboardInterrupt
        return full(originals, row)

    with monkeypatch.context() as patch:
        patch.setattr(Originals, "full", stop)
        with pytest.raises(KeyboardInterrupt):
            run_all(copy, stage="objects", force=True)
    assert digests(copy) == before, "the old result stays until the new one is whole"
    monkeypatch.setattr("grappa.pipeline.stages.objects.extract", None)
    run_all(copy, stage="objects", force=True)
    log = [json.loads(line) for line in (copy.root / "objects" / "log.jsonl").read_text().splitlines()]
    assert [each["new"] for each in log if each.get("task") == "cutting views"] == [36]
    assert digests(copy) == before


@needs_transformers
def test_a_detector_is_part_of_the_fingerprint_by_its_files(material: Path, tmp_path: Path) -> None:
    model = write_detector(tmp_path / "detector")
    changes = {"objects__model": model, "objects__min_confidence": 0.0, "objects__prompt": "a bird."}
    run = _make(tmp_path / "run", material, "grounding_dino", **changes)
    run_all(run, until="object_features")
    assert set(_objects(run)["provider"]) == {"grounding_dino"} and _objects(run)["confidence"].between(0, 1).any()
    kinds = {each.name: each.state.kind for each in states(run, read_config(run))}
    assert kinds["objects"] == kinds["object_features"] == "fresh"
    moved = Path(shutil.copytree(model, tmp_path / "moved"))
    _make(run.root, material, "grounding_dino", **{**changes, "objects__model": moved})
    assert run_all(run, until="object_features") == []
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps({**config, "num_queries": 11}))
    (stale,) = [each for each in states(run, read_config(run)) if each.name == "objects"]
    assert str(stale.state) == "stale: input detector: content changed"


@needs_transformers
def test_a_detection_that_was_interrupted_goes_on_at_its_image(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"objects__model": write_detector(tmp_path / "detector"), "compute__checkpoint_seconds": 0.000001}
    run = _make(tmp_path / "run", material, "grounding_dino", **changes)
    run_all(run, until="objects")
    before, real, calls = digests(run), grounding.detect, list[int]()

    def stop(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 21:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr("grappa.pipeline.stages.objects.detect", stop)
    with pytest.raises(KeyboardInterrupt):
        run_all(run, stage="objects", force=True)
    run_all(run, stage="objects", force=True)
    assert len(calls) == 21 + 16, "20 of 36 images were done"
    assert digests(run) == before


def test_a_detector_that_is_not_there_is_refused_by_init(material: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"objects.model: /no/such/folder is no folder with a model; give one that"):
        _make(tmp_path / "run", material, "grounding_dino", objects__model="/no/such/folder")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty is no folder with a model"):
        _make(tmp_path / "run", material, "grounding_dino", objects__model=tmp_path / "empty")
