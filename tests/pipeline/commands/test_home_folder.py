"""`~` begins a path wherever a user writes one; a folder that is truly called so is `./~`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

import grappa
from grappa.core.home import expanded
from grappa.images.table import list_images
from grappa.pipeline.cli import main
from grappa.pipeline.config.yaml_file import parse_settings, preset_path
from grappa.pipeline.engine.status import read_config
from grappa.pipeline.store.artifacts import RunFolder
from tests.pipeline.commands.desk import Desk, made


@pytest.fixture(autouse=True)
def home(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(desk.folder))
    monkeypatch.chdir(desk.folder)


def test_only_the_beginning_of_a_text_is_expanded(desk: Desk) -> None:
    assert expanded("~/x") == f"{desk.folder}/x"
    for path in ("./~/x", "a/~/x", "~nobody-of-this-name/x", "x~", Path("~/x")):
        assert expanded(path) == str(path)


def test_init_takes_the_home_folder_in_every_path(desk: Desk) -> None:
    (desk.folder / "w.safetensors").touch()
    detector = desk.folder / "detector"
    detector.mkdir()
    (detector / "config.json").touch()
    given = ["backbone.weights=~/w.safetensors", "objects.provider=grounding_dino", "objects.model=~/detector"]
    config = desk.init(images=["~/images/birds"], domains=["autos=~/images/cars"], assignments=given)
    assert config.images.sources == (f"{desk.images}/birds",)
    assert config.images.domains == (f"autos={desk.images}/cars",)
    assert (config.backbone.weights, config.objects.model) == (f"{desk.folder}/w.safetensors", str(detector))


def test_a_folder_that_is_called_so_is_reached(desk: Desk) -> None:
    (desk.folder / "~").mkdir()
    desk.images.rename(desk.folder / "~" / "images")
    (desk.folder / "~" / "w.safetensors").touch()
    config = desk.init(images=["./~/images"], assignments=["backbone.weights=./~/w.safetensors"])
    assert config.images.sources == (f"{desk.folder}/~/images",)
    assert config.backbone.weights == f"{desk.folder}/~/w.safetensors"
    assert desk.config == config


def test_a_configuration_that_was_edited_may_name_the_home_folder(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    made(desk, monkeypatch)
    before, path = desk.states(), desk.root / "config.yaml"
    path.write_text(path.read_text().replace(str(desk.folder), "~"))
    assert "weights: ~/weights.safetensors" in path.read_text() and "- ~/images" in path.read_text()
    assert desk.states() == before
    config = read_config(RunFolder.open(desk.root))
    assert config.backbone.weights == f"{desk.folder}/weights.safetensors"
    assert config.images.sources == (str(desk.images),)


def test_arguments_are_expanded_where_a_shell_leaves_them(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (desk.folder / "own.yaml").write_text("fusion: {seed: 5}\n")
    arguments = ["init", "~/run", "--images=~/images/birds", "--config=~/own.yaml", "--domain=x=~/images/cars"]
    monkeypatch.setattr(sys, "argv", ["grappa", *arguments])
    with pytest.raises(SystemExit) as leaving:
        main()
    assert leaving.value.code == 0, capsys.readouterr()
    assert desk.config.fusion.seed == 5
    assert desk.config.images.domains == (f"x={desk.images}/cars",)
    assert not (desk.folder / "~").exists()


def test_python_takes_the_home_folder_in_texts(desk: Desk) -> None:
    desk.new()
    assert grappa.open_run("~/run").root == desk.root
    assert len(list_images(["~/images"])) == 16
    assert preset_path("~/run/config.yaml") == desk.root / "config.yaml"
    with pytest.raises(ValueError, match=f"{desk.images}"):
        grappa.load_model("~/images")
    with pytest.raises(ValueError, match="no model called 'nothing'"):
        grappa.run("~/run", settings={"backbone.name": "nothing"}, progress=False)
    assert "~" not in os.listdir(desk.folder)


def test_another_run_may_lie_in_the_home_folder(desk: Desk) -> None:
    assert parse_settings({"clusters": {"embeddings": "~/first"}}, "here").clusters.embeddings == f"{desk.folder}/first"
