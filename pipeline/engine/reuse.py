"""Reusing artifacts of other runs: whole artifacts that have the fingerprint which this run expects."""

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
from grappa.pipeline.store.artifacts import LOG_FILE, Artifact, Fingerprint, Manifest, RunFolder, damage_sentence
from grappa.pipeline.store.work import OtherBytesError, open_work, recover


def reuse_artifacts(other: RunFolder, run: RunFolder, config: Config, *, say: Callable[[str], None]) -> None:
    """Link or copy the artifacts of ``other`` that have the expected fingerprint, where ``run`` has no fresh ones."""
    reused = []
    for node in nodes(config):
        recover(run.artifact(node))
        if reuse_artifact([other], run, config, node, say=say):
            reused.append(node.name)
    nothing = "nothing, no other artifact has a fingerprint of this run"
    say(f"reused from {other.root}: {', '.join(reused) or nothing}")


def reuse_artifact(
    others: Iterable[RunFolder], run: RunFolder, config: Config, node: Node, *, say: Callable[[str], None]
) -> RunFolder | None:
    """Link or copy the artifact of a node, if it is not fresh, from the first run that has it; return that run or None.

    The artifact may be stale in the other run: its fingerprint says from what it was made. Its bytes must be those of
    its manifest; ``say`` gets a sentence for an artifact that is damaged and therefore not reused.
    """
    wanted, target = _wanted(run, config, node), run.artifact(node)
    if wanted is None or artifact_state(target, wanted).kind == "fresh":
        return None
    for other in others:
        source, manifest = other.artifact(node), read_manifest(other, node)
        if manifest and manifest.fingerprint == wanted:
            problems = source.check() or _copy(source, manifest, target)
            if not problems:
                return other
            say(f"not reused: {damage_sentence(other, node.name, problems)}")
    return None


def _wanted(run: RunFolder, config: Config, node: Node) -> Fingerprint | None:
    try:
        return expected_fingerprint(run, config, node).fingerprint
    except MissingInputError:
        return None


def _copy(source: Artifact, manifest: Manifest, target: Artifact) -> list[str]:
    """Publish the files of another run's artifact; if one is damaged, nothing is published and a line says so."""
    with open_work(target, manifest.fingerprint) as work:
        work.start_over()  # linked files belong to the other run: a stage must never write into them
        for name in (*manifest.outputs, LOG_FILE):
            if (source.home / name).exists():
                _link(source.home / name, work.path / name)
        if source.manifest() != manifest:
            raise ValueError(f"{source.path} was replaced while it was copied; give the same command again")
        try:
            work.publish({**manifest.provenance, "taken_from": str(source.path)}, copied=manifest)
        except OtherBytesError as error:
            return [str(error)]
    return []


def _link(source: Path, target: Path) -> None:
    """Link a file (published files never change), or copy it where another file system allows no link."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
