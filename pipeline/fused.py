"""Rebuilding a trained fusion from its artifacts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

from pipeline.context import StageContext

if TYPE_CHECKING:
    from grappa.adaptors import AdaptorSet
    from grappa.fusion import Fusion


def open_fusion(context: StageContext, instance: str, sets: Mapping[str, AdaptorSet]) -> Fusion:
    """Return the trained fusion over the given sets."""
    from safetensors import safe_open

    from grappa.fusion import Fusion

    with safe_open(context.input("fusion", instance) / "fusion.safetensors", "pt") as file:
        form = json.loads(file.metadata()["fusion"])
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    fusion = Fusion(list(sets.values()), level=form["level"], temperature=form["temperature"])
    fusion.load_trained_state(state)
    return fusion
