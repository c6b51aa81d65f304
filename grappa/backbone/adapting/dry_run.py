"""What a model gives for images of a size, found without computing it: a pass by shapes alone, on the device ``meta``.

Shapes: B batch, S image side.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from grappa.backbone.adapting.adapted import listening
from grappa.backbone.adapting.projections import Projection
from grappa.backbone.adapting.units import Unit, measured
from grappa.backbone.weights import BackboneError
from grappa.core.printing import sentence

BATCH = 3  # unlike the numbers of tensors that stand beside images


@dataclass(frozen=True)
class Found:
    """What a pass has shown: the units and projections that take part once, and the width of the embedding."""

    units: tuple[Unit, ...]
    projections: tuple[Projection, ...]
    embedding_dim: int


def without_tensors(model: nn.Module) -> nn.Module:
    """Return a copy of a model, with its hooks, whose parameters and buffers have shapes and no memory."""
    tensors: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        empty = torch.empty_like(tensor, device="meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        tensors[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_parameter else empty
    return deepcopy(model, tensors)


def look(
    model: nn.Module,
    embed: Callable[[nn.Module, Tensor], Any],
    image_size: int,
    units: Sequence[str],
    projections: Sequence[Projection],
) -> Found:
    """Return what a pass of three images shows of the modules that may be units and projections.

    Where a model cannot be passed by shapes alone, it embeds three black images.

    Raises:
        BackboneError: it embeds no images of this size, or gives no vector an image.
    """
    calls: dict[str, list[Any]] = {}

    def note(name: str, inputs: tuple[Any, ...], output: Any) -> None:
        calls.setdefault(name, []).append(output)

    with torch.no_grad(), listening(note):
        embedding = _pass(model, embed, image_size, calls)
    if not isinstance(embedding, Tensor) or embedding.ndim != 2 or len(embedding) != BATCH:
        found = f"a tensor of shape {tuple(embedding.shape)}" if isinstance(embedding, Tensor) else type(embedding)
        raise BackboneError(f"the {type(model).__name__} gives {found} for {BATCH} images, not one vector an image")
    known: list[Unit] = []
    for name in sorted((name for name in calls if name in set(units)), key=list(calls).index):
        unit = measured(name, calls[name][0], BATCH, known) if len(calls[name]) == 1 else None
        known += [] if unit is None else [unit]
    return Found(tuple(known), tuple(each for each in projections if _once(each, calls)), embedding.shape[1])


def _pass(
    model: nn.Module, embed: Callable[[nn.Module, Tensor], Any], image_size: int, calls: dict[str, list[Any]]
) -> Any:
    shape = (BATCH, 3, image_size, image_size)
    twin = without_tensors(model)
    try:
        with torch.device("meta"):
            return embed(twin, torch.empty(shape, device="meta"))
    except Exception as on_paper:  # what the device cannot do, or the model; a pass with numbers tells them apart
        device = next((each.device for each in model.parameters()), torch.device("cpu"))
        if device.type == "meta":
            raise _cannot(model, image_size, on_paper) from on_paper
    calls.clear()
    try:
        return embed(model, torch.zeros(shape, device=device))
    except Exception as error:
        raise _cannot(model, image_size, error) from error


def _cannot(model: nn.Module, image_size: int, error: Exception) -> BackboneError:
    if isinstance(error, NotImplementedError):
        reason = sentence(error, limit=200)
        return BackboneError(
            f"the {type(model).__name__} gives no vector of an image ({reason}); choose another backbone"
        )
    return BackboneError(
        f"the {type(model).__name__} embeds no images of {image_size} x {image_size} pixels "
        f"({sentence(error, limit=200)}); set backbone.image_size to a size that it was made for"
    )


def _once(projection: Projection, calls: dict[str, list[Any]]) -> bool:
    return all(len(calls.get(name, ())) == 1 for name in (projection.query, projection.key))


def peak_numbers(run: Callable[[Tensor], Tensor], image_size: int, *, held: Iterable[Tensor], gradients: bool) -> int:
    """Return how many numbers (float32) a pass of one image holds at most, with its gradients' pass if they are asked
    for.

    run: from (1, 3, S, S) on the device ``meta`` to embeddings, by a model whose tensors are there too. held: those
    tensors, which do not count.
    """
    with torch.set_grad_enabled(gradients), _Living(held) as living:
        embeddings = run(torch.zeros((1, 3, image_size, image_size), device="meta"))
        if gradients:
            embeddings.sum().backward()
    return living.peak // 4


class _Living(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make, while they live, and their peak."""

    def __init__(self, held: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known = {each.untyped_storage()._cdata for each in held}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return made

    def _note(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size
