"""The fingerprint that a node should have now: from configuration, upstream manifests and files beside the run."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from grappa.pipeline.config.schema import Config
from grappa.pipeline.engine.externals import (
    MissingInputError,
    backbone_digests,
    detector_digests,
    given_digests,
)
from grappa.pipeline.graph.node import Node
from grappa.pipeline.graph.stages import Input, find_stage, settings_of
from grappa.pipeline.store.artifacts import CorruptManifest, Manifest, RunFolder, quoted

Read = Callable[[Node], Manifest | None]
RANGE = "range"  # in the fingerprint of a range of rows: which one it is
SOURCES, SOURCES_FILE = Node("sources"), "sources.parquet"
SOURCES_FINGERPRINT: dict[str, Any] = {"stage": "sources", "instance": None, "version": 1, "config": {}, "inputs": {}}


@dataclass(frozen=True)
class Expected:
    """A fingerprint, and notes for the provenance (such as the path of the weights)."""

    fingerprint: dict[str, Any]
    notes: dict[str, Any] = field(default_factory=dict)


def expected_fingerprint(run: RunFolder, config: Config, node: Node, read: Read | None = None) -> Expected:
    """Return the fingerprint that a node should have now.

    Only manifests are read, and weights that changed since they were hashed. Raises MissingInputError when an input is
    missing, with a line such as ``upstream features is missing``. ``read``: gives the manifests, as ``read_manifest``
    of the run does, which is the default.
    """
    read = read or partial(read_manifest, run)
    stage = find_stage(node.stage)
    inputs: dict[str, dict[str, str]] = {}
    notes: dict[str, Any] = {}
    for each in stage.inputs(config, node.instance):
        inputs.setdefault(each.node.name, {}).update(_input_digests(each, read))
    if "sources" in stage.externals:
        inputs["sources"] = {SOURCES_FILE: sources_manifest(run, read).outputs[SOURCES_FILE]["sha256"]}
    if "weights" in stage.externals:
        inputs["weights"], notes = _weights(config, read(node))
    if "detector" in stage.externals and config.objects.provider == "grounding_dino":
        manifest = read(node)
        inputs["detector"], found = detector_digests(config, manifest.provenance.get("detector") if manifest else None)
        notes = {"detector": found}
    if "embeddings" in stage.externals:
        manifest = read(node)
        known = manifest.provenance.get("embeddings") if manifest else None
        inputs["embeddings"], notes = given_digests(config, run, known)
    fingerprint = {"stage": node.stage, "instance": node.instance, "version": stage.version}
    settings = settings_of(node, config)
    if node.rows:  # which rows they are depends on the batches
        settings |= {RANGE: node.rows.name, "compute.inference_batch_size": config.compute.inference_batch_size}
    return Expected(fingerprint | {"config": settings, "inputs": inputs}, notes)


def read_manifest(run: RunFolder, node: Node | str) -> Manifest | None:
    """Return the manifest of an artifact, or None when it is missing or corrupt."""
    try:
        return run.artifact(node).manifest()
    except CorruptManifest:
        return None


def sources_manifest(run: RunFolder, read: Read | None = None) -> Manifest:
    """Return the manifest of the listed images; MissingInputError when there is none."""
    manifest = (read or partial(read_manifest, run))(SOURCES)
    if manifest is None or SOURCES_FILE not in manifest.outputs:
        raise MissingInputError(f"upstream sources is missing: run `grappa init {quoted(run.root)}`")
    return manifest


def image_roots(run: RunFolder) -> list[str]:
    """Return the folders that the column ``root`` of a run's tables numbers, where they are now."""
    return list(sources_manifest(run).provenance["roots"])


def digest_of(outputs: Mapping[str, Any], name: str) -> str | None:
    """Return the sha256 of an output, or None where it is missing.

    The digest of a folder (``pixels/``) is that of its ``name sha256`` lines, sorted by name.
    """
    if not name.endswith("/"):
        return str(outputs[name]["sha256"]) if name in outputs else None
    lines = [f"{file} {outputs[file]['sha256']}\n" for file in sorted(outputs) if file.startswith(name)]
    return hashlib.sha256("".join(lines).encode()).hexdigest() if lines else None


def _input_digests(source: Input, read: Read) -> dict[str, str]:
    manifest = read(source.node)
    if manifest is None:
        raise MissingInputError(f"upstream {source.node} is missing")
    digests = {name: digest_of(manifest.outputs, name) for name in source.files}
    lacking = [name for name, digest in digests.items() if digest is None]
    if lacking:
        raise MissingInputError(f"upstream {source.node} has no {lacking[0]}")
    return {name: digest for name, digest in digests.items() if digest is not None}


def _weights(config: Config, manifest: Manifest | None) -> tuple[dict[str, str], dict[str, Any]]:
    """Return the digests of the backbone's weights for the fingerprint, and their provenance."""
    return backbone_digests(config, manifest.provenance.get("weights") if manifest else None)
