"""Digests of the files that a run reads but does not hold: the backbone's weights, the object detector, and another
run's embeddings."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from grappa.backbone.files.hub import HUB, file_names, hub_problem, is_cached, out_of_reach, weight_names
from grappa.backbone.files.hub import is_hub_name as is_hub_weights
from grappa.backbone.files.places import files_of
from grappa.backbone.unusable import BackboneError
from grappa.pipeline.config.schema import Config
from grappa.pipeline.config.yaml_file import load_config
from grappa.pipeline.graph.models import model_before_head
from grappa.pipeline.graph.node import Node
from grappa.pipeline.store.artifacts import RUN_FILE, Manifest, RunFolder, quoted
from grappa.pipeline.store.storage import file_digest

GIVEN_FILE = "embeddings.npy"
SUFFIXES = (".json", ".safetensors", ".txt")  # of the files that are read from a detector's folder


class MissingInputError(ValueError):
    """An input has no usable manifest or file, so the fingerprint cannot be computed; the message is a reason line."""


def weights_digest(path: Path, known: Any = None) -> dict[str, Any]:
    """Return path, bytes, mtime_ns and sha256 of a file; the file is hashed only if it differs from ``known``.

    ``known`` is the result of an earlier call, or None. A known file that no longer exists counts as unchanged: the run
    has a copy of its content.
    """
    text = os.fsencode(path).decode(errors="backslashreplace")
    known = known if isinstance(known, dict) and known.get("path") == text else None
    if not os.path.isfile(path):  # also where the file lies in another user's folder that may not be read
        if known:
            return known
        raise MissingInputError(
            f"backbone.weights: no such file {path}; set it by `--set backbone.weights=FILE` of `grappa init`"
        )
    found = {"path": text, "bytes": path.stat().st_size, "mtime_ns": path.stat().st_mtime_ns}
    if known and found.items() <= known.items():
        return known
    return found | {"sha256": file_digest(path)[1]}


def backbone_digests(config: Config, known: Any) -> tuple[dict[str, str], dict[str, Any]]:
    """Return the digests of the backbone's weights for the fingerprint, and their provenance.

    One file gives its digest, also one in a folder; shards give one digest each, by their names; weights of the hub
    give the hub's name. ``known`` is the provenance of an earlier call, or None.
    """
    weights = config.backbone.weights
    if config.backbone.module is not None:
        return _of_own_module(config.backbone.module, weights, known)
    if weights is None or is_hub_weights(weights):
        return {"hub": config.backbone.name if weights is None else weights.removeprefix(HUB)}, {}
    known = known if isinstance(known, dict) else {}
    files = _weight_files(weights, known)
    if len(files) == 1:
        found = weights_digest(files[0], known)
        return {"sha256": found["sha256"]}, {"weights": found}
    shards = {file.name: weights_digest(file, known.get(file.name)) for file in files}
    return {name: each["sha256"] for name, each in shards.items()}, {"weights": shards}


def _of_own_module(place: str, weights: str | None, known: Any) -> tuple[dict[str, str], dict[str, Any]]:
    """Return the digests of a module of a user's own: where its function is, and its weights' file if there is one."""
    if weights is None:
        return {"module": place}, {}
    found = weights_digest(Path(weights), known)
    return {"module": place, "sha256": found["sha256"]}, {"weights": found}


def _weight_files(weights: str, known: Mapping[str, Any]) -> list[Path]:
    """Return the files of a path; of a folder that has lost some those that were known: the run has their content."""
    before = [Path(each["path"]) for each in ([known] if "path" in known else known.values())]
    folder = Path(os.path.dirname(weights) if weights.endswith(".index.json") else weights)
    was_there = {file.parent for file in before} == {folder}
    if os.path.isdir(weights) or (weights.endswith(".index.json") and os.path.isfile(weights)):
        try:
            return files_of(weights)
        except BackboneError as error:
            if was_there and {*weight_names(file_names(folder))} <= {file.name for file in before}:
                return before
            raise MissingInputError(f"backbone.weights: {error}") from error
    return before if was_there and not os.path.isfile(weights) else [Path(weights)]


def lost_weights(config: Config, *, made: bool) -> str:
    """Return a sentence where ``backbone.weights`` leads to no weights on this machine, "" where it does.

    Of what lies in no cache of the hub, `hub_problems` tells. made: the run has a copy, the artifact ``backbone``.
    """
    weights = config.backbone.weights
    if weights is None or (is_hub_weights(weights) and (made or not is_cached(weights.removeprefix(HUB)))):
        return ""
    if is_hub_weights(weights):
        return out_of_reach(weights)
    try:
        files_of(weights)
    except (BackboneError, OSError) as error:  # also what lies in another user's folder that may not be read
        copied = "; the run has a copy, so it is needed only where the backbone is made in another way"
        return f"{str(error).partition(';')[0]}{copied}" if made else str(error)
    return ""


def is_hub_name(model: str) -> bool:
    """Tell whether ``objects.model`` names no folder but a model on the hub, such as ``owner/name``."""
    return not os.path.isdir(model) and not os.path.isabs(model) and model.count("/") <= 1 and model[:1] not in ".~"


def detector_digests(config: Config, known: Mapping[str, Any] | None) -> tuple[dict[str, str], dict[str, Any]]:
    """Return the detector's digests for the fingerprint, and its provenance; both are empty where none is used.

    ``known`` is the provenance of an earlier call, or None. A known folder that no longer exists counts as unchanged.
    """
    model = config.objects.model
    if config.objects.provider != "grounding_dino" or model is None:
        return {}, {}
    if is_hub_name(model):
        return {"hub": model}, {}
    known = known or {}
    names = _files(model) or sorted(name for name, file in known.items() if os.path.dirname(file["path"]) == model)
    if not names:
        raise MissingInputError(
            f"objects.model: {model} is no folder with a model; give one that holds config.json and model.safetensors"
        )
    found = {name: weights_digest(Path(model) / name, known.get(name)) for name in names}
    return {name: each["sha256"] for name, each in found.items()}, found


def given_embeddings(config: Config) -> tuple[RunFolder, Node]:
    """Return the run and the node of the embeddings that ``clusters.embeddings`` names; ValueError where no run is."""
    place = Path(str(config.clusters.embeddings))
    named = place.parent.name == "embeddings" and (place.parents[1] / RUN_FILE).is_file()
    root = place.parents[1] if named else place
    if not (root / RUN_FILE).is_file():
        raise MissingInputError(f"clusters.embeddings: {root} is no run folder; give that of a finished run")
    run = RunFolder.open(root)
    return run, Node("embeddings", place.name if named else model_before_head(load_config(run.config_path)))


def given_digests(config: Config, run: RunFolder | None, known: Any) -> tuple[dict[str, str], dict[str, Any]]:
    """Return the digest of the embeddings of ``clusters.embeddings`` for the fingerprint, and their provenance.

    Only the manifest of the other run is read. ``known`` is the provenance of an earlier call, or None. Known
    embeddings that are no longer there count as unchanged: ``run`` has a copy of them.
    """
    place = config.clusters.embeddings
    if place is None:
        return {}, {}
    known = known if isinstance(known, dict) and known.get("path") == place else None
    try:
        found = {"path": place, "sha256": _given_digest(config, run)}
    except (OSError, ValueError) as error:
        if known is None:
            text = str(error)
            raise MissingInputError(text if text.startswith("clusters.") else f"clusters.embeddings: {text}") from error
        found = known
    return {"sha256": found["sha256"]}, {"embeddings": found}


def _given_digest(config: Config, run: RunFolder | None) -> str:
    other, node = given_embeddings(config)
    if run is not None and os.path.realpath(other.root) == os.path.realpath(run.root):
        raise MissingInputError(f"clusters.embeddings: {other.root} is this run itself; name the run of a first round")
    manifest: Manifest | None = other.artifact(node).manifest()
    if manifest is None or GIVEN_FILE not in manifest.outputs:
        command = f"grappa run {quoted(other.root)}"
        raise MissingInputError(f"clusters.embeddings: {node} is missing in {other.root}; run `{command}`")
    return str(manifest.outputs[GIVEN_FILE]["sha256"])


def _files(model: str) -> list[str]:
    return sorted(path.name for path in Path(model).glob("*") if path.suffix in SUFFIXES and path.is_file())


def hub_problems(config: Config) -> dict[str, str]:
    """Return, for each stage that would load a model from the hub in vain, a sentence with the way out.

    A model that lies in the hub's cache is no problem. Behind a proxy the hub is not tried.
    """
    wanted = dict(_from_hub(config))
    problem = hub_problem() if wanted else ""
    if not problem:
        return {}
    return {
        stage: f"{setting} names no file, so its weights come from the hub, but {problem}; {advice}"
        for stage, (setting, advice) in wanted.items()
    }


def _from_hub(config: Config) -> Iterator[tuple[str, tuple[str, str]]]:
    from grappa.backbone.naming.catalog import find_weights

    weights = config.backbone.weights
    own = config.backbone.module is not None
    if weights is None and not own and find_weights(config.backbone.name) is None:
        yield "backbone", ("backbone.weights", "give a file by --set backbone.weights=FILE")
    if weights is not None and is_hub_weights(weights) and not is_cached(weights.removeprefix(HUB)):
        yield "backbone", (f"backbone.weights is {weights} and", "give a file by --set backbone.weights=FILE")
    model = config.objects.model
    asked = config.objects.provider == "grounding_dino" and model is not None and is_hub_name(model)
    if asked and not is_cached(str(model)):
        yield "objects", ("objects.model", "give a folder by --set objects.model=FOLDER")
