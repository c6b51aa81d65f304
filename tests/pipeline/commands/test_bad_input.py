"""What goes wrong with real stages ends in one sentence, a non-zero exit code, and nothing lost."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from grappa.method.losses import Classified
from grappa.pipeline import tables
from grappa.pipeline.cli import app
from grappa.pipeline.engine.status import read_config, states
from grappa.pipeline.store.artifacts import RunFolder
from tests.helpers.tiny import draw_images, make_run, run_all, tiny_backbone, write_weights

CLI = CliRunner()


@pytest.fixture
def desk(tmp_path: Path) -> Path:
    draw_images(tmp_path / "images", num_classes=2, num_images=4)
    write_weights(tmp_path / "weights.safetensors")
    return tmp_path


def _fails(run: RunFolder, *options: str) -> str:
    result = CLI.invoke(app, ["run", str(run.root), *options])
    assert result.exit_code == 1
    lines = result.stderr.strip().splitlines()
    assert lines[-1].startswith("grappa: "), lines
    assert "Traceback" not in result.output
    return lines[-1]


def _ruin(paths: list[Path], desk: Path) -> RunFolder:
    for path in paths:
        path.write_bytes(path.read_bytes()[:40])
    return make_run(desk / "run", [desk / "images"], desk / "weights.safetensors")


def test_when_all_images_are_broken_the_stage_stops(desk: Path) -> None:
    sentence = _fails(_ruin(sorted((desk / "images").rglob("*.png")), desk))
    assert "24 of 24 files could not be used" in sentence
    assert "first: checks/class_0/0.png: not an image" in sentence


def test_too_many_broken_images_stop_a_few_are_listed(desk: Path) -> None:
    run = _ruin(sorted((desk / "images").rglob("0.png"))[:3], desk)
    assert "3 of 24 files could not be used (images.max_rejected allows 5%)" in _fails(run)
    make_run(run.root, [], desk / "weights.safetensors", images__max_rejected=0.2)
    (said,) = (line for line in run_all(run, until="features") if line.startswith("images: "))
    assert said.startswith("images: 21 images of 3 domains, 3 rejected (first checks/class_0/0.png: not an image in ")
    assert "; all are in images/rejected.parquet), 0 exact duplicates" in said
    rejected = tables.load_rejected(run.root)
    assert len(rejected) == 3
    assert len(np.load(run.root / "features" / "features.npy")) == 21


def test_images_that_changed_since_init_ask_for_init(desk: Path) -> None:
    run = make_run(desk / "run", [desk / "images"], desk / "weights.safetensors")
    victim = next((desk / "images").rglob("3.png"))
    victim.write_bytes(victim.read_bytes() + b"more")
    assert "run `grappa init` again" in _fails(run)


def test_weights_that_do_not_fit_are_named(desk: Path) -> None:
    state = dict(tiny_backbone().model.state_dict())
    state.pop("norm.weight")
    save_file(state, desk / "weights.safetensors")
    run = make_run(desk / "run", [desk / "images"], desk / "weights.safetensors")
    assert "1 tensors missing (first: norm.weight)" in _fails(run)


def test_an_unknown_model_gets_a_suggestion(desk: Path) -> None:
    sentence = r"backbone\.name: timm has no model called 'vit_tyni_patch16_224'; did you mean vit_tiny_patch16_224\?"
    with pytest.raises(ValueError, match=sentence):
        make_run(desk / "run", [desk / "images"], desk / "weights.safetensors", backbone__name="vit_tyni_patch16_224")
    assert not (desk / "run").exists()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"fusion__num_neighbors": 9}, "fusion.num_neighbors is 9 but neighbors.num_neighbors keeps 4"),
        ({"fusion__attention_loss": "none"}, "nothing to train"),
        ({"backbone__std": "[0, 0.5, 0.5]"}, "backbone.std"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_init(desk: Path, changes: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make_run(desk / "run", [desk / "images"], desk / "weights.safetensors", **changes)


def test_allowing_more_broken_images_decodes_nothing_again(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = _ruin(sorted((desk / "images").rglob("0.png"))[:3], desk)
    _fails(run)
    make_run(run.root, [], desk / "weights.safetensors", images__max_rejected=0.2)
    monkeypatch.setattr("grappa.images.ingest.decode_bytes", None)
    run_all(run, until="images")
    assert len(tables.load_rejected(run.root)) == 3


def test_divergence_and_no_memory_are_sentences(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(desk / "run", [desk / "images"], desk / "weights.safetensors")
    nan = torch.tensor(float("nan"), requires_grad=True)
    with monkeypatch.context() as patch:
        diverged = Classified(nan * 1, nan.detach(), torch.zeros(1).bool())
        patch.setattr("grappa.method.losses.classified", lambda *arguments, **options: diverged)
        assert "lower the learning rate" in _fails(run)

    class OutOfMemoryError(RuntimeError):
        """Named as torch's."""

    def fail(context: object) -> str:
        raise OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr("grappa.pipeline.stages.adaptors.run", fail)
    assert "out of memory (CUDA out of memory. Tried to allocate 2 GiB); lower" in _fails(run)


def test_too_few_different_images_for_the_clusters_are_refused(desk: Path) -> None:
    same = (desk / "images" / "discs" / "class_0" / "0.png").read_bytes()
    for path in (desk / "images").rglob("*.png"):
        path.write_bytes(same)
    with pytest.raises(ValueError, match="only 1 of 24 train images differ, the others are copies; give at least 16"):
        make_run(desk / "run", [desk / "images"], desk / "weights.safetensors")
    for number, path in enumerate((desk / "images").rglob("*.png")):
        path.write_bytes(same + b"%d" % number)  # other files with the same pixels
    run = make_run(desk / "run", [desk / "images"], desk / "weights.safetensors")
    assert "only 1 of 24 images differ; ask for fewer" in _fails(run)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1600k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_said_in_a_sentence_and_room_lets_the_same_command_finish(desk: Path, small_disk: Path) -> None:
    run = make_run(small_disk / "run", [desk / "images"], desk / "weights.safetensors")
    filler = small_disk / "filler"
    names = "backbone images features clusters adaptors fusion model retrieval evaluation index attention"
    for stage in names.split():
        _fill(filler, small_disk)
        assert "The disk is full" in _fails(run, "--until", stage), stage
        filler.unlink()
        run_all(run, until=stage)
    assert {each.state.kind for each in states(run, read_config(run), verify=True)} == {"fresh"}


def _fill(filler: Path, disk: Path) -> None:
    """Leave a few kilobytes: enough for a lock, too few for any artifact."""
    free = shutil.disk_usage(disk).free
    filler.write_bytes(b"0" * max(0, free - 12 * 1024))
