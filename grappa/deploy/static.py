"""A deployed model without hooks: what adapts a unit is a part of the unit's own forward, for compilers and exporters.

The class of an adapted module is replaced by one that is derived from it, as torch's parametrizations do, so that all
that its model reads of it stays. The residuals are submodules of the backbone, ``backbone.residuals``, and not of the
units: some models call every child of a unit. The embeddings are equal.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from grappa.backbone.adapting.adapted import Adaptation, listening, unhook
from grappa.backbone.adapting.projections import Projection
from grappa.backbone.adapting.units import Unit
from grappa.backbone.frozen import Backbone
from grappa.model import GrappaModel


def static_form(model: GrappaModel) -> GrappaModel:
    """Return a copy of a model that embeds without hooks: of a plain vision transformer the same modules, of others
    with the residuals as ``backbone.residuals``, each added by the module that it adapts.
    """
    copy = deepcopy(model)
    backbone, adaptation = copy.backbone, copy.adaptation
    if adaptation is not None and not backbone.takes_the_short_way(adaptation):
        _adapt(backbone, adaptation)
        copy.adaptation = None
    unhook(backbone.model)
    return copy.eval()


class _AdaptedUnit(nn.Module):
    """A unit that adds the residual of its output."""

    grappa_unit: Unit
    grappa_residual: tuple[_OfTokens]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output, unit = super().forward(*args, **kwargs), self.grappa_unit
        hidden = unit.tensor(output)
        return unit.replaced(output, hidden + unit.shaped(self.grappa_residual[0](unit.tokens(hidden)), hidden))


class _AdaptedProduct(nn.Module):
    """A linear module of queries, keys, or both, that adds its part of what an in-context adaptor says.

    grappa_windows: into how many rows attention cuts an image. grappa_part: the first column of the residual that is
    added, and the one behind the last; zeros beside them, where values are made.
    """

    grappa_windows: int
    grappa_part: tuple[int, int | None]
    grappa_residual: tuple[_OfTokens]

    def forward(self, given: Tensor) -> Tensor:
        product = super().forward(given)
        tokens_BTD = given.reshape(given.shape[0] // self.grappa_windows, -1, given.shape[-1])
        added = self.grappa_residual[0](tokens_BTD)[..., slice(*self.grappa_part)]
        added = added.reshape(*given.shape[:-1], added.shape[-1])
        out: Tensor = product + F.pad(added, (0, product.shape[-1] - added.shape[-1]))
        return out


class _OfTokens(nn.Module):
    """A residual of all tokens of an image; mean_first: their mean stands before them while it is computed."""

    def __init__(self, residual: Any, *, mean_first: bool) -> None:
        super().__init__()
        self.residual, self.mean_first = residual, mean_first

    def forward(self, tokens_BTD: Tensor) -> Tensor:
        if not self.mean_first:
            return self.residual(tokens_BTD)
        return self.residual(torch.cat([tokens_BTD.mean(1, keepdim=True), tokens_BTD], dim=1))[:, 1:]


def _adapt(backbone: Backbone, adaptation: Adaptation) -> None:
    """Put the residuals of an adaptation into the modules that they adapt."""
    mean_first = adaptation.reads_first and not backbone.has_class_token
    projections = backbone.projections if len(adaptation.in_context) else ()
    windows, residuals = _windows(backbone, projections), nn.ModuleList()
    if len(adaptation.outputs):
        for unit, residual in zip(backbone.units, adaptation.outputs, strict=True):
            residuals.append(_OfTokens(residual, mean_first=mean_first))
            module = _derived(backbone.model, unit.name, _AdaptedUnit, residuals[-1])
            module.grappa_unit = unit
    for place, residual in zip(projections, adaptation.in_context, strict=True):
        parts: dict[str, tuple[int, int | None]] = {place.query: (0, place.queries), place.key: (place.queries, None)}
        residuals.append(_OfTokens(residual, mean_first=mean_first))
        for name, part in ({place.query: (0, None)} if place.shared else parts).items():
            module = _derived(backbone.model, name, _AdaptedProduct, residuals[-1])
            module.grappa_part, module.grappa_windows = part, windows[name]
    backbone.residuals = residuals


def _derived(model: nn.Module, name: str, adapted: type[nn.Module], residual: nn.Module) -> Any:
    """Return the module of this name, whose class is from now on derived from its own and ``adapted``."""
    module: Any = model.get_submodule(name)
    own = type(module)
    module.__class__ = type(f"Adapted{own.__name__}", (adapted, own), {"__module__": own.__module__})
    module.grappa_residual = (residual,)  # in a tuple it is no child
    return module


def _windows(backbone: Backbone, projections: tuple[Projection, ...]) -> dict[str, int]:
    """Return into how many rows attention cuts an image, for each module of queries or keys: a pass of two shows it."""
    if not projections:
        return {}
    windows = {name: 1 for each in projections for name in (each.query, each.key)}

    def note(name: str, inputs: tuple[Any, ...], output: Any) -> None:
        if name in windows:
            windows[name] = inputs[0].shape[0] // 2

    first = next(backbone.parameters())
    side = backbone.spec.image_size
    with torch.no_grad(), listening(note):
        backbone(torch.zeros(2, 3, side, side, dtype=first.dtype, device=first.device))
    return windows
