"""Taking artifacts over from another run: those that are fresh there and have the recipe that is expected here."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from pipeline.artifacts import LOG_FILE, MANIFEST_FILE, Artifact, RunFolder
from pipeline.config import Config
from pipeline.freshness import artifact_state
from pipeline.recipes import MissingInputError, expected_recipe
from pipeline.status import Judge, instances, read_config
from pipeline.work import open_work, recover


def take_over(other: RunFolder, run: RunFolder, config: Config, *, say: Callable[[str], None]) -> None:
    """Link or copy every artifact of ``other`` that is fresh there, missing or stale here and of the recipe wanted."""
    there, taken = Judge(other, read_config(other)), []
    for stage, instance in instances(config):
        source, target = other.artifact(stage.name, instance), run.artifact(stage.name, instance)
        recover(target)
        try:
            expected = expected_recipe(run, config, stage, instance)
        except MissingInputError:
            continue
        if artifact_state(target, expected.recipe).kind == "fresh":
            continue
        known_there = instance in stage.instances(read_config(other))
        if not known_there or there.state(stage, instance).kind != "fresh":
            continue
        manifest = source.manifest()
        if manifest is None or manifest.recipe != expected.recipe:
            continue
        _copy(source, target)
        taken.append(target.name)
    say(f"taken over from {other.root}: {', '.join(taken) or 'nothing, no recipe is the same'}")


def _copy(source: Artifact, target: Artifact) -> None:
    manifest = source.manifest()
    assert manifest is not None, "judged fresh before"
    with open_work(target, manifest.recipe) as work:
        for name in (*manifest.outputs, LOG_FILE):
            if (source.home / name).exists():
                _link(source.home / name, work.path / name)
        work.publish({**manifest.provenance, "taken_from": str(source.path)})


def _link(source: Path, target: Path) -> None:
    """Give a file a second name (published files never change), or copy it to another file system."""
    assert source.name != MANIFEST_FILE, "a manifest is written by publish"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
