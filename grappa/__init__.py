"""Grappa: adapt one pretrained vision model to several retrieval domains at once, without labels.

``load_model`` opens a model, ``open_run`` a run folder, and ``run`` makes one. Nothing heavy is imported before use.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grappa.core.extras import missing_sentence
from grappa.core.home import expanded

if TYPE_CHECKING:
    from grappa.model import GrappaModel
    from grappa.pipeline.commands.notebook import run
    from grappa.pipeline.open_run import Run, open_run

__all__ = ["GrappaModel", "Run", "load_model", "open_run", "run"]
__version__ = "0.1.0"

_HOMES = {
    "GrappaModel": "grappa.model",
    "Run": "grappa.pipeline.open_run",
    "open_run": "grappa.pipeline.open_run",
    "run": "grappa.pipeline.commands.notebook",
}


def load_model(folder: str | Path, module: Callable[[], Any] | str | None = None) -> GrappaModel:
    """Open an exported model folder, or the deployed model of a run folder, as a torch module for images.

    ``hf-hub:OWNER/NAME``, with ``@REVISION`` or without, is an exported model on the Hugging Face hub: what its cache
    holds, or else the hub. The model is in evaluation mode on the CPU. module: the function that makes the backbone, of
    a model whose backbone is a module of your own. ValueError where ``folder`` is neither, or is damaged; of a run also
    where its model was not made yet; of the hub where it cannot be reached.
    """
    if isinstance(folder, str) and folder.startswith("hf-hub:"):
        path: Path = _imported("grappa.deploy.hub_model", "fetched_model", asked="load_model")(folder)
    else:
        path = Path(expanded(folder))
    if os.path.exists(path / "run.json"):  # False for a path that no file can have
        loaded: GrappaModel = _imported("grappa.pipeline.commands.search", "load_run_model", asked="load_model")(
            path, module
        )
        return loaded
    from grappa.model import load_model as load_exported

    return load_exported(path, module)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = _imported(_HOMES[name], name, asked=name)
    return value


def _imported(module: str, name: str, *, asked: str) -> Any:
    """Return a name of a module; where a package is missing, the error says how to install it for what was asked."""
    try:
        return getattr(import_module(module), name)
    except ModuleNotFoundError as error:
        sentence = missing_sentence(error.name)
        if sentence is None:
            raise
        raise ModuleNotFoundError(f"grappa.{asked}: {sentence}", name=error.name) from error


def __dir__() -> list[str]:
    return sorted({*__all__, "__version__"})
