"""Taking artifacts over from other runs: those that are whole there and have the fingerprint that is expected here."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from grappa.pipeline.config.schema import Config
from grappa.pipeline.engine.externals import MissingInputError
from grappa.pipeline.engine.fingerprints import expected_fingerprint, read_manifest
from grappa.pipeline.engine.freshness import artifact_state
from grappa.pipeline.graph.node import Node
from grappa.pipeline.graph.stages import nodes
from grappa.pipeline.store.artifacts import LOG_FILE, Artifact, Fingerprint, Manifest, RunFolder
from grappa.pipeline.store.work import open_work, recover


def take_over(other: RunFolder, run: RunFolder, config: Config, *, say: Callable[[str], None]) -> None:
    """Link or copy each artifact of ``other`` that is not fresh here and has the fingerprint wanted here."""
    taken = []
    for node in nodes(config):
        recover(run.artifact(node))
        if take_over_one([other], run, config, node):
            taken.append(node.name)
    nothing = "nothing, no other artifact has a fingerprint of this run"
    say(f"taken over from {other.root}: {', '.join(taken) or nothing}")


def take_over_one(others: Iterable[RunFolder], run: RunFolder, config: Config, node: Node) -> RunFolder | None:
    """Link or copy one artifact that is not fresh here from the first run that has it; return that run, or None.

    Whether it is stale there does not matter: the fingerprint says what it was made of.
    """
    wanted, target = _wanted(run, config, node), run.artifact(node)
    if wanted is None or artifact_state(target, wanted).kind == "fresh":
        return None
    for other in others:
        source, manifest = other.artifact(node), read_manifest(other, node)
        if manifest and manifest.fingerprint == wanted and not source.check():
            _copy(source, manifest, target)
            return other
    return None


def _wanted(run: RunFolder, config: Config, node: Node) -> Fingerprint | None:
    try:
        return expected_fingerprint(run, config, node).fingerprint
    except MissingInputError:
        return None


def _copy(source: Artifact, manifest: Manifest, target: Artifact) -> None:
    with open_work(target, manifest.fingerprint) as work:
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
