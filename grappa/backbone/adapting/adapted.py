"""One forward pass of any model with what adapts it: hooks that stay on its modules, and act only while they are told.

A hook asks which adaptation acts in its own thread; where there is none, the model is the plain
one. So nothing is added to the model or removed from it during a pass, and passes in several threads may differ.

Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from grappa.backbone.adapting.projections import Projection
from grappa.backbone.adapting.units import Unit
from grappa.backbone.weights import BackboneError

Residual = Callable[[Tensor], Tensor]
Residuals = Sequence[Residual] | nn.ModuleList
Listener = Callable[[str, tuple[Any, ...], Any], Any]


class Adaptation(Protocol):
    """What adapts the backbone: in each of two places one residual a unit, or no residual at all.

    ``outputs``: (B, T, D) -> (B, T, D), from a unit's output to what is added to it; in a plain vision transformer's
    last block T is 1, the class token, since no other token is read after it. ``in_context``: (B, T, D) -> (B, T, Q),
    from what queries and keys are made of to what is added to them, side by side. ``reads_first``: whether the first
    token must stand for the image. It is the class token; where the model reads none, the mean of all tokens, which is
    then put before them.
    """

    @property
    def outputs(self) -> Residuals: ...

    @property
    def in_context(self) -> Residuals: ...

    @property
    def reads_first(self) -> bool: ...


class _Thread(threading.local):
    """What listens in this thread."""

    listener: Listener | None = None


_thread = _Thread()


class _Hook:
    """A forward hook that hands the module's output to who listens in this thread."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        listener = _thread.listener
        return None if listener is None else listener(self.name, inputs, output)


def hook(model: nn.Module, names: Sequence[str]) -> None:
    """Put a hook on the modules of these names, once."""
    for name in dict.fromkeys(names):
        module = model.get_submodule(name)
        if not any(isinstance(each, _Hook) for each in module._forward_hooks.values()):
            module.register_forward_hook(_Hook(name))


def unhook(model: nn.Module) -> None:
    """Take the hooks off all modules again."""
    for module in model.modules():
        for key in [key for key, each in module._forward_hooks.items() if isinstance(each, _Hook)]:
            del module._forward_hooks[key]


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Hand the outputs of all hooked modules, in this thread, to ``listener(name, inputs, output)``.

    What it returns becomes the module's output, unless it is None.
    """
    before, _thread.listener = _thread.listener, listener
    try:
        yield
    finally:
        _thread.listener = before


class Adding:
    """Adds the residuals of an adaptation to the outputs of units and projections, during one forward pass."""

    def __init__(
        self,
        adaptation: Adaptation,
        units: Sequence[Unit],
        projections: Sequence[Projection],
        batch: int,
        *,
        class_token: bool,
    ) -> None:
        self.batch, self.attends = batch, adaptation.reads_first
        self.mean_first = adaptation.reads_first and not class_token
        self.outputs = _by_name([unit.name for unit in units], units, adaptation.outputs)
        self.queries = _by_name([each.query for each in projections], projections, adaptation.in_context)
        self.keys = _by_name([each.key for each in projections], projections, adaptation.in_context)
        self.waiting: dict[str, tuple[Tensor, Tensor]] = {}

    def __call__(self, name: str, inputs: tuple[Any, ...], output: Any) -> Any:
        if name in self.outputs:
            unit, residual = self.outputs[name]
            hidden = unit.tensor(output)
            added = unit.shaped(self._residual(residual, unit.tokens(hidden)), hidden)
            output = unit.replaced(output, hidden + added)
        if name in self.queries or name in self.keys:
            output = output + self._to_product(name, inputs[0], output)
        return output

    def _residual(self, residual: Residual, tokens_BTD: Tensor) -> Tensor:
        if not self.mean_first:
            return residual(tokens_BTD)
        return residual(torch.cat([tokens_BTD.mean(1, keepdim=True), tokens_BTD], dim=1))[:, 1:]

    def _to_product(self, name: str, given: Tensor, product: Tensor) -> Tensor:
        """Return what is added to a product of queries, keys, or both: zeros beside them, where values are made."""
        asks = name in self.queries
        projection, residual = self.queries[name] if asks else self.keys[name]
        if projection.shared:
            both = self._in_context(residual, given)
            return F.pad(both, (0, product.shape[-1] - both.shape[-1]))
        query, key = self._split(projection, residual, given)
        return query if asks else F.pad(key, (0, product.shape[-1] - key.shape[-1]))

    def _split(self, projection: Projection, residual: Residual, given: Tensor) -> tuple[Tensor, Tensor]:
        """Return what is added to queries and to keys that two modules make; both attend over one input."""
        if projection.query in self.waiting:
            seen, both = self.waiting.pop(projection.query)
            if seen is given:
                return both[..., : projection.queries], both[..., projection.queries :]
            if self.attends:
                raise BackboneError(
                    f"queries and keys of {projection.query} are made of different inputs, so in-context adaptors of "
                    "several sets cannot attend there; set adaptors.kind=bottleneck"
                )
        both = self._in_context(residual, given)
        self.waiting[projection.query] = given, both
        return both[..., : projection.queries], both[..., projection.queries :]

    def _in_context(self, residual: Residual, given: Tensor) -> Tensor:
        """Return the residual of all tokens of an image together, whatever windows attention cuts them into."""
        tokens_BTD = given.reshape(self.batch, -1, given.shape[-1])
        added = self._residual(residual, tokens_BTD)
        return added.reshape(*given.shape[:-1], added.shape[-1])


def _by_name(names: Sequence[str], places: Sequence[Any], residuals: Residuals) -> Mapping[str, tuple[Any, Any]]:
    if not len(residuals):
        return {}
    return {name: (place, each) for name, place, each in zip(names, places, residuals, strict=True)}
