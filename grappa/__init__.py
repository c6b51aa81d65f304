"""Grappa: adapt one pretrained vision model to several retrieval domains at once, without labels."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from grappa.model import GrappaModel

__all__ = ["load_model"]
__version__ = "0.1.0"


def load_model(folder: str | Path) -> GrappaModel:
    """Open an exported model folder; see :func:`grappa.model.load_model`. Nothing heavy is imported before the call."""
    from grappa.model import load_model as open_folder

    return open_folder(folder)
