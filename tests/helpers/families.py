"""One small instance of every module of timm's models, and what is promised of each: shared by tests and the table."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import grappa
from grappa.backbone import architectures
from grappa.backbone.frozen import Backbone, build_backbone
from grappa.backbone.spec import BackboneSpec
from grappa.backbone.weights import BackboneError, import_timm
from grappa.method.adaptors import AdaptorSet
from grappa.method.fusion import Fusion, fused_forward
from grappa.model import GrappaModel, save_model
from tests.helpers.tiny import HALF

BOTTLENECK, RANK, TOLERANCE = 3, 2, 1e-5


@dataclass(frozen=True)
class Family:
    """A model of one of timm's modules, made small by ``options``, at one image size or two.

    made_by: the module's function for all its models, where the one of this name does not let itself be made smaller.
    """

    module: str
    name: str
    size: int
    options: Mapping[str, Any] = field(default_factory=dict)
    further: int | None = None
    made_by: str = ""

    def spec(self, size: int | None = None) -> BackboneSpec:
        return BackboneSpec(self.name, size or self.size, 1.0, HALF, HALF, dict(self.options))


FAMILIES = tuple(Family(**each) for each in json.loads(Path(__file__).with_suffix(".json").read_text()))


class _Anything:
    """Allows any argument: those that make a model small are no settings."""

    def allows(self, value: object) -> bool:
        return True


@contextmanager
def any_option() -> Iterator[None]:
    """Allow every argument that a family of the table has."""
    timm = import_timm()
    allowed, create = architectures.OPTIONS, timm.create_model
    makers = {each.name: each for each in FAMILIES if each.made_by}

    def created(name: str, **arguments: Any) -> Any:
        if name not in makers:
            return create(name, **arguments)
        module = importlib.import_module(f"timm.models.{makers[name].module}")
        return getattr(module, makers[name].made_by)(name, **arguments)

    architectures.OPTIONS = {**allowed, **{name: _Anything() for each in FAMILIES for name in each.options}}  # type: ignore[dict-item]
    timm.create_model = created
    try:
        yield
    finally:
        architectures.OPTIONS, timm.create_model = allowed, create


def noisy(family: Family, size: int | None = None) -> Backbone:
    """Return the family's backbone with random weights, and noise on every tensor: nothing hides behind a zero."""
    torch.manual_seed(0)
    backbone = build_backbone(family.spec(size))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in backbone.model.state_dict().items():
            if name.endswith("running_var"):
                tensor.mul_(1 + 0.3 * torch.rand(tensor.shape, generator=generator))
            elif tensor.is_floating_point() and bool(tensor.isfinite().all()):
                spread = float(tensor.std()) if tensor.numel() > 1 else 0.0
                tensor.add_((0.1 * spread or 0.02) * torch.randn(tensor.shape, generator=generator))
    return backbone


def images_of(size: int, number: int = 2) -> Tensor:
    """Return random images (B, 3, S, S)."""
    return torch.randn(number, 3, size, size, generator=torch.Generator().manual_seed(2))


def timms_own(backbone: Backbone, images: Tensor) -> Tensor:
    """Return what timm gives of a model that it has built itself, with the same weights."""
    spec, timm = backbone.spec, import_timm()
    arguments = {**spec.options, "num_classes": 0}
    try:
        model = timm.create_model(spec.name, img_size=spec.image_size, **arguments)
    except TypeError:
        model = timm.create_model(spec.name, **arguments)
    model.load_state_dict(backbone.model.state_dict())
    with torch.no_grad():
        pooled: Tensor = model.eval().forward_head(model.forward_features(images), pre_logits=True)
    return pooled


def difference(found: Tensor, wanted: Tensor) -> float:
    """Return the largest difference, as a share of the largest value."""
    return float((found - wanted).abs().max() / wanted.abs().max())


def adaptors_for(backbone: Backbone, seed: int = 0, *, trained: bool = True, in_context: bool = True) -> AdaptorSet:
    """Return a set for a backbone, in-context where it can be; a trained one has no zeros."""
    try:
        rank = RANK if in_context and backbone.projections else 0
    except BackboneError:
        rank = 0
    adaptors = AdaptorSet.of(backbone, BOTTLENECK, in_context_rank=rank, seed=seed)
    if trained:
        generator = torch.Generator().manual_seed(100 + seed)
        for name, parameter in adaptors.named_parameters():
            if "up" in name:
                nn.init.normal_(parameter, std=0.05, generator=generator)
    return adaptors


def fusion_for(sets: list[AdaptorSet], level: str = "token") -> Fusion:
    """Return a fusion that attends."""
    fusion = Fusion([each.requires_grad_(False) for each in sets], level=level, temperature=0.5)  # type: ignore[arg-type]
    fusion.start(query_std=0.3, key_std=0.3, generator=torch.Generator().manual_seed(9))
    return fusion


def without_gradients(backbone: Backbone, images: Tensor) -> list[str]:
    """Return the parts of a trained set that get no gradient; the backbone's get none."""
    adaptors = adaptors_for(backbone).requires_grad_()
    embeddings = backbone(images, adaptors)
    weights = torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(3))
    (embeddings * weights).sum().backward()
    assert all(each.grad is None for each in backbone.parameters())
    return [
        name for name, each in adaptors.named_parameters() if each.grad is None or not bool(each.grad.abs().sum() > 0)
    ]


def reopened(backbone: Backbone, folder: Path) -> tuple[GrappaModel, GrappaModel]:
    """Return the model of a fusion of two sets, and the same one saved and loaded."""
    sets = {f"k0000{seed}": adaptors_for(backbone, seed, in_context=False) for seed in (0, 1)}
    fusion = fusion_for(list(sets.values()))
    save_model(folder, backbone, sets, fusion, cache_size=backbone.spec.image_size)
    return GrappaModel(backbone, fusion, cache_size=backbone.spec.image_size), grappa.load_model(folder)


def reopened_set(backbone: Backbone, folder: Path) -> tuple[GrappaModel, GrappaModel]:
    """Return the model of one set, in-context where it can be, and the same one saved and loaded."""
    student = adaptors_for(backbone)
    save_model(folder, backbone, {"student": student}, None, cache_size=backbone.spec.image_size)
    return GrappaModel(backbone, student, cache_size=backbone.spec.image_size), grappa.load_model(folder)


def fused(
    backbone: Backbone, images: Tensor, level: str = "token", *, in_context: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the embeddings by a fusion of two sets and by its folded form, and the attention."""
    fusion = fusion_for([adaptors_for(backbone, seed, in_context=in_context) for seed in (0, 1)], level)
    with torch.no_grad():
        plain, attention = fused_forward(backbone, fusion, images)
        return plain, backbone(images, fusion.folded()), attention
