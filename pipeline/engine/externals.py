"""Digests of the files that a run reads but does not hold: the backbone's weights and the object detector."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from grappa.pipeline.config.schema import Config
from grappa.pipeline.store.storage import file_digest

HUB_SECONDS = 3.0  # how long `grappa init` waits for the hub
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


def _files(model: str) -> list[str]:
    return sorted(path.name for path in Path(model).glob("*") if path.suffix in SUFFIXES and path.is_file())


def hub_problems(config: Config) -> dict[str, str]:
    """Return, for each stage that would load a model from the hub in vain, a sentence with the way out.

    A model that lies in the hub's cache is no problem. Behind a proxy the hub is not tried.
    """
    wanted = dict(_from_hub(config))
    problem = _hub_problem() if wanted else ""
    if not problem:
        return {}
    return {
        stage: f"{setting} names no file, so its weights come from the hub, but {problem}; {advice}"
        for stage, (setting, advice) in wanted.items()
    }


def _from_hub(config: Config) -> Iterator[tuple[str, tuple[str, str]]]:
    if config.backbone.weights is None and not _is_cached(f"timm--{config.backbone.name}*"):
        yield "backbone", ("backbone.weights", "give a file by --set backbone.weights=FILE")
    model = config.objects.model
    asked = config.objects.provider == "grounding_dino" and model is not None and is_hub_name(model)
    if asked and not _is_cached(str(model).replace("/", "--")):
        yield "objects", ("objects.model", "give a folder by --set objects.model=FOLDER")


def _is_cached(pattern: str) -> bool:
    from huggingface_hub import constants

    return any(Path(constants.HF_HUB_CACHE).glob(f"models--{pattern}/snapshots/*/*"))


def _hub_problem() -> str:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE forbids it"
    place = urlsplit(constants.ENDPOINT)
    if getproxies() or _answers(str(place.hostname), place.port or (80 if place.scheme == "http" else 443)):
        return ""
    return f"{place.hostname} cannot be reached from here"


def _answers(host: str, port: int) -> bool:
    """Tell whether a host takes a connection in time; a thread waits, because looking a name up has no limit."""
    found: list[bool] = []

    def connect() -> None:
        try:
            socket.create_connection((host, port), HUB_SECONDS).close()
        except OSError:
            return
        found.append(True)

    thread = Thread(target=connect, daemon=True)
    thread.start()
    thread.join(HUB_SECONDS)
    return bool(found)
