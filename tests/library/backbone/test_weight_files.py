"""Weight files are read by their content, without running code, from every place people have them in."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from grappa.backbone.weights import BackboneError, read_state_dict

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2)}


def assert_read(path: str | Path, prefix: str = "") -> None:
    found = read_state_dict(path)
    assert set(found) == {prefix + name for name in STATE}
    assert all(torch.equal(found[prefix + name], value) for name, value in STATE.items())


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "w.ckpt", "w.bin", "w", "w.pth.tar"])
def test_a_file_is_what_its_content_says(tmp_path: Path, name: str) -> None:
    save_file(STATE, tmp_path / "plain")
    (tmp_path / "plain").rename(tmp_path / name)
    assert_read(tmp_path / name)
    if not name.endswith(".safetensors"):
        for zipped in (True, False):
            torch.save(STATE, tmp_path / name, _use_new_zipfile_serialization=zipped)
            assert_read(tmp_path / name)


def test_a_home_folder_and_local_dir_are_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    save_file(STATE, tmp_path / "model.safetensors")
    assert_read("~/model.safetensors")
    assert_read("local-dir:~")
    assert_read(f"local-dir:{tmp_path}")


def test_settings_and_numbers_beside_the_tensors_are_left_out(tmp_path: Path) -> None:
    numbers = {"best": np.float64(0.5), "step": np.int64(3), "flag": np.bool_(True), "rng": np.random.get_state()}
    content = {"state_dict": STATE, "args": argparse.Namespace(lr=0.1, out=Path("/x")), "epoch": 3, **numbers}
    for zipped in (True, False):
        torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
        found = read_state_dict(tmp_path / "w.pth")
        assert {name for name in found if name.startswith("state_dict.")} == {f"state_dict.{name}" for name in STATE}


def test_settings_of_packages_that_are_not_installed_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = {name: types.ModuleType(name) for name in ("omegaconf", "omegaconf.dictconfig", "yacs", "yacs.config")}
    configuration = type("DictConfig", (), {"__module__": "omegaconf.dictconfig"})
    node = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    setattr(modules["omegaconf.dictconfig"], "DictConfig", configuration)  # noqa: B010
    setattr(modules["yacs.config"], "CfgNode", node)  # noqa: B010
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    first, second = configuration(), node(lr=1)
    first.__dict__["content"] = {"lr": 0.1}
    torch.save({"model": STATE, "cfg": first, "more": second}, tmp_path / "w.pth")
    for name in modules:
        monkeypatch.delitem(sys.modules, name)
    assert_read(tmp_path / "w.pth", "model.")
    assert "omegaconf" not in sys.modules


@pytest.mark.parametrize("zipped", [True, False])
def test_no_code_of_a_file_is_run(tmp_path: Path, zipped: bool) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (os.system, (f"touch {tmp_path / 'ran'}",))

    for content in ({"state_dict": STATE, "extra": Evil()}, {"args": argparse.Namespace(x=Evil()), **STATE}):
        torch.save(content, tmp_path / "evil.pth", _use_new_zipfile_serialization=zipped)
        with pytest.raises(BackboneError, match=r"without running code \(it names (posix|os|nt)\.system\)"):
            read_state_dict(tmp_path / "evil.pth")
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(BackboneError, match="without running code"):
        read_state_dict(tmp_path / "evil.pkl")
    assert not (tmp_path / "ran").exists()


def test_reading_allows_nothing_to_others(tmp_path: Path) -> None:
    torch.save({"args": argparse.Namespace(), **STATE}, tmp_path / "w.pth")
    assert_read(tmp_path / "w.pth")
    assert argparse.Namespace not in torch.serialization.get_safe_globals()  # torch's own come in any order


def test_a_whole_pickled_model_is_refused_with_its_class_and_the_line_that_helps(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "w.pth")
    with pytest.raises(BackboneError, match=r"names torch.nn.modules.linear.Linear\).*model.state_dict\(\)"):
        read_state_dict(tmp_path / "w.pth")


def test_files_of_other_kinds_are_named(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "whole.pth")
    whole = (tmp_path / "whole.pth").read_bytes()
    np.savez(tmp_path / "arrays.npz", a=np.zeros(2))
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as file:
        file.writestr("a.txt", "a")
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), tmp_path / "program.pt")
    for name, content, sentence in (
        ("arrays.npz", None, "arrays of numpy"),
        ("photos.zip", None, "a zip archive without weights"),
        ("program.pt", None, "is a program"),
        ("cut.pth", whole[: len(whole) // 2], "damaged or was not copied to its end"),
        ("empty.pth", b"", "damaged or was not copied to its end"),
        ("pointer.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
        ("page.pth", b"<!DOCTYPE html><html>", "is a web page"),
        ("keras.h5", b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
        ("noise.safetensors", b"not a file", "no readable safetensors"),
        ("noise.pth", b"not a file", "no state dict"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(BackboneError, match=sentence):
            read_state_dict(tmp_path / name)


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, torch.zeros(2), {1: torch.zeros(2)}])
def test_what_holds_no_named_tensors_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(BackboneError, match="holds no state dict"):
        read_state_dict(tmp_path / "w.pth")


# ---------------------------------------------------------------- folders


def test_a_folder_of_a_model_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    torch.save({"other": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    save_file(STATE, tmp_path / "model.safetensors")
    assert_read(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert set(read_state_dict(tmp_path)) == {"other"}


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards_are_read_together_and_all_must_be_there(tmp_path: Path, kind: str) -> None:
    index = "model.safetensors.index.json" if kind == "safetensors" else "pytorch_model.bin.index.json"
    places = {name: f"part-{number}.{kind}" for number, name in enumerate(STATE)}
    for name, file in places.items():
        write: Any = save_file if kind == "safetensors" else torch.save
        write({name: STATE[name]}, tmp_path / file)
    (tmp_path / index).write_text(json.dumps({"weight_map": places}))
    assert_read(tmp_path)
    assert_read(tmp_path / index)
    (tmp_path / f"part-1.{kind}").unlink()
    with pytest.raises(BackboneError, match=rf"lists part-1.{kind}, which is not there"):
        read_state_dict(tmp_path)
    (tmp_path / index).write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    with pytest.raises(BackboneError, match="outside of its folder"):
        read_state_dict(tmp_path)


def test_a_folder_of_the_hubs_cache_is_read(tmp_path: Path) -> None:
    (tmp_path / "snapshots" / "abc").mkdir(parents=True)
    save_file(STATE, tmp_path / "snapshots" / "abc" / "model.safetensors")
    assert_read(tmp_path)


def test_folders_without_one_weight_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match="holds no weight file"):
        read_state_dict(tmp_path)
    for name in ("one.pth", "two.pth", "other.ckpt"):
        torch.save(STATE, tmp_path / name)
    with pytest.raises(BackboneError, match=r"several weight files \(one.pth, two.pth, other.ckpt\), expected one"):
        read_state_dict(tmp_path)
    for name in ("a.safetensors", "b.safetensors"):
        save_file(STATE, tmp_path / name)
    (tmp_path / "one.pth").unlink()
    with pytest.raises(BackboneError, match=r"several weight files \(a.safetensors, b.safetensors, two.pth, ...\)"):
        read_state_dict(tmp_path)  # the one file of another kind is not taken for them


def test_shards_without_their_index_are_named_as_such(tmp_path: Path) -> None:
    for number in (1, 2):
        save_file(STATE, tmp_path / f"model-0000{number}-of-00002.safetensors")
    with pytest.raises(BackboneError, match="parts of a model .* without model.safetensors.index.json"):
        read_state_dict(tmp_path)


def test_folders_that_are_called_as_weight_files_are_none(tmp_path: Path) -> None:
    for name in ("model.safetensors", "x.pth"):
        (tmp_path / name).mkdir()
    with pytest.raises(BackboneError, match=r"no weight file, .*that are called so \(model.safetensors/, x.pth/\)"):
        read_state_dict(tmp_path)
    torch.save(STATE, tmp_path / "y.pth")
    assert_read(tmp_path)
    torch.save(STATE, tmp_path / "x.pth" / "inner.pth")
    assert_read(tmp_path / "x.pth")


def test_several_snapshots_of_the_hubs_cache_are_no_choice(tmp_path: Path) -> None:
    for name in ("abc", "def"):
        (tmp_path / "snapshots" / name).mkdir(parents=True)
    with pytest.raises(BackboneError, match=r"several snapshots .*snapshots/abc, ...\), expected one; name"):
        read_state_dict(tmp_path)


def test_a_name_of_the_hub_given_as_a_file_is_answered_by_how_to_write_it(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match="or hf-hub:facebook/dinov2-small for a model of the hub"):
        read_state_dict("facebook/dinov2-small")
    with pytest.raises(BackboneError, match="give an existing file or folder"):
        read_state_dict(tmp_path / "absent.pth")


def test_large_files_are_mapped_and_not_held(tmp_path: Path) -> None:
    torch.save({"model": {"w": torch.ones(20_000_000)}}, tmp_path / "w.pth")
    save_file({"w": torch.ones(20_000_000)}, tmp_path / "w.safetensors")

    def held() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) // 1024

    before = held()
    found = [read_state_dict(tmp_path / name) for name in ("w.pth", "w.safetensors")]
    assert len(found) == 2
    assert held() - before < 40, "each file has 80 MB"
