"""What a specification keeps, what it refuses, and what an image must have for it."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from grappa.backbone.naming.timm_source import declared
from grappa.backbone.spec import BackboneSpec, check_patches, resolve_spec, visible_side
from grappa.backbone.unusable import BackboneError
from tests.helpers.tiny import tiny_backbone

SPEC = tiny_backbone().spec
OWN = SimpleNamespace(
    input_size=(3, 224, 224),
    crop_pct=0.9,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    crop_mode="center",
    interpolation="bicubic",
)


def _own(**changes: Any) -> Any:
    return SimpleNamespace(**{**vars(OWN), **changes})


def test_a_spec_survives_json() -> None:
    for spec in (SPEC, replace(SPEC, crop_mode="squash", interpolation="bilinear")):
        assert BackboneSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_the_record_of_a_model_as_there_were_before_is_as_it_was() -> None:
    assert list(SPEC.to_json()) == ["name", "image_size", "crop_fraction", "mean", "std", "options"]
    with pytest.raises(BackboneError, match="expected an object with"):
        BackboneSpec.from_json({**SPEC.to_json(), "stretch": 1})


@pytest.mark.parametrize("change", [{"crop_mode": "border"}, {"interpolation": "nearest"}, {"crop_mode": 3}])
def test_other_ways_to_frame_an_image_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(BackboneError, match=f"the backbone's {next(iter(change))} is .*; expected"):
        replace(SPEC, **change)


@pytest.mark.parametrize("name", ["num_classes", "in_chans", "global_pool"])
def test_options_that_undo_what_is_needed_are_refused(name: str) -> None:
    with pytest.raises(BackboneError, match=f"option {name} cannot be set: .*; leave it out"):
        replace(SPEC, options={name: 1})


def test_the_models_own_way_is_taken() -> None:
    own = declared("vit_base_patch32_clip_384.openai_ft_in12k_in1k")
    assert own is not None
    spec = resolve_spec("vit_base_patch32_clip_384.openai_ft_in12k_in1k", own.weights)
    assert (spec.image_size, spec.crop_fraction, spec.crop_mode) == (384, 0.95, "squash")
    own = declared("vit_base_patch16_224_miil.in21k")
    assert own is not None and resolve_spec("vit_base_patch16_224_miil.in21k", own.weights).interpolation == "bilinear"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"input_size": (3, 1024, 768)}, "takes images of 1024 x 768 pixels, not square; set backbone.image_size"),
        ({"input_size": (1, 224, 224)}, "takes images of 1 channels"),
        ({"crop_pct": 1.15}, "with an added border; set backbone.crop_fraction=1"),
        ({"crop_mode": "border"}, "needs crop_mode 'border'; choose a model with center or squash"),
        ({"interpolation": "random"}, "needs interpolation 'random'; choose a model with bicubic or bilinear"),
    ],
)
def test_an_input_that_cannot_be_given_is_refused_in_a_sentence(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BackboneError, match=sentence):
        resolve_spec("vit_tiny_patch16_224", _own(**changes))


def test_a_given_size_and_crop_replace_those_that_cannot_be_given() -> None:
    own = _own(input_size=(3, 1024, 768), crop_pct=1.15)
    spec = resolve_spec("vit_tiny_patch16_224", own, image_size=224, crop_fraction=1.0)
    assert (spec.image_size, spec.crop_fraction) == (224, 1.0)


def test_a_size_between_patches_is_refused_with_its_neighbours() -> None:
    check_patches(replace(SPEC, image_size=64), 16, OWN)
    check_patches(replace(SPEC, image_size=65, options={"dynamic_img_pad": True}), 16, OWN)
    check_patches(replace(SPEC, image_size=384), 14, _own(input_size=(3, 384, 384)))  # as SigLIP's so400m has it
    with pytest.raises(BackboneError, match="image_size is 65, no multiple of the 16 pixels .* set it to 64 or 80"):
        check_patches(replace(SPEC, image_size=65), 16, OWN)
    with pytest.raises(BackboneError, match="set it to 16$"):
        check_patches(replace(SPEC, image_size=5), 16, OWN)


@pytest.mark.parametrize(
    ("size", "fraction", "side"),
    [(224, 0.875, 256), (224, 0.9, 249), (518, 1.0, 518), (128, 0.85, 151), (64, 0.1, 640)],
)
def test_what_the_model_sees_of_the_shorter_side(size: int, fraction: float, side: int) -> None:
    assert visible_side(replace(SPEC, image_size=size, crop_fraction=fraction)) == side
