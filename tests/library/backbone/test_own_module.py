"""A torch module of a user's own as the backbone: adapted, exported, and opened by its function alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import grappa
from grappa.backbone.frozen import build_backbone, embed, load_backbone
from grappa.backbone.spec import BackboneSpec
from grappa.backbone.weights import BackboneError
from grappa.method.adaptors import AdaptorSet
from grappa.method.fusion import Fusion, fused_forward
from grappa.model import GrappaModel, ModelError, save_model
from tests.helpers.own_encoder import Encoder, encoder

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


PLACE = "tests.helpers.own_encoder:encoder"


def test_its_units_are_adapted_and_its_features_stay_its_own() -> None:
    backbone = load_backbone("", module=encoder, image_size=32)
    assert [unit.name for unit in backbone.units] == ["first", "second"]
    assert (backbone.widths, backbone.embedding_dim) == ((8, 8), 12)
    torch.testing.assert_close(backbone(IMAGES), encoder()(IMAGES), rtol=0, atol=0)
    adaptors = AdaptorSet.of(backbone, 3)
    torch.testing.assert_close(backbone(IMAGES, adaptors), backbone(IMAGES), rtol=0, atol=0)
    fusion = Fusion([AdaptorSet.of(backbone, 3, seed=seed) for seed in (0, 1)])
    assert fused_forward(backbone, fusion, IMAGES)[1].shape == (2, 2, 2)


def test_an_exported_model_opens_with_its_function_and_imports_nothing_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = load_backbone("", module=PLACE, image_size=32)
    adaptors = AdaptorSet.of(backbone, 3)
    torch.nn.init.normal_(adaptors.adaptors[0].up.weight)  # type: ignore[arg-type, union-attr]
    save_model(tmp_path, backbone, {"student": adaptors}, None, cache_size=32)
    assert json.loads((tmp_path / "model.json").read_text())["backbone"]["module"] == PLACE
    made = GrappaModel(backbone, adaptors, cache_size=32)
    for module in (encoder, PLACE):
        assert torch.equal(grappa.load_model(tmp_path, module=module)(IMAGES), made(IMAGES))
    assert not torch.equal(embed(backbone, IMAGES), made(IMAGES))
    monkeypatch.setitem(sys.modules, "tests.helpers.own_encoder", None)
    with pytest.raises(ModelError, match=r"is made by .*:encoder; give that function: load_model\("):
        grappa.load_model(tmp_path)


@pytest.mark.parametrize(
    ("module", "sentence"),
    [
        ("no_colon", "expected package.module:function"),
        ("no.such:function", "there is no such function"),
        ("tests.helpers.own_encoder:absent", "there is no such function"),
        (lambda: 3, "expected a torch.nn.Module"),
        (lambda: 1 / 0, "ZeroDivisionError"),
    ],
    ids=["no colon", "no package", "no function", "no module", "an error"],
)
def test_what_makes_no_module_is_refused(module: Any, sentence: str) -> None:
    with pytest.raises(BackboneError, match=sentence):
        load_backbone("", module=module, image_size=32)


def test_a_module_without_units_or_features_is_refused_where_they_are_needed() -> None:
    plain = load_backbone("", module=lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4)), image_size=32)
    assert plain(IMAGES).shape == (2, 4)
    with pytest.raises(BackboneError, match="no block to adapt is known"):
        AdaptorSet.of(plain, 3)
    maps = load_backbone("", module=lambda: nn.Conv2d(3, 4, 3), image_size=32)
    with pytest.raises(BackboneError, match="not one vector an image"):
        _ = maps.embedding_dim
    wrong = Encoder()
    wrong.units = ("third",)
    with pytest.raises(BackboneError, match="units names 'third'"):
        load_backbone("", module=lambda: wrong, image_size=32)


def test_a_specification_alone_runs_nothing() -> None:
    spec = BackboneSpec("encoder", 32, 1.0, (0.5,) * 3, (0.5,) * 3, module=PLACE)
    assert BackboneSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    with pytest.raises(BackboneError, match="give that function"):
        build_backbone(spec)
    with pytest.raises(BackboneError, match="expected its function's name"):
        BackboneSpec("other", 32, 1.0, (0.5,) * 3, (0.5,) * 3, module=PLACE)
