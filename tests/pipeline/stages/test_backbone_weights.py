"""Stage ``backbone``: weights in a layout of somebody else's, in folders, in shards; refused where they are no use."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from grappa.backbone.weights import BackboneError
from grappa.pipeline.engine.status import states
from grappa.pipeline.store.artifacts import RunFolder
from tests.helpers.tiny import draw_images, make_run, run_all, tiny_backbone

State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_images(tmp_path_factory.mktemp("weights") / "images", num_classes=2)


def kind_of(run: RunFolder) -> str:
    from grappa.pipeline.engine.status import read_config

    return next(each.state.kind for each in states(run, read_config(run)) if each.node.stage == "backbone")


def state() -> State:
    return dict(tiny_backbone().model.state_dict())


def test_the_stage_says_what_it_took_and_what_it_ignored(images: Path, tmp_path: Path) -> None:
    teacher = {f"backbone.{name}": value for name, value in state().items()} | {"head.mlp.0.weight": torch.ones(2)}
    student = {f"module.backbone.{name}": value + 1 for name, value in state().items()}
    torch.save({"student": student, "teacher": teacher, "epoch": 3}, tmp_path / "checkpoint.pth")
    run = make_run(tmp_path / "run", [images], tmp_path / "checkpoint.pth")
    said = run_all(run, stage="backbone")
    assert any(
        "taken from teacher.backbone (not student.module.backbone); ignored: teacher.head" in line for line in said
    )
    kept = load_file(run.artifact("backbone").path / "weights.safetensors")
    assert all(torch.equal(kept[name], value) for name, value in state().items())


def test_weights_with_nan_are_refused_and_nothing_is_published(images: Path, tmp_path: Path) -> None:
    broken = state()
    broken["blocks.1.mlp.fc1.weight"][0, 0] = torch.nan
    torch.save({"model": broken}, tmp_path / "w.pth")
    run = make_run(tmp_path / "run", [images], tmp_path / "w.pth")
    with pytest.raises(BackboneError, match=r"w.pth hold NaN or infinity \(first: blocks.1.mlp.fc1.weight\)"):
        run_all(run, stage="backbone")
    assert kind_of(run) != "fresh"


def test_a_folder_is_known_by_its_file_and_shards_by_each(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(state(), folder / "model.safetensors")
    run = make_run(tmp_path / "run", [images], folder)
    run_all(run, stage="backbone")
    save_file(state(), tmp_path / "moved.safetensors")
    make_run(tmp_path / "run", [images], tmp_path / "moved.safetensors")
    assert kind_of(run) == "fresh", "the same bytes"
    names = sorted(state())
    parts = {name: f"part-{place % 2}.safetensors" for place, name in enumerate(names)}
    for file in set(parts.values()):
        save_file({name: state()[name] for name in names if parts[name] == file}, folder / file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))
    make_run(tmp_path / "run", [images], folder)
    assert kind_of(run) == "stale"
    run_all(run, stage="backbone")
    assert kind_of(run) == "fresh"
    save_file(
        {name: state()[name] + 1 for name in names if parts[name] == "part-1.safetensors"},
        folder / "part-1.safetensors",
    )
    assert kind_of(run) == "stale"
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    assert kind_of(run) == "fresh", "the run has their content"
