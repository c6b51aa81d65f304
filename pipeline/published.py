"""Finding a published artifact, or saying which command makes it."""

from __future__ import annotations

from pathlib import Path

from pipeline.artifacts import RunFolder


def published(folder: RunFolder, stage: str, instance: str | None = None) -> Path:
    """Return the folder of a published artifact; ValueError naming the command when it is missing."""
    artifact = folder.artifact(stage, instance)
    if artifact.manifest() is None:
        raise ValueError(f"{artifact.name} is missing in {folder.root}; run `grappa run {folder.root} --until {stage}`")
    return artifact.home
