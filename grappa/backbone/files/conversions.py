"""timm, the library that knows the architectures: imported safely, and its own conversions of foreign weight names."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

State = dict[str, Tensor]
Conversion = Callable[[State, nn.Module], State]
_shim: list[torch.library.Library] = []


def import_timm() -> Any:
    """Import timm, also where a CPU-only torch stands beside a CUDA-built torchvision.

    There torchvision's compiled operators do not load, and its import fails on the missing schema of ``nms``. To
    declare two schemas is enough for all that timm needs. Where torchvision loads, nothing is declared.
    """
    try:
        return importlib.import_module("timm")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _shim.append(library)
    return importlib.import_module("timm")


def architecture_of(model: nn.Module) -> str:
    """Return the name under which timm registers the architecture of ``model``; "" where it is none of timm's."""
    record: Any = getattr(model, "pretrained_cfg", None) or {}
    name = record.get("architecture", "") if isinstance(record, dict) else getattr(record, "architecture", "")
    return str(name or "")


def conversion_of(model: nn.Module) -> Conversion | None:
    """Return timm's own conversion of weights for the architecture of ``model``; None where there is none.

    timm chooses it while it builds a pretrained model (there is one for FlexiViT, one for RADIO ...), so the
    architecture is built once more, without memory and with nothing loaded.
    """
    name, timm = architecture_of(model), import_timm()
    if not name or not timm.is_model(name):
        return None
    chosen: list[Any] = []

    def choose(*_: Any, filter_fn: Any = None, **__: Any) -> None:
        chosen.append(filter_fn)

    with patch.object(timm.models._builder, "load_pretrained", choose), torch.device("meta"), quiet():
        timm.create_model(name, pretrained=True)
    return _checked(chosen[-1]) if chosen and chosen[-1] else None


def _checked(conversion: Callable[..., State]) -> Conversion:
    def convert(state: State, model: nn.Module) -> State:
        with quiet():
            try:
                return conversion(state, model)
            except TypeError:  # timm's older ones have one argument
                return conversion(state)

    return convert


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep timm's remarks about a conversion from the terminal: what matters of them is said by the caller."""
    logger = logging.getLogger("timm")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(before)
