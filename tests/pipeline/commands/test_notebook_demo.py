"""The notebook of the demo runs as it stands, on fewer images and with less training."""

from __future__ import annotations

import ast
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from grappa.pipeline.demo import dataset

NOTEBOOK = Path(dataset.__file__).with_name("photographs_to_model.ipynb")
QUICK = {
    "backbone.image_size": 32,
    "images.cache_size": 32,
    "clusters.num_clusters": [4, 8],
    "neighbors.num_neighbors": 4,
    "fusion.num_neighbors": 3,
    "adaptors.num_epochs": 1,
    "adaptors.bottleneck_dim": 4,
    "student.num_epochs": 1,
    "student.bottleneck_dim": 4,
    "fusion.num_epochs": 1,
    "compute.num_threads": 1,
    "compute.num_workers": 1,
    "compute.device": "cpu",
}


def cells() -> list[str]:
    content = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert content["nbformat"] == 4
    return ["".join(each["source"]) for each in content["cells"] if each["cell_type"] == "code"]


def test_the_notebook_holds_no_output_and_no_error() -> None:
    content = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert not any(each.get("outputs") or each.get("execution_count") for each in content["cells"])
    for code in cells():
        ast.parse(code)


def test_the_notebook_runs_from_photographs_to_an_exported_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    few = partial(dataset.write_demo_images, num_images_per_class=2)
    monkeypatch.setattr(dataset, "write_demo_images", few)
    setup, *rest = cells()
    names: dict[str, Any] = {}
    exec(setup, names)
    names["SETTINGS"] |= QUICK
    for code in rest:
        exec(code, names)
    said = capsys.readouterr().out
    assert "wrote README.md, model.json, weights.safetensors to" in said and "library_name: grappa" in said
    assert names["vectors"].shape == (64, 192)
