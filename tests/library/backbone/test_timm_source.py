"""What timm's source files declare is what timm itself says."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import torch

from grappa.backbone.naming.catalog import list_backbones
from grappa.backbone.naming.timm_source import SourceFile, declared, former_names, pretrained_names, source_files
from grappa.backbone.weights import import_timm

SMALL = """
vit_tiny_patch16_224 vit_tiny_r_s16_p8_224 deit_tiny_distilled_patch16_224 eva02_tiny_patch14_224 beit_base_patch16_224
swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 convnext_atto hiera_tiny_224 caformer_s18 mixer_b16_224
xcit_nano_12_p16_224 focalnet_tiny_srf tiny_vit_5m_224 edgenext_xx_small pvt_v2_b0 twins_svt_small cait_xxs24_224
coat_tiny davit_tiny
""".split()


def _plain(weights: Any) -> dict[str, Any]:
    return {name: value for name, value in asdict(weights).items() if name not in ("architecture", "tag", "hf_hub_id")}


def test_names_and_weights_are_timms_own() -> None:
    timm = import_timm()
    assert pretrained_names() == timm.list_pretrained()
    assert sorted(each for file in source_files() for each in file.models) == sorted(timm.list_models())
    for name in [*timm.list_pretrained(), *timm.list_models()]:
        own, found = timm.get_pretrained_cfg(name), declared(name)
        assert found is not None, name
        if own is None:
            assert found.weights is None, name
        else:
            assert _plain(found.weights) == _plain(own), name
            assert found.hub_id == (own.hf_hub_id or ""), name
            assert found.family == timm.models._registry._model_to_module[name.partition(".")[0]]


def test_names_of_former_times_lead_to_the_present_ones() -> None:
    timm = import_timm()
    assert former_names() == timm.models._registry._deprecated_models


def test_a_file_of_another_version_has_names_only() -> None:
    text = "@register_model\ndef vit_new(pretrained=False):\n    return 1\n\ndefault_cfgs = something_unknown({})\n"
    file = SourceFile("new", text)
    assert file.models == ("vit_new",) and file.weights == {}


@pytest.mark.parametrize("name", SMALL)
def test_a_width_that_is_stated_is_that_of_the_model(name: str) -> None:
    with torch.device("meta"):
        model = import_timm().create_model(name, pretrained=False, num_classes=0)
    widths = {each.width for each in list_backbones(f"{name}*") if each.name.partition(".")[0] == name}
    assert widths == {model.head_hidden_size or model.num_features}
