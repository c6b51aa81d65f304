"""Packages of which one stage alone has need: their lack is said at the start, not by that stage hours later."""

from __future__ import annotations

from collections.abc import Iterable

from grappa.core.extras import is_installed, missing_sentence
from grappa.pipeline.config.schema import Config


class MissingPackageError(ValueError):
    """A stage that is to run needs a package that is not installed; the message names the command."""


def missing_packages(config: Config) -> dict[str, str]:
    """Return by stage what it lacks, in a sentence with the command."""
    needed = {"index": "faiss"}
    if config.objects.provider == "grounding_dino":
        needed["objects"] = "transformers"
    lacking = {stage: package for stage, package in needed.items() if not is_installed(package)}
    return {stage: f"stage {stage} cannot run: {missing_sentence(package)}" for stage, package in lacking.items()}


def refuse_missing_packages(config: Config, stages: Iterable[str]) -> None:
    """Refuse to start on ``stages`` (names of those that are due) where one lacks its package."""
    lacking = missing_packages(config)
    if lacking:
        for stage in lacking.keys() & set(stages):
            raise MissingPackageError(lacking[stage])
