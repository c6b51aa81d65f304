"""The stages, the run folder and the command line around the library ``grappa``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from grappa.model import GrappaModel

__all__ = ["load_model"]


def load_model(run: str | Path) -> GrappaModel:
    """Return the adapted model of a run; see :func:`grappa.pipeline.commands.search.load_model`."""
    from grappa.pipeline.commands.search import load_model as open_run

    return open_run(run)
