"""Additions on disk: images that came to a finished run, and the list of those taken out; its artifacts never change.

``RUN/additions/`` holds artifacts of the same form as the run's own, each with a manifest and a fingerprint:

- ``00001/``: the decoded images of one `grappa add`: images.parquet, labels.parquet, rejected.parquet, pixels/;
- ``00001-vectors/``: what the run's backbone, clusters and deployed model make of them: features.npy, embeddings.npy,
  assignments.parquet, drift.json. Its fingerprint names these inputs: where one was made again, it is stale;
- ``removed/``: removed.json, the ids of all images that were taken out;
- ``index/``: the run's search index with all this in it.

Nothing heavy is imported here, so that `grappa status` answers at once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grappa.pipeline.config.schema import Config, identity_settings
from grappa.pipeline.config.yaml_file import ConfigError, load_config
from grappa.pipeline.engine.externals import MissingInputError
from grappa.pipeline.engine.fingerprints import digest_of, read_manifest
from grappa.pipeline.engine.freshness import State, artifact_state
from grappa.pipeline.graph.node import Node
from grappa.pipeline.graph.stages import PIXELS, WEIGHTS, clustered_node, searched_node
from grappa.pipeline.store.artifacts import RUN_FILE, Artifact, Fingerprint, RunFolder, published, quoted

FOLDER = "additions"
REMOVED, INDEX, REMOVED_FILE = Node(FOLDER, "removed"), Node(FOLDER, "index"), "removed.json"
INDEX_FILES = ("index.faiss", "ids.parquet")
VERSION = 1


def pictures(number: int) -> Node:
    """Return the node of the decoded images of an addition."""
    return Node(FOLDER, f"{number:05d}")


def vectors(number: int) -> Node:
    """Return the node of an addition's features, embeddings and clusters."""
    return Node(FOLDER, f"{number:05d}-vectors")


def numbers(run: RunFolder) -> list[int]:
    """Return the numbers of the additions whose images are published, in their order."""
    folder = run.root / FOLDER
    names = (entry.name for entry in folder.iterdir()) if folder.is_dir() else ()
    return sorted(int(name) for name in names if re.fullmatch(r"\d{5}", name))


def pictures_fingerprint(number: int, config: Config, listing: str) -> dict[str, Any]:
    """Return the fingerprint of the decoded images; ``listing``: the digest of the list of files."""
    names = ("images.cache", "images.cache_size", "images.max_pixels", "images.shard_size")
    settings = identity_settings(config, names)
    return _fingerprint(pictures(number), settings, {"listing": {"sha256": listing}})


def vectors_fingerprint(run: RunFolder, config: Config, number: int) -> dict[str, Any]:
    """Return the fingerprint that an addition's vectors should have now; MissingInputError without an input."""
    inputs = {
        pictures(number).name: PIXELS,
        "backbone": WEIGHTS,
        "model": ("model.json", "weights.safetensors"),
        "images": ("images.parquet",),
        **_searched_files(config),
        "neighbors": ("similarities.npy",),
        **{f"clusters/{name}": ("centroids.npy",) for name in assigned_granularities(config)},
    }
    settings = {
        "images.cache_size": config.images.cache_size,
        "features.precision": config.features.precision,
        "embeddings.precision": config.embeddings.precision,
    }
    return _fingerprint(vectors(number), settings, {name: _digests(run, name, files) for name, files in inputs.items()})


def index_fingerprint(run: RunFolder, ready: Sequence[int]) -> dict[str, Any]:
    """Return the fingerprint that the index with the additions ``ready`` should have now."""
    inputs: dict[str, tuple[str, ...]] = {"index": INDEX_FILES}
    for number in ready:
        inputs[pictures(number).name] = ("images.parquet",)
        inputs[vectors(number).name] = ("embeddings.npy",)
    if run.artifact(REMOVED).home.exists():
        inputs[REMOVED.name] = (REMOVED_FILE,)
    return _fingerprint(INDEX, {}, {name: _digests(run, name, files) for name, files in inputs.items()})


def removed_fingerprint(ids: list[str]) -> dict[str, Any]:
    """Return the fingerprint of the list of removed images."""
    return _fingerprint(REMOVED, {}, {"asked": dict.fromkeys(ids, "")})


def assigned_granularities(config: Config) -> tuple[str, ...]:
    """Return the granularities at which added images get a cluster: none where clusters are those of object views."""
    return config.granularities if clustered_node(config) == searched_node(config) else ()


def _searched_files(config: Config) -> dict[str, tuple[str, ...]]:
    """Return the files that say where the run's images lie among each other: raw features, or whitened ones."""
    node = searched_node(config)
    return {node.name: ("features.npy",) if node.stage == "features" else ("features.npy", "head.safetensors")}


def _fingerprint(node: Node, settings: dict[str, Any], inputs: dict[str, dict[str, str]]) -> dict[str, Any]:
    names = {"stage": node.stage, "instance": node.instance, "version": VERSION}
    return {**names, "config": settings, "inputs": inputs}


def _digests(run: RunFolder, name: str, files: tuple[str, ...]) -> dict[str, str]:
    manifest = read_manifest(run, name)
    if manifest is None:
        raise MissingInputError(f"{name} is missing")
    digests = {file: digest_of(manifest.outputs, file) for file in files}
    lacking = [file for file, digest in digests.items() if digest is None]
    if lacking:
        raise MissingInputError(f"{name} has no {lacking[0]}")
    return {file: digest for file, digest in digests.items() if digest is not None}


# ---------------------------------------------------------------- what is there


@dataclass(frozen=True)
class Additions:
    """The additions of a run. ``ready``: the numbers of those that the deployed model has embedded; ``waiting``: the
    others, with the reason; ``removed``: the ids that were taken out; ``index``: the state of the index with those that
    are ready and without the removed ones."""

    ready: tuple[int, ...]
    waiting: dict[int, str]
    removed: frozenset[str]
    index: State

    @property
    def indexed(self) -> bool:
        """Whether images are found otherwise than by the run's own index: some are ready, or removed."""
        return bool(self.ready or self.removed)


def read_additions(run: RunFolder, config: Config, *, verify: bool = False) -> Additions:
    """Return what was added to a run and taken out of it, judged by manifests alone, with ``verify`` by every byte."""
    found = {number: state_of(run, config, number, verify=verify) for number in numbers(run)}
    waiting = {
        number: "; ".join(state.reasons) or state.kind for number, state in found.items() if state.kind != "fresh"
    }
    ready = tuple(number for number in found if number not in waiting)
    index = _state(run.artifact(INDEX), lambda: index_fingerprint(run, ready), verify)
    return Additions(ready, waiting, removed_ids(run), index)


def state_of(run: RunFolder, config: Config, number: int, *, verify: bool = False) -> State:
    """Return the state of an addition's vectors; ``verify`` reads every byte of them."""
    return _state(run.artifact(vectors(number)), lambda: vectors_fingerprint(run, config, number), verify)


def _state(artifact: Artifact, expected: Callable[[], Fingerprint], verify: bool) -> State:
    try:
        return artifact_state(artifact, expected(), verify=verify)
    except MissingInputError as error:
        return artifact_state(artifact, None, [str(error)], verify)


def removed_ids(run: RunFolder) -> frozenset[str]:
    """Return the ids of the images that were taken out of a run."""
    if not run.artifact(REMOVED).home.exists():
        return frozenset()
    content = json.loads((published(run, REMOVED, REMOVED_FILE) / REMOVED_FILE).read_bytes())
    return frozenset(content["image_ids"])


def num_images(run: RunFolder, number: int) -> int:
    """Return how many images an addition has, by its manifest."""
    manifest = read_manifest(run, pictures(number))
    return int(manifest.provenance.get("num_images", 0)) if manifest else 0


def roots_of_addition(run: RunFolder, number: int) -> list[str]:
    """Return the folders that the column ``root`` of an addition's table numbers."""
    manifest = read_manifest(run, pictures(number))
    return list(manifest.provenance["roots"]) if manifest else []


def addition_lines(run: RunFolder) -> list[str]:
    """Return the lines of `grappa status` about additions; none where nothing was added or removed."""
    if not (run.root / FOLDER).is_dir():
        return []
    found = read_additions(run, load_config(run.config_path))
    if not (found.indexed or found.waiting):
        return []
    counts = {number: num_images(run, number) for number in numbers(run)}
    line = f"additions: {sum(counts.values())} images added, {len(found.removed)} removed"
    notice = waiting_notice(run, found)
    return [f"{line}; {notice}" if notice else line]


def additions_notice(root: Path) -> str:
    """Return a sentence where a command that reads the collection as it is now misses additions; else "".

    It is empty too for a folder that is no run, and where the configuration cannot be read.
    """
    if not (root / RUN_FILE).exists() or not (root / FOLDER).is_dir():
        return ""
    run = RunFolder.open(root)
    try:
        return waiting_notice(run, read_additions(run, load_config(run.config_path)))
    except (ConfigError, OSError):
        return ""


def waiting_notice(run: RunFolder, found: Additions) -> str:
    """Return a sentence where added or removed images are not in what is searched, with the command; else ""."""
    cure = f"`grappa add {quoted(run.root)}` brings this up to date"
    if found.waiting:
        number = sum(num_images(run, each) for each in found.waiting)
        reason = next(iter(found.waiting.values()))
        return f"{number} added images are not searched ({reason}): {cure}"
    if found.indexed and found.index.kind != "fresh":
        return f"the index with additions is {found.index}: {cure}"
    return ""
