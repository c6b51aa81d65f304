"""Weights of the hub: from its cache without any network, strictly loaded; out of reach they are one sentence."""

from __future__ import annotations

import time
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from grappa.backbone.files.conversions import import_timm
from grappa.backbone.files.hub import fetched, is_cached
from grappa.backbone.weights import BackboneError, hub_state, load_state, read_state_dict

NAME = "test_vit.r160_in1k"  # timm's own small model


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of a hub that nobody can reach."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://localhost:1")
    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "torch"))
    return tmp_path


def keep(cache: Path, repo: str, state: dict[str, torch.Tensor]) -> None:
    """Lay a model into the cache as the hub's client does."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    save_file(state, folder / "snapshots" / "abc" / "model.safetensors")


def test_what_the_cache_holds_is_loaded_without_the_hub(cache: Path) -> None:
    timm = import_timm()
    model = timm.create_model(NAME.split(".")[0], num_classes=10)
    keep(cache, f"timm/{NAME}", model.state_dict())
    loaded = timm.create_model(NAME.split(".")[0], num_classes=0)
    assert load_state(loaded, hub_state(NAME), source=NAME) == "ignored: head"
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
    assert is_cached(f"timm/{NAME}")
    assert not is_cached("timm/another")


def test_a_norm_that_the_model_has_no_place_for_is_not_lost_silently(cache: Path) -> None:
    timm = import_timm()
    mean = timm.create_model("test_vit", num_classes=0, global_pool="avg", class_token=True)
    assert any(name.startswith("fc_norm") for name in mean.state_dict())
    keep(cache, f"timm/{NAME}", {name: value + 1 for name, value in mean.state_dict().items()})
    token = timm.create_model("test_vit", num_classes=0, global_pool="token")
    with pytest.raises(
        BackboneError, match=r"2 tensors missing \(first: norm.bias\); 2 unknown \(first: fc_norm.bias\)"
    ):
        load_state(token, hub_state(NAME), source=NAME)


def test_a_name_of_the_hub_is_read_from_its_cache(cache: Path) -> None:
    keep(cache, "somebody/some-model", {"a": torch.ones(2)})
    assert torch.equal(read_state_dict("hf-hub:somebody/some-model")["a"], torch.ones(2))


def test_the_cache_is_looked_at_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(cache, "somebody/some-model", {"a": torch.ones(2)})
    looked, look = [], huggingface_hub.snapshot_download
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: looked.append(a) or look(*a, **k))
    fetched("hf-hub:somebody/some-model")
    assert len(looked) == 1


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        (["a.safetensors", "b.safetensors"], r"abc, holds several weight files \(a.safetensors, b.safetensors\)"),
        (["config.json"], "abc, holds no weight file"),
        (["model.safetensors.index.json"], "abc, holds model.safetensors.index.json and not part, which it lists"),
    ],
)
def test_what_a_cached_folder_lacks_is_said_where_the_hub_is_out_of_reach(
    cache: Path, files: list[str], sentence: str
) -> None:
    keep(cache, "somebody/some-model", {"a": torch.ones(2)})
    folder = cache / "models--somebody--some-model" / "snapshots" / "abc"
    (folder / "model.safetensors").unlink()
    for name in files:
        (folder / name).write_text('{"weight_map": {"a": "part"}}')
    with pytest.raises(BackboneError, match=rf"localhost cannot be reached from here \(its cache, .*{sentence}"):
        read_state_dict("hf-hub:somebody/some-model")


@pytest.mark.parametrize("name", ["hf-hub:", "hf-hub:x", "hf-hub:../x", "hf-hub:a/b/c", "hf-hub:a/b@", "hf-hub: a/b"])
def test_names_that_the_hub_cannot_have_are_refused(cache: Path, name: str) -> None:
    with pytest.raises(BackboneError, match="expected hf-hub:OWNER/NAME"):
        read_state_dict(name)


def test_a_hub_out_of_reach_is_one_sentence_in_five_seconds(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("hf-hub:somebody/some-model", "hf-hub:somebody/some-model@v1"):
        began = time.monotonic()
        with pytest.raises(BackboneError, match="localhost cannot be reached from here; give a local file"):
            read_state_dict(name)
        assert time.monotonic() - began < 5
    with pytest.raises(
        BackboneError, match=r"the weights of timm/test_vit.r160_in1k would come from the hub, but localhost"
    ):
        hub_state(NAME)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(BackboneError, match="HF_HUB_OFFLINE forbids it"):
        hub_state(NAME)


def test_weights_on_a_web_server_out_of_reach_are_one_sentence(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grappa.backbone.weights.unreachable", lambda address: "github.com cannot be reached from here")
    with pytest.raises(BackboneError, match=r"could not be had from https://github.com/.*cannot be reached"):
        hub_state("gcvit_xxtiny.in1k")


def test_names_without_pretrained_weights_are_refused() -> None:
    with pytest.raises(BackboneError, match="timm has no pretrained weights for 'vit_small_patch8_224.nonsense'"):
        hub_state("vit_small_patch8_224.nonsense")
