"""Backbones: loaded from files in the layouts people have, or refused in one sentence."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional

from grappa.backbone.frozen import embed, load_backbone
from grappa.backbone.unusable import BackboneError
from grappa.backbone.weights import import_timm
from grappa.method.adaptor_training import new_adaptor_set
from tests.helpers.tiny import HALF, OPTIONS, tiny_backbone

NAME = "vit_tiny_patch16_224"
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def _load(path: Path, **changes: Any) -> Any:
    arguments = {"weights": path, "image_size": 32, "options": OPTIONS, "mean": HALF, "std": HALF, **changes}
    return load_backbone(NAME, **arguments)


def test_the_forward_pass_is_timms_own() -> None:
    backbone = tiny_backbone()
    torch.testing.assert_close(backbone(IMAGES), backbone.model(IMAGES))
    torch.testing.assert_close(embed(backbone, IMAGES).norm(dim=1), torch.ones(2))


def test_it_stays_frozen_and_in_evaluation_mode() -> None:
    backbone = tiny_backbone().train()
    assert not backbone.training
    assert not any(parameter.requires_grad for parameter in backbone.parameters())


@pytest.mark.parametrize("layout", ["safetensors", "timm", "dino teacher", "half precision"])
def test_state_dicts_are_read_in_the_layouts_people_have(tmp_path: Path, layout: str) -> None:
    backbone = tiny_backbone()
    state = dict(backbone.model.state_dict())
    path = tmp_path / ("weights.safetensors" if layout == "safetensors" else "weights.pth")
    if layout == "safetensors":
        save_file(state, path)
    elif layout == "timm":
        torch.save({"state_dict": {**state, "head.weight": torch.zeros(10, 32), "head.bias": torch.zeros(10)}}, path)
    elif layout == "dino teacher":
        prefixed = {f"module.backbone.{name}": value for name, value in state.items()}
        torch.save({"teacher": {**prefixed, "module.head.mlp.0.weight": torch.zeros(3)}}, path)
    else:
        torch.save({name: value.half() for name, value in state.items()}, path)
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if layout == "half precision" else {}
    torch.testing.assert_close(_load(path)(IMAGES), backbone(IMAGES), **tolerance)


def test_positions_are_resampled_to_the_asked_size(tmp_path: Path) -> None:
    save_file(tiny_backbone().model.state_dict(), tmp_path / "w.safetensors")
    larger = _load(tmp_path / "w.safetensors", image_size=48)
    assert larger(torch.randn(1, 3, 48, 48)).shape == (1, 32)
    assert larger.model.pos_embed.shape[1] == 1 + 36


def test_weights_that_do_not_fit_are_refused_with_the_first_misfit(tmp_path: Path) -> None:
    state = dict(tiny_backbone().model.state_dict())
    path = tmp_path / "w.safetensors"
    save_file({name: value for name, value in state.items() if "norm" not in name}, path)
    with pytest.raises(BackboneError, match=r"10 tensors missing \(first: blocks.0.norm1.bias\)"):
        _load(path)
    save_file({**state, "extra": torch.zeros(1)}, path)
    with pytest.raises(BackboneError, match=r"1 unknown \(first: extra\)"):
        _load(path)
    with pytest.raises(BackboneError, match=r"cls_token is \(1, 1, 32\) instead of \(1, 1, 64\)"):
        save_file(state, path)
        _load(path, options={**OPTIONS, "embed_dim": 64})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_with_the_first_tensor(tmp_path: Path, value: float) -> None:
    state = tiny_backbone().model.state_dict()
    state["blocks.1.mlp.fc1.weight"][3, 4] = value
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(BackboneError, match=r"hold NaN or infinity \(first: blocks.1.mlp.fc1.weight\)"):
        _load(tmp_path / "w.pth")


def test_damaged_files_and_pickles_are_refused_without_running_them(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path(tmp_path / "ran").touch, ())

    (tmp_path / "w.safetensors").write_bytes(b"not a file")
    with pytest.raises(BackboneError, match="no readable safetensors"):
        _load(tmp_path / "w.safetensors")
    with (tmp_path / "evil.pth").open("wb") as file:
        pickle.dump({"state_dict": Evil()}, file)
    with pytest.raises(BackboneError, match="without running code"):
        _load(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()
    with pytest.raises(BackboneError, match="which is no file"):
        _load(tmp_path / "absent.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(BackboneError, match="holds no state dict"):
        _load(tmp_path / "list.pth")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("vit_smal_patch16_224", "did you mean vit_small_patch16_224"),
        ("hf_hub:someone/model", "timm has no model called 'hf_hub:someone/model'"),
        ("vit_small_patch16_224.nonsense", "there are augreg_in1k"),
    ],
)
def test_other_models_are_refused_in_one_sentence(name: str, sentence: str) -> None:
    with pytest.raises(BackboneError, match=sentence):
        load_backbone(name)


def test_without_a_hub_the_sentence_names_the_option(monkeypatch: pytest.MonkeyPatch) -> None:
    timm = import_timm()
    real = timm.create_model

    def offline(*arguments: Any, pretrained: bool = False, **options: Any) -> Any:
        if pretrained:
            raise OSError("no route to the hub")
        return real(*arguments, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(BackboneError, match="--set backbone.weights=FILE"):
        load_backbone(NAME, image_size=32, options=OPTIONS)


def test_the_models_own_preprocessing_is_the_default(tmp_path: Path) -> None:
    save_file(tiny_backbone().model.state_dict(), tmp_path / "w.safetensors")
    spec = load_backbone(NAME, weights=tmp_path / "w.safetensors", image_size=32, options=OPTIONS).spec
    assert spec.mean == HALF
    assert spec.crop_fraction == 0.9


@contextmanager
def _bfloat16() -> Iterator[None]:
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        yield


CONTEXTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "training": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "bfloat16": _bfloat16,
}


@pytest.mark.parametrize("adapted", ["timm's blocks", "queries and keys too"])
def test_a_cpu_attends_by_the_fused_kernel_where_that_is_faster_with_the_same_result(
    adapted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is faster in float32. A single query, that of the last block, is always explicit."""
    backbone = tiny_backbone()
    in_context = new_adaptor_set(backbone, 0, in_context_rank=3, name="k00004", seed=0)
    adaptors = None if adapted == "timm's blocks" else in_context
    calls: list[torch.Size] = []
    kernel = torch.nn.functional.scaled_dot_product_attention

    def spy(query: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        calls.append(query.shape)
        return kernel(query, *arguments, **options)

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", spy)
    on_cpu = backbone.on(torch.device("cpu")).on(torch.device("cpu"))
    found = {}
    for name, context in CONTEXTS.items():
        calls.clear()
        with context():
            found[name] = on_cpu(IMAGES, adaptors), len(calls)
    blocks = len(on_cpu.model.blocks) - 1  # type: ignore[arg-type]
    assert {name: number for name, (_, number) in found.items()} == {
        "training": blocks,
        "no_grad": blocks,
        "inference": blocks,
        "bfloat16": 0,
    }
    assert torch.equal(found["no_grad"][0], found["inference"][0])


def test_both_kinds_of_attention_have_the_same_gradients() -> None:
    gradients = []
    for fused in (False, True):
        backbone = tiny_backbone()
        for block in backbone.model.blocks:  # type: ignore[union-attr]
            block.attn.fused_attn = fused  # type: ignore[union-attr]
        adaptors = new_adaptor_set(backbone, 8, name="k00004", seed=0)
        with torch.no_grad():
            for parameter in adaptors.parameters():
                parameter.add_(0.05)
        functional.normalize(backbone(IMAGES, adaptors)).square().cumsum(1).sum().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in adaptors.parameters()]))  # type: ignore[union-attr]
    explicit, fused_ones = gradients
    assert explicit.abs().max() > 0
    assert (fused_ones - explicit).norm() <= 1e-4 * explicit.norm()
