"""Which modules of a model are adapted: its units, found by their names, and the shape of what each gives.

A unit is a block: a module whose output the next one reads. Models name their blocks in few ways (``blocks.3``,
``stages.1.blocks.0``, ``layers.1.blocks.0``, ``layer2.0``, ``s3.b4``); ``_NAMES`` lists them. A module may also say
itself which are its units: an attribute ``units`` with their names.

Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from grappa.backbone.weights import BackboneError
from grappa.core.printing import shown

Layout = Literal["tokens", "channels_last", "channels_first"]

_NAMES = re.compile(
    r"\d+|(serial_|conv_|cls_attn_)?blocks?\d*|(dense_)?stages?\d*|layers?\d*|[sb]\d+|levels?\d*|network|features|body"
    r"|encoder|transformers|transformer_encoder|denseblock\d+|repeat\w*|[Mm]ixed_\w+|cell_\d+|conv\d+_\d+"
)
_CONTAINERS = (nn.Sequential, nn.ModuleList)


@dataclass(frozen=True)
class Unit:
    """A module that is adapted, and what it gives.

    width: D. layout: how the D channels lie in the output. index: which tensor, where the output is a tuple or a list:
    the first one with a line an image.
    """

    name: str
    width: int
    layout: Layout = "tokens"
    index: int | None = None

    def tokens(self, hidden: Tensor) -> Tensor:
        """Return the unit's tensor as tokens, (B, T, D)."""
        if self.layout == "channels_first":
            return hidden.flatten(2).transpose(1, 2)
        return hidden if hidden.ndim == 3 else hidden.flatten(1, -2)

    def shaped(self, tokens_BTD: Tensor, hidden: Tensor) -> Tensor:
        """Return tokens (B, T, D) in the shape of the unit's tensor ``hidden``."""
        if self.layout == "channels_first":
            return tokens_BTD.transpose(1, 2).unflatten(2, hidden.shape[2:])
        return tokens_BTD if hidden.ndim == 3 else tokens_BTD.unflatten(1, hidden.shape[1:-1])

    def tensor(self, output: Any) -> Tensor:
        """Return the tensor of the unit's output that is adapted."""
        found: Tensor = output if self.index is None else output[self.index]
        return found

    def replaced(self, output: Any, tensor: Tensor) -> Any:
        """Return the unit's output with another tensor in place of the adapted one."""
        if self.index is None:
            return tensor
        parts = list(output)
        parts[self.index] = tensor
        return tuple(parts) if isinstance(output, tuple) else parts


def find_units(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the modules that may be units, in the order in which the model holds them.

    Of modules within each other the innermost blocks count. BackboneError: the model's own ``units`` are none of its
    modules.
    """
    own: Any = getattr(model, "units", None)
    if own is not None and not isinstance(own, nn.Module):
        return _own_units(model, own)
    found: list[str] = []
    _walk(model, "", found)
    return tuple(found)


def _own_units(model: nn.Module, names: Iterable[str]) -> tuple[str, ...]:
    modules, names = dict(model.named_modules()), list(names)
    for name in names:
        if not name or name not in modules:
            raise BackboneError(f"units names {shown(name)}, which is no module of the {type(model).__name__}")
    return tuple(names)


def _walk(module: nn.Module, path: str, found: list[str]) -> bool:
    """Note the units in ``module``, or the module itself where it has none; tell whether anything was noted."""
    inside = False
    if not _is_block(module, path):
        for name, child in module.named_children():
            if _NAMES.fullmatch(name) or (path and isinstance(module, _CONTAINERS) and len(list(child.children()))):
                inside = _walk(child, f"{path}.{name}" if path else name, found) or inside
    if inside or not path or not any(True for _ in module.parameters()) or isinstance(module, nn.ModuleList):
        return inside
    found.append(path)
    return True


def _is_block(module: nn.Module, path: str) -> bool:
    """Tell whether a module is an item of ``blocks``: what it is made of are parts of a block."""
    holder = path.rpartition(".")[0].rpartition(".")[2]
    return "block" in holder and path.rpartition(".")[2].isdigit() and not isinstance(module, _CONTAINERS)


def measured(name: str, output: Any, batch: int, siblings: Sequence[Unit]) -> Unit | None:
    """Return the unit of this name by what it gave for a batch of images; None where it can be none.

    siblings: units of the same model, whose layout decides where a map of as many channels as rows does not.
    """
    index, tensor = _first_tensor(output, batch)
    if tensor is None or tensor.ndim not in (3, 4) or not tensor.is_floating_point():
        return None
    layout = _layout(tuple(tensor.shape), siblings)
    return Unit(name, tensor.shape[1 if layout == "channels_first" else -1], layout, index)


def _first_tensor(output: Any, batch: int) -> tuple[int | None, Tensor | None]:
    if isinstance(output, Tensor):
        return None, output if len(output) == batch else None
    if isinstance(output, tuple | list):
        for index, each in enumerate(output):
            if isinstance(each, Tensor) and each.ndim in (3, 4) and len(each) == batch:
                return index, each
    return None, None


def _layout(shape: tuple[int, ...], siblings: Sequence[Unit]) -> Layout:
    """Return the layout of a tensor: of a map, the two sides that are alike are its rows and columns."""
    if len(shape) == 3:
        return "tokens"
    if shape[1] == shape[2] == shape[3]:
        last = [each.layout for each in siblings if each.layout != "tokens"]
        return last[-1] if last else "channels_first"
    return "channels_first" if shape[2] == shape[3] else "channels_last"
