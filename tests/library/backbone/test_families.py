"""One small instance of every module of timm's models: frozen as timm has it, adapted, exported and opened again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from grappa.backbone.frozen import Backbone, build_backbone, embed
from grappa.backbone.naming.catalog import REFUSED
from grappa.backbone.spec import BackboneSpec
from grappa.backbone.weights import BackboneError, import_timm
from tests.helpers import families
from tests.helpers.families import FAMILIES, TOLERANCE, Family, difference, images_of, noisy
from tests.helpers.family_table import accepted_share
from tests.helpers.tiny import HALF

UNLIKE_INPUTS = {"nextvit", "pvt_v2", "twins", "xcit"}  # queries and keys of one attention have different inputs


@pytest.fixture(autouse=True)
def _any_option() -> Iterator[None]:
    with families.any_option():
        yield


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.module)
def test_a_family_is_frozen_as_timm_has_it_adapted_and_exported(family: Family, tmp_path: Path) -> None:
    backbone, images = noisy(family), images_of(family.size)
    with torch.no_grad():
        plain = backbone(images)
    assert difference(plain, families.timms_own(backbone, images)) < TOLERANCE
    _a_new_set_changes_nothing(backbone, images, plain)
    assert not families.without_gradients(backbone, images), "a part of an adaptor is not trained"
    made, opened = families.reopened(backbone, tmp_path)
    assert torch.equal(opened(images), made(images))
    _folded_equals_plain(family, backbone, images)


def _a_new_set_changes_nothing(backbone: Backbone, images: torch.Tensor, plain: torch.Tensor) -> None:
    new = families.adaptors_for(backbone, trained=False)
    assert len(new.adaptors)
    with torch.no_grad():
        assert torch.equal(backbone(images, families.adaptors_for(backbone, trained=False, in_context=False)), plain)
        assert difference(backbone(images, new), plain) < TOLERANCE
        assert difference(backbone(images, families.adaptors_for(backbone)), plain) > 10 * TOLERANCE


def _folded_equals_plain(family: Family, backbone: Backbone, images: torch.Tensor) -> None:
    alike = family.module not in UNLIKE_INPUTS
    if not alike:
        with pytest.raises(BackboneError, match=r"set adaptors\.kind=bottleneck"):
            families.fused(backbone, images)
    for level in ("token", "cls") if family.further else ("token",):
        plain, folded, attention = families.fused(backbone, images, level, in_context=alike)
        assert difference(folded, plain) < 10 * TOLERANCE
        torch.testing.assert_close(attention.sum(-1), torch.ones(attention.shape[:2]))
        assert attention.std() > 0


@pytest.mark.parametrize("family", [each for each in FAMILIES if each.further], ids=lambda family: family.module)
def test_a_family_takes_another_image_size(family: Family) -> None:
    assert family.further is not None
    backbone, images = noisy(family, family.further), images_of(family.further, 1)
    with torch.no_grad():
        plain = backbone(images)
    assert difference(plain, families.timms_own(backbone, images)) < TOLERANCE


IN_CONTEXT = ("beit", "cait", "eva", "hiera", "pvt_v2", "swin_transformer", "swin_transformer_v2", "tnt", "xcit")


@pytest.mark.parametrize(
    "family", [each for each in FAMILIES if each.module in IN_CONTEXT], ids=lambda each: each.module
)
def test_in_context_adaptors_fold_into_the_weights_of_queries_and_keys(family: Family, tmp_path: Path) -> None:
    backbone, images = noisy(family), images_of(family.size)
    adaptors = families.adaptors_for(backbone)
    assert len(adaptors.in_context)
    made, opened = families.reopened_set(backbone, tmp_path)
    assert torch.equal(opened(images), made(images))
    with torch.no_grad():
        assert difference(made(images), embed(backbone, images, adaptors)) < 10 * TOLERANCE
    changed = {
        name for name, each in made.backbone.named_parameters() if not torch.equal(each, backbone.get_parameter(name))
    }
    assert changed == {f"model.{name}.weight" for each in backbone.projections for name in (each.query, each.key)}


def test_every_module_with_pretrained_models_is_in_the_table() -> None:
    timm = import_timm()
    modules = {
        timm.models.model_entrypoint(name.partition(".")[0]).__module__ for name in timm.list_models(pretrained=True)
    }
    assert {f"timm.models.{family.module}" for family in FAMILIES} == modules


def test_nearly_every_pretrained_name_is_accepted() -> None:
    share = accepted_share()
    print(f"{share:.1%} of timm's pretrained names are accepted")
    assert share >= 0.95


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_is_refused_by_name_would_give_no_vector(name: str) -> None:
    with torch.device("meta"):
        backbone = build_backbone(BackboneSpec(name, 336, 1.0, HALF, HALF, {"depth": 1}))
        with pytest.raises(BackboneError, match="gives no vector of an image"):
            _ = backbone.embedding_dim
