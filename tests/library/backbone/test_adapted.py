"""Hooks that stay on a model: each thread has its own adaptation, and what compiles or exports a model passes them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from grappa.backbone.frozen import Backbone, build_backbone
from grappa.backbone.spec import BackboneSpec
from grappa.model import GrappaModel
from tests.helpers.families import adaptors_for, fusion_for, images_of
from tests.helpers.tiny import HALF, tiny_backbone

SIZE = 32


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    torch.manual_seed(0)
    options = {"embed_dim": 8, "window_size": 4}
    return build_backbone(BackboneSpec("swin_tiny_patch4_window7_224", SIZE, 1.0, HALF, HALF, options))


def test_threads_adapt_one_model_each_in_its_own_way(backbone: Backbone) -> None:
    images = images_of(SIZE)
    sets = [adaptors_for(backbone, seed).requires_grad_(False) for seed in range(3)]

    def passes(which: int) -> list[Tensor]:
        adaptation = sets[which] if which < len(sets) else None
        return [backbone(images, adaptation) for _ in range(4)]

    alone = [passes(which)[0] for which in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(passes, range(4)))
    for one, several in zip(alone, together, strict=True):
        assert all(torch.equal(one, each) for each in several)
    assert not torch.equal(alone[0], alone[1])


def test_an_error_in_a_pass_leaves_the_model_plain(backbone: Backbone) -> None:
    images, plain = images_of(SIZE), backbone(images_of(SIZE))
    adaptors = adaptors_for(backbone)
    adaptors.adaptors[3].forward = lambda hidden: 1 / 0  # type: ignore[method-assign, assignment]
    with pytest.raises(ZeroDivisionError):
        backbone(images, adaptors)
    assert torch.equal(backbone(images), plain)


@pytest.mark.parametrize("plain", [True, False])
def test_a_deployed_model_is_exported_and_compiled_whole(backbone: Backbone, plain: bool) -> None:
    backbone = tiny_backbone() if plain else backbone
    fusion = fusion_for([adaptors_for(backbone, seed) for seed in (0, 1)])
    model, images = GrappaModel(backbone, fusion, cache_size=SIZE).eval(), images_of(SIZE)
    exported = torch.export.export(model, (images,), strict=False).module()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for each in (exported, compiled):
        torch.testing.assert_close(each(images), model(images), rtol=1e-4, atol=1e-5)
