"""Runs with one adaptor set: trained on labels or on one clustering, of each kind, without fusion and student."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import grappa
from grappa.pipeline.commands.export import export
from grappa.pipeline.commands.init import Request, initialize
from grappa.pipeline.commands.run import read_table
from grappa.pipeline.commands.search import search
from grappa.pipeline.config.yaml_file import ConfigError
from grappa.pipeline.engine.status import read_config, states
from grappa.pipeline.pages.report.page import write_report
from grappa.pipeline.store.artifacts import RunFolder
from tests.helpers.tiny import (
    digests,
    draw_images,
    make_run,
    run_all,
    settings,
    split_of,
    with_other_bytes,
    write_table,
    write_weights,
)

LABELS = {"adaptors__supervision": "labels", "model__source": "single"}


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("material")
    draw_images(folder / "images")
    write_weights(folder / "weights.safetensors")
    write_table(folder / "images", folder / "table.csv", label=lambda path: path.parent.name, split=split_of)
    return folder


def _make(folder: Path, material: Path, table: str = "table.csv", **changes: object) -> RunFolder:
    return make_run(folder, [material / table], material / "weights.safetensors", **changes)


@pytest.fixture(scope="module", params=["bottleneck", "in_context", "both"])
def run(request: pytest.FixtureRequest, material: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    made = _make(
        tmp_path_factory.mktemp("runs") / request.param,
        material,
        **LABELS,
        adaptors__kind=request.param,
        adaptors__in_context_rank=3,
        embeddings__precision="float32",
    )
    run_all(made)
    return made


def test_only_what_a_single_set_needs_is_made(run: RunFolder) -> None:
    made = states(run, read_config(run))
    assert {each.state.kind for each in made} == {"fresh"}
    names = {each.name for each in made}
    assert {"adaptors/supervised", "embeddings/supervised", "heads/supervised", "model", "index"} <= names
    assert not {name.split("/")[0] for name in names} & {"clusters", "fusion", "student", "attention"}
    models = [row[0] for row in read_table(run.artifact("evaluation").path / "metrics.csv")[1]]
    assert models == ["zero_shot", "zero_shot_whitened", "zero_shot_head", "supervised", "supervised_raw"]


def test_the_kinds_tensors_are_trained_and_change_the_embeddings(run: RunFolder) -> None:
    state = load_file(run.root / "adaptors" / "supervised" / "adaptors.safetensors")
    places = {"bottleneck": {"adaptors"}, "in_context": {"in_context"}, "both": {"adaptors", "in_context"}}
    assert {name.split(".")[0] for name in state} == places[run.root.name]
    assert all(value.any() for name, value in state.items() if name.endswith("up.weight"))
    zero, one = (np.load(run.root / "embeddings" / row / "embeddings.npy") for row in ("zero_shot", "supervised"))
    assert np.abs(zero - one).max() > 1e-3


def test_the_model_is_exported_searched_and_reported(run: RunFolder, material: Path, tmp_path: Path) -> None:
    picture = with_other_bytes(material / "images" / "discs" / "class_2" / "0.png", tmp_path)
    images = pd.read_parquet(run.root / "images" / "images.parquet")
    row = int(np.flatnonzero(images["path"].str.endswith("discs/class_2/0.png"))[0])
    assert search(run.root, picture, 3)[0]["image_id"] == images["image_id"][row]
    export(run.root, tmp_path / "model")
    model = grappa.load_model(tmp_path / "model")
    stored = np.load(run.root / "heads" / "supervised" / "embeddings.npy")
    with Image.open(picture) as opened, torch.inference_mode():
        embedding = model(model.preprocess(opened)[None])[0].numpy()
    assert float(embedding @ stored[row]) > 0.999
    in_blocks = sum(len(block.in_context) for block in (model.adaptation,))
    assert in_blocks == 0, "in-context adaptors are folded into the backbone"
    write_report(run.root, tmp_path / "report", folder=True)
    page = (tmp_path / "report" / "index.html").read_text()
    assert "supervised" in page and "Granularity attention" not in page and 'id="clusters"' not in page


def test_labels_of_test_images_change_nothing_that_is_learned(material: Path, tmp_path: Path) -> None:
    table = pd.read_csv(material / "table.csv")
    test = table["split"] == "test"
    table.loc[test, "label"] = np.random.default_rng(0).permutation(table.loc[test, "label"])
    assert (table["label"] != pd.read_csv(material / "table.csv")["label"]).any()
    table.to_csv(material / "scrambled.csv", index=False)
    found = {}
    for name in ("table.csv", "scrambled.csv"):
        made = _make(tmp_path / name, material, name, **LABELS)
        run_all(made, until="model")
        found[name] = {key: value for key, value in digests(made).items() if "labels.parquet" not in key}
    assert found["table.csv"] == found["scrambled.csv"]


@pytest.mark.parametrize("kind", ["in_context", "both"])
def test_in_context_sets_are_fused_and_taught_on_pseudo_labels(kind: str, material: Path, tmp_path: Path) -> None:
    changes = {"adaptors__kind": kind, "adaptors__in_context_rank": 3, "student__kind": "in_context"}
    made = _make(tmp_path / "run", material, **changes)
    run_all(made)
    run_all(made, stage="attention")
    attention = np.load(made.root / "attention" / "neighbors" / "attention.npy")
    assert attention.shape == (60, 4 if kind == "both" else 2, 2)
    np.testing.assert_allclose(attention.sum(-1), 1, atol=1e-3)
    stored = np.load(made.root / "heads" / "fused" / "embeddings.npy")
    model = grappa.load_model(made.root / "model")
    images = pd.read_parquet(made.root / "images" / "images.parquet")
    with Image.open(Path("/") / images["path"][3]) as opened, torch.inference_mode():
        assert float(model(model.preprocess(opened)[None])[0].numpy() @ stored[3]) > 0.99


def test_one_clustering_alone(material: Path, tmp_path: Path) -> None:
    made = _make(tmp_path / "run", material, model__source="single", clusters__num_clusters="[6]")
    lines = run_all(made)
    assert any(line.startswith("model: k00006: 1 adaptor set in") for line in lines)
    models = [row[0] for row in read_table(made.artifact("evaluation").path / "metrics.csv")[1]]
    assert models == ["zero_shot", "zero_shot_whitened", "zero_shot_head", "k00006", "k00006_raw"]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"adaptors__supervision": "labels"}, "set model.source=single"),
        ({"model__source": "single"}, r"clusters.num_clusters is \(4, 8\); give one number, or auto:1"),
        ({**LABELS, "evaluation__extra_rows": "[concat]"}, "asks for concat, which several sets have; leave it out"),
        ({**LABELS, "fusion__pairs": "[neighbors, views]"}, "asks for views, which several sets have"),
    ],
)
def test_contradictions_are_refused(changes: dict[str, object], sentence: str, material: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=sentence):
        _make(tmp_path / "run", material, **changes)


def test_supervision_without_labels_is_refused(material: Path, tmp_path: Path) -> None:
    write_table(material / "images", material / "bare.csv", split=split_of)
    with pytest.raises(ConfigError, match="adaptors.supervision is labels, but no train image has a label"):
        _make(tmp_path / "run", material, "bare.csv", **LABELS)


def test_going_back_to_pseudo_labels_keeps_what_is_fresh(run: RunFolder, material: Path, tmp_path: Path) -> None:
    copy = RunFolder.open(Path(shutil.copytree(run.root, tmp_path / "copy")))
    _make(copy.root, material, adaptors__supervision="pseudo_labels", model__source="fused")
    kinds = {each.name: each.state.kind for each in states(copy, read_config(copy))}
    assert kinds["features"] == "fresh" and kinds["clusters/k00004"] == "missing" and kinds["model"] == "stale"


def test_a_class_of_one_image_is_told(material: Path, tmp_path: Path) -> None:
    table = pd.read_csv(material / "table.csv")
    table.loc[table.index[table["split"] == "train"][0], "label"] = "alone"
    table.to_csv(material / "alone.csv", index=False)
    lines: list[str] = []
    asked = settings(material / "weights.safetensors", **LABELS)
    initialize(tmp_path / "run", Request([str(material / "alone.csv")], None, asked, None), say=lines.append)
    assert [line for line in lines if line.startswith("warning: 1 of 7 classes have one train image, such as ")]
