"""A deployed model in half precision, compiled, exported by torch, and in its form without hooks."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import grappa
from grappa.backbone.frozen import build_backbone
from grappa.deploy.static import static_form
from grappa.method.head import fit_neighborhood_head
from grappa.model import GrappaModel, save_model
from tests.helpers.families import FAMILIES, adaptors_for, any_option, fusion_for, images_of, noisy

STAGED = ("swin_transformer", "convnext", "resnet", "densenet")
WITH_CLASS_TOKEN = ("vision_transformer", "eva", "deit")


def deployed(module: str, *, in_context: bool = False) -> GrappaModel:
    """A fusion of two trained sets on a small model of a family, behind a head."""
    with any_option():
        backbone = noisy(next(each for each in FAMILIES if each.module == module))
    fusion = fusion_for([adaptors_for(backbone, seed, in_context=in_context) for seed in range(2)])
    train = F.normalize(torch.randn(60, backbone.embedding_dim), dim=1).numpy()
    head = fit_neighborhood_head(train, np.arange(60, dtype=np.uint64))
    return GrappaModel(backbone, fusion, cache_size=40, head=head).eval()


@pytest.fixture(scope="module", params=["vision_transformer", "swin_transformer"])
def model(request: pytest.FixtureRequest) -> GrappaModel:
    return deployed(request.param)


def _cosines(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    return (found * wanted).sum(dim=1)


@pytest.mark.parametrize("module", [*STAGED, *WITH_CLASS_TOKEN])
def test_the_form_without_hooks_gives_the_same_embeddings(module: str) -> None:
    model = deployed(module)
    static, images = static_form(model), images_of(model.spec.image_size)
    torch.testing.assert_close(static(images), model(images), rtol=0, atol=1e-6)
    assert not any(each._forward_hooks for each in static.modules())
    hooked = any(each._forward_hooks for each in model.modules())
    assert hooked == (module != "vision_transformer")  # the model itself stays as it was
    frozen = GrappaModel(model.backbone, None, cache_size=40, head=model.head)
    assert not torch.allclose(static(images), frozen(images), atol=1e-2)


@pytest.mark.parametrize("module", ["swin_transformer", "cait", "vision_transformer"])
def test_in_context_adaptors_of_several_sets_are_submodules_too(module: str) -> None:
    model = deployed(module, in_context=True)
    images = images_of(model.spec.image_size)
    assert model.adaptation is not None and len(model.adaptation.in_context)
    torch.testing.assert_close(static_form(model)(images), model(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_of_half_precision_embeds_nearly_alike(model: GrappaModel, dtype: torch.dtype) -> None:
    images = images_of(model.spec.image_size)
    small = static_form(model).to(dtype)
    assert small.dtype is dtype and small.head.mean.dtype is torch.float32  # what is subtracted there is too near
    found = small(images)
    assert found.dtype is torch.float32
    assert _cosines(found, model(images)).min() > 0.98
    assert small.encode(list(images)).dtype == np.float32


def test_half_is_what_it_is_in_torch(model: GrappaModel) -> None:
    images = images_of(model.spec.image_size)
    small = static_form(model).half()
    assert small.dtype is torch.float16
    torch.testing.assert_close(small.float().head.state_dict(), model.head.state_dict())
    assert _cosines(small(images), model(images)).min() > 0.98


def test_numbers_that_overflow_are_an_error(model: GrappaModel) -> None:
    small = static_form(model).half()
    with pytest.raises(ValueError, match="NaN or infinity"), torch.no_grad():
        next(small.backbone.parameters()).fill_(float("inf"))
        small.encode(list(images_of(model.spec.image_size)))


def test_a_compiled_model_gives_the_same_embeddings(model: GrappaModel) -> None:
    images = images_of(model.spec.image_size)
    torch.compiler.reset()
    run = torch.compile(static_form(model), backend="eager", fullgraph=True)
    torch.testing.assert_close(run(images), model(images), rtol=0, atol=1e-5)


def test_torch_export_keeps_the_embeddings_for_any_batch(model: GrappaModel) -> None:
    images = images_of(model.spec.image_size, 5)
    with torch.no_grad():
        program = torch.export.export(
            static_form(model), (images[:2],), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)
        )
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        opened = torch.export.load(file).module()
    for number in (1, 3, 5):
        torch.testing.assert_close(opened(images[:number]), model(images[:number]), rtol=0, atol=1e-5)


def test_a_folder_gives_its_form_without_hooks(tmp_path: Path) -> None:
    with any_option():
        backbone = build_backbone(next(each for each in FAMILIES if each.module == "convnext").spec())
        save_model(tmp_path, backbone, {"student": adaptors_for(backbone)}, None, cache_size=40)
        model = grappa.load_model(tmp_path)
    images = images_of(model.spec.image_size)
    torch.testing.assert_close(static_form(model)(images), model(images), rtol=0, atol=1e-6)
