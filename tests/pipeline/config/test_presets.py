"""Every preset fits its backbone, as far as timm's source tells, and those of large backbones share one method."""

from __future__ import annotations

import pytest

from grappa.backbone.naming.catalog import find_weights, name_problem, patch_size
from grappa.backbone.naming.timm_source import declared
from grappa.backbone.spec import check_patches, resolve_spec, visible_side
from grappa.pipeline.commands.model_input import check_input, settle_cache_size
from grappa.pipeline.config.schema import Config
from grappa.pipeline.config.yaml_file import PRESETS, parse_settings, preset_path, read_settings

NAMES = sorted(path.stem for path in PRESETS.glob("*.yaml"))
LARGE = ("grappa", "dinov2", "dinov3", "clip", "siglip2")


def _config(name: str) -> Config:
    return parse_settings(read_settings(preset_path(name)), name)


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_fits_its_backbone(name: str) -> None:
    config = _config(name)
    backbone, found = config.backbone, declared(config.backbone.name)
    assert found is not None and found.weights is not None
    check_input(backbone)
    spec = resolve_spec(
        backbone.name,
        found.weights,
        image_size=backbone.image_size,
        crop_fraction=backbone.crop_fraction,
        options=backbone.options,
    )
    patch = patch_size(backbone.name, backbone.options)
    assert patch is not None
    check_patches(spec, patch, found.weights)
    assert settle_cache_size(config, None).images.shorter_side >= visible_side(spec)


@pytest.mark.parametrize("name", LARGE)
def test_a_preset_for_a_gpu_says_all_that_it_takes(name: str) -> None:
    path = preset_path(name)
    heading = path.read_text(encoding="utf-8").split("\n\n")[0]
    for word in ("Purpose:", "Input:", "Memory:", "Disk:", "Weights:", "Time:", "Result:", "Command:"):
        assert f"# {word}" in heading
    config = _config(name)
    found = declared(config.backbone.name)
    assert found is not None and found.has_weights and found.hub_id in heading and not name_problem(found.name)
    assert find_weights("vit_tiny_patch16_224.no_such_weights") is None
    if config.images.cache_size != "auto":  # as it is written, it is what the model sees
        auto = config.model_copy(update={"images": config.images.model_copy(update={"cache_size": "auto"})})
        assert settle_cache_size(auto, None).images.cache_size == config.images.cache_size


def test_presets_of_large_backbones_differ_in_the_backbone_only() -> None:
    first, *others = ({**_config(name).model_dump(), "backbone": None, "images": None} for name in LARGE)
    assert all(each == first for each in others)
