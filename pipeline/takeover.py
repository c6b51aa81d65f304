"""Taking artifacts over from another run: those that are fresh there and have the recipe that is expected here."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from pipeline.artifacts import LOG_FILE, Artifact, Manifest, Recipe, RunFolder
from pipeline.config import Config
from pipeline.freshness import artifact_state
from pipeline.recipes import MissingInputError, expected_recipe
from pipeline.stages import Stage
from pipeline.status import Judge, instances, read_config
from pipeline.work import open_work, recover


def take_over(other: RunFolder, run: RunFolder, config: Config, *, say: Callable[[str], None]) -> None:
    """Link or copy each artifact of ``other`` that is fresh there, not fresh here and of the recipe wanted here."""
    there = read_config(other)
    judge, known, taken = Judge(other, there), set(instances(there)), []
    for stage, instance in instances(config):
        source, target = other.artifact(stage.name, instance), run.artifact(stage.name, instance)
        recover(target)
        wanted = _wanted(run, config, stage, instance)
        if wanted is None or (stage, instance) not in known or judge.state(stage, instance).kind != "fresh":
            continue
        manifest = source.manifest()
        if manifest and manifest.recipe == wanted and artifact_state(target, wanted).kind != "fresh":
            _copy(source, manifest, target)
            taken.append(target.name)
    say(f"taken over from {other.root}: {', '.join(taken) or 'nothing, no other artifact has a recipe of this run'}")


def _wanted(run: RunFolder, config: Config, stage: Stage, instance: str | None) -> Recipe | None:
    try:
        return expected_recipe(run, config, stage, instance).recipe
    except MissingInputError:
        return None


def _copy(source: Artifact, manifest: Manifest, target: Artifact) -> None:
    with open_work(target, manifest.recipe) as work:
        work.start_over()  # linked files are the other run's: a stage must never write into them
        for name in (*manifest.outputs, LOG_FILE):
            if (source.home / name).exists():
                _link(source.home / name, work.path / name)
        if source.manifest() != manifest:
            raise ValueError(f"{source.path} was replaced while it was taken over; give the same command again")
        work.publish({**manifest.provenance, "taken_from": str(source.path)})


def _link(source: Path, target: Path) -> None:
    """Give a file a second name (published files never change), or copy it to another file system."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
