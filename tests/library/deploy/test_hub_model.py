"""Models on the Hugging Face hub, against a stand-in of its API: pushed, opened, from the cache, out of reach."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import grappa
from grappa.deploy.hub_model import push
from grappa.model import ModelError, save_model
from grappa.model_folder import seal
from grappa.pipeline.cli import app
from tests.helpers.hub_stand_in import Hub, stand_in
from tests.helpers.tiny import tiny_backbone, tiny_set

NAME = "somebody/some-model"
IMAGE = np.full((40, 50, 3), 90, np.uint8)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with stand_in() as (hub, address):
        _use(address, tmp_path / "cache", monkeypatch)
        yield hub


def _use(address: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    save_model(path, tiny_backbone(), {"student": tiny_set(1)}, None, cache_size=40)
    seal(path, {"commit": "abc"})
    (path / "README.md").write_text("---\nlibrary_name: grappa\n---\n# A model\n")
    return path


def test_a_pushed_model_is_opened_by_its_name(hub: Hub, folder: Path) -> None:
    (folder / "private_notes.txt").write_text("not for the hub")
    done = CliRunner().invoke(app, ["push", str(folder), NAME])
    assert done.exit_code == 0, done.output
    assert f"grappa.load_model('hf-hub:{NAME}')" in " ".join(done.output.split())
    assert set(hub.repositories[NAME]) == {"README.md", "model.json", "weights.safetensors"}
    model = grappa.load_model(f"hf-hub:{NAME}")
    np.testing.assert_array_equal(model.encode([IMAGE]), grappa.load_model(folder).encode([IMAGE]))


def test_what_the_cache_holds_is_opened_without_the_hub(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(folder, NAME)
    first = grappa.load_model(f"hf-hub:{NAME}").encode([IMAGE])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub.asked.clear()
    np.testing.assert_array_equal(grappa.load_model(f"hf-hub:{NAME}").encode([IMAGE]), first)
    assert hub.asked == []


def test_a_hub_out_of_reach_is_one_sentence_in_seconds(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _use("http://localhost:1", tmp_path / "cache", monkeypatch)
    began = time.monotonic()
    with pytest.raises(ModelError, match="would come from the hub, but localhost cannot be reached from here"):
        grappa.load_model(f"hf-hub:{NAME}")
    with pytest.raises(ValueError, match="localhost cannot be reached from here; nothing was sent"):
        push(folder, NAME)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("name", ["x", "../x", "a/b/c", "a/b@", "a/..", " a/b", "a/b c", "a\n/b", ""])
def test_names_that_the_hub_cannot_have_are_refused(hub: Hub, folder: Path, name: str) -> None:
    for call in (lambda: grappa.load_model(f"hf-hub:{name}"), lambda: push(folder, name)):
        with pytest.raises(ValueError, match="expected"):
            call()
    assert hub.asked == []


def test_a_repository_without_a_model_or_none_at_all_is_said(hub: Hub) -> None:
    with pytest.raises(ModelError, match="could not be had from the hub: it answers 404; give another name"):
        grappa.load_model("hf-hub:nobody/nothing")
    hub.repositories[NAME] = {"README.md": b"text"}
    with pytest.raises(ModelError, match="holds no model of Grappa"):
        grappa.load_model(f"hf-hub:{NAME}")


def test_a_refused_push_says_what_to_do(hub: Hub, folder: Path) -> None:
    hub.refuses = 401
    with pytest.raises(ValueError, match="it answers 401; log in by `hf auth login`"):
        push(folder, NAME)


def test_only_a_whole_exported_folder_is_sent(hub: Hub, folder: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(folder, tmp_path / "damaged")
    data = bytearray((damaged / "weights.safetensors").read_bytes())
    data[-1] ^= 1
    (damaged / "weights.safetensors").write_bytes(data)
    with pytest.raises(ModelError, match="not the file that was exported"):
        push(damaged, NAME)
    (folder / "README.md").unlink()
    with pytest.raises(ModelError, match=r"has no README.md, the model card"):
        push(folder, NAME)
    with pytest.raises(ModelError, match="has no model.json"):
        push(tmp_path, NAME)
    assert hub.asked == []
