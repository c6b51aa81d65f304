"""`grappa backbones`: the pretrained models of timm by name, and which of them can be backbones."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from grappa.backbone.naming.catalog import CatalogEntry, list_backbones
from grappa.core.printing import shown
from grappa.pipeline.commands.model_input import readable_size

Say = Callable[[str], None]
HEADER = ("name", "input", "width", "family", "weights")
NARROWEST = 24  # columns of a terminal that names have at least


def found_backbones(pattern: str | None) -> list[CatalogEntry]:
    """Return the pretrained models whose name matches a pattern, all without one; ValueError where there is none."""
    found = list_backbones(pattern or "*")
    if not found:
        raise ValueError(
            f"no pretrained model of timm has a name like {shown(pattern)}; try a part of it, as in dinov2"
        )
    return found


def to_json(entry: CatalogEntry) -> dict[str, Any]:
    """Return an entry as plain values; weights: the path of their file on this machine."""
    weights = None if entry.weights is None else os.fspath(entry.weights)
    return {**asdict(entry), "weights": weights, "refused": entry.refused or None}


def say_backbones(found: list[CatalogEntry], say: Say) -> None:
    """Say a line for each model in columns, and then which are refused, and why."""
    rows = [HEADER, *map(_cells, found)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    if sys.stdout.isatty():  # a longer name pushes the other cells of its line aside
        room = shutil.get_terminal_size().columns - sum(width + 2 for width in widths[1:])
        widths[0] = min(widths[0], max(room, NARROWEST))
    for name, size, width, family, weights in rows:
        cells = (f"{name:<{widths[0]}}", f"{size:>{widths[1]}}", f"{width:>{widths[2]}}", f"{family:<{widths[3]}}")
        say("  ".join((*cells, weights)))
    _say_refused(found, say)


def _cells(entry: CatalogEntry) -> tuple[str, ...]:
    height, width = entry.image_size
    size = f"{height}" if height == width else f"{height}x{width}"
    at_hand = "-" if entry.weights is None else readable_size(entry.weights.stat().st_size)
    embedding = "-" if entry.width is None else f"{entry.width}"
    return entry.name, size, embedding, entry.family, "refused" if entry.refused else at_hand


def _say_refused(found: list[CatalogEntry], say: Say) -> None:
    reasons: dict[str, list[str]] = {}
    for entry in found:
        if entry.refused:
            reasons.setdefault(entry.refused, []).append(entry.name)
    at_hand, refused = sum(entry.weights is not None for entry in found), sum(map(len, reasons.values()))
    say(f"{len(found)} pretrained models; the weights of {at_hand} are on this machine; {refused} are refused")
    for reason, names in reasons.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        say(f"refused: {names[0]}{more}: {reason}")
