"""The verdict of a run, as its artifact holds it, and the model that is deployed."""

from __future__ import annotations

import json
from typing import Any

from grappa.pipeline.config.schema import Config
from grappa.pipeline.graph.models import deployed_model
from grappa.pipeline.store.artifacts import RunFolder, published

FILE = "verdict.json"


def read_verdict(run: RunFolder) -> dict[str, Any]:
    """Return what ``verdict.json`` holds; ValueError, with the command that helps, where there is no verdict yet."""
    found: dict[str, Any] = json.loads((published(run, "verdict") / FILE).read_text())
    return found


def deployed_in(run: RunFolder, config: Config) -> str:
    """Return the model that is deployed, indexed and searched: the given one, or the choice of the verdict."""
    return deployed_model(config, read_verdict(run)["deployed"] if config.model.source == "auto" else None)
