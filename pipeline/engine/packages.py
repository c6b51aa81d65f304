"""Packages that only one stage needs: a missing one is reported at the start, not hours later by that stage."""

from __future__ import annotations

from collections.abc import Iterable

from grappa.core.extras import is_installed, missing_sentence
from grappa.pipeline.config.schema import Config

TRACKED_STAGES = ("adaptors", "fusion", "student")


class MissingPackageError(ValueError):
    """A stage that is to run needs a package that is not installed; the message names the command that installs it."""


def missing_packages(config: Config) -> dict[str, str]:
    """Return, for each stage that lacks a package, a sentence that names the command to install it."""
    needed = {"index": "faiss"}
    if config.objects.provider == "grounding_dino":
        needed["objects"] = "transformers"
    lacking = {stage: package for stage, package in needed.items() if not is_installed(package)}
    found = {stage: f"stage {stage} cannot run: {missing_sentence(package)}" for stage, package in lacking.items()}
    for package in config.compute.trackers:
        if not is_installed(package):
            sentence = f"compute.trackers names {package}: {missing_sentence(package)}, or take it out"
            found |= dict.fromkeys(TRACKED_STAGES, sentence)
    return found


def refuse_missing_packages(config: Config, stages: Iterable[str]) -> None:
    """Raise MissingPackageError where one of ``stages``, the names of the stages to run, lacks its package."""
    lacking = missing_packages(config)
    if lacking:
        due = set(stages)
        for stage in [each for each in lacking if each in due]:
            raise MissingPackageError(lacking[stage])
