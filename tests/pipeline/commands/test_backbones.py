"""`grappa backbones`: columns, JSON, and what is refused."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from grappa.backbone.naming import catalog
from grappa.pipeline.cli import app
from grappa.pipeline.commands.backbones import found_backbones, say_backbones


def _said(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["backbones", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the hub with the weights of one model."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    file = tmp_path / "models--timm--vit_small_patch16_224.dino/snapshots/abc/model.safetensors"
    file.parent.mkdir(parents=True)
    file.write_bytes(bytes(2_500_000))
    return file


def test_a_line_for_each_model(hub: Path) -> None:
    header, *lines, last = _said("vit*_224.dino").splitlines()
    assert header.split() == ["name", "input", "width", "family", "weights"]
    assert [line.split() for line in lines[-2:]] == [
        ["vit_small_patch8_224.dino", "224", "384", "vision_transformer", "-"],
        ["vit_small_patch16_224.dino", "224", "384", "vision_transformer", "2", "MB"],
    ]
    assert last == "4 pretrained models; the weights of 1 are on this machine; 0 are refused"


def test_json_is_all_of_stdout(hub: Path) -> None:
    (found,) = json.loads(_said("vit_small_patch16_224.dino", "--json"))
    assert found == {
        "name": "vit_small_patch16_224.dino",
        "family": "vision_transformer",
        "width": 384,
        "image_size": [224, 224],
        "weights": os.fspath(hub),
        "refused": None,
    }


def test_what_is_refused_comes_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"gcvit_{size}" for size in ("base", "small", "tiny", "xtiny", "xxtiny")]
    monkeypatch.setattr(catalog, "REFUSED", dict.fromkeys(names, "its blocks are not known"))
    lines = _said("gc?it*").splitlines()
    assert all(line.endswith("refused") for line in lines[1:6])
    assert lines[-2:] == [
        "5 pretrained models; the weights of 0 are on this machine; 5 are refused",
        "refused: gcvit_base.in1k and 4 more: its blocks are not known",
    ]


def test_no_such_name_is_a_sentence() -> None:
    result = CliRunner().invoke(app, ["backbones", "dinov9"])
    assert (result.exit_code, result.stdout) == (1, "")
    assert "no pretrained model of timm has a name like 'dinov9'" in result.stderr


def test_a_narrow_terminal_keeps_names_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    found, wide, narrow = found_backbones("dino"), list[str](), list[str]()
    say_backbones(found, wide.append)
    monkeypatch.setattr(sys, "stdout", type("Terminal", (), {"isatty": lambda self: True})())
    monkeypatch.setenv("COLUMNS", "80")
    say_backbones(found, narrow.append)
    assert [line.split() for line in narrow] == [line.split() for line in wide]
    assert max(map(len, wide)) > 80 and len(narrow[0]) <= 80
