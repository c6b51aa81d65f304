"""A torch module of a user's own as the backbone: made by a function that the user names, never by a file's word."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable

from torch import nn

from grappa.backbone.spec import check_place
from grappa.backbone.unusable import BackboneError
from grappa.core.printing import sentence, shown

Maker = Callable[[], nn.Module] | str


def place_of(maker: Maker) -> str:
    """Return where a function is, ``package.module:function``."""
    if isinstance(maker, str):
        return maker
    module, name = (getattr(maker, each, "") for each in ("__module__", "__name__"))
    return f"{module}:{re.sub(r'[^0-9A-Za-z_]', '_', str(name)) or 'function'}"


def made_by(maker: Maker) -> nn.Module:
    """Return the module that a function, or the one at ``package.module:function``, makes; its numbers are float32.

    Raises:
        BackboneError: there is no such function, it fails, or it makes no module.
    """
    function = _imported(maker) if isinstance(maker, str) else maker
    try:
        module = function()
    except Exception as error:  # whatever a user's function raises
        raise BackboneError(f"{shown(maker)} failed ({type(error).__name__}: {sentence(error, limit=200)})") from error
    if not isinstance(module, nn.Module):
        raise BackboneError(f"{shown(maker)} returned {shown(module)}; expected a torch.nn.Module")
    return module.float()


def _imported(place: str) -> Callable[[], nn.Module]:
    check_place(place)
    name, _, function = place.partition(":")
    try:
        found: Callable[[], nn.Module] = getattr(importlib.import_module(name), function)
    except (ImportError, AttributeError) as error:
        raise BackboneError(
            f"backbone.module is {place}, but there is no such function ({sentence(error, limit=200)}); install its "
            "package, or set PYTHONPATH to the folder of its file"
        ) from error
    return found
