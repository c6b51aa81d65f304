"""The hub of pretrained weights (huggingface_hub): what its cache holds, whether it answers, how files are fetched.

No torch is imported here, so that a command line may ask. Nothing is tried for longer than ``HUB_SECONDS`` before the
first byte: the client itself would repeat its attempts for a minute.
"""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Iterable, Sequence
from pathlib import Path
from threading import Thread
from urllib.parse import urlsplit

from grappa.backbone.unusable import BackboneError

HUB = "hf-hub:"
HUB_SECONDS = 3.0  # how long the hub may take to answer
SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".tar")
_PREFERRED = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
)
_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?")
_SHARD = re.compile(r"-\d+-of-\d+\.\w+$")
_ADVICE = "give a local file with --set backbone.weights=FILE"


def is_hub_name(weights: str) -> bool:
    """Tell whether ``backbone.weights`` names a model of the hub: ``hf-hub:owner/name``, with ``@revision`` or not."""
    return weights.startswith(HUB)


def chosen_file(names: Sequence[str]) -> str:
    """Return the file (or the index of several) that holds the weights of a model's folder; "" where none is known.

    Preferred are safetensors to torch files, and the usual names to any other name, which must be the only one of its
    kind.
    """
    for name in _PREFERRED:
        if name in names:
            return name
    found = weight_names(names)
    kinds = ([name for name in found if name.endswith(suffix)] for suffix in SUFFIXES)
    first = next(filter(None, kinds), [])
    return first[0] if len(first) == 1 else ""


def weight_names(names: Iterable[str]) -> list[str]:
    """Return the names of weight files among the names of a model's folder, those of the preferred kind first."""
    plain = sorted(name for name in names if "/" not in name)
    return [name for suffix in SUFFIXES for name in plain if name.endswith(suffix)]


def not_one(names: Iterable[str]) -> str:
    """Return what a model's folder holds in which no weight file can be chosen, and what was expected, in words."""
    found = weight_names(names)
    shown = f"{', '.join(found[:3])}{', ...' if len(found) > 3 else ''}"
    if found and all(_SHARD.search(name) for name in found):
        return f"parts of a model ({shown}) without {_PREFERRED[0]}, which has to list them (download it too)"
    if found:
        return f"several weight files ({shown}), expected one, or one that is called {_PREFERRED[1]}"
    return f"no weight file, expected {_PREFERRED[1]}, or one that ends in {', '.join(SUFFIXES)}"


def file_names(folder: Path) -> list[str]:
    """Return the names of the files in a folder, in order; a folder is none, whatever its name."""
    return sorted(path.name for path in folder.iterdir() if path.is_file())


def shard_names(index: Path) -> list[str]:
    """Return the names of the files that an index (``weight_map``) lists; BackboneError where it is none."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise BackboneError(f"{index} is no index of weight files ({error}); download the folder again") from error
    if not all(isinstance(name, str) and name == os.path.basename(name) for name in names):
        raise BackboneError(f"{index} lists files outside of its folder; download the folder again")
    return names


def fetched(weights: str) -> Path:
    """Return the folder that holds the weights of ``hf-hub:owner/name``, from the hub's cache or the hub.

    Raises:
        BackboneError: no such name, no such model, or the hub cannot be reached; within ``HUB_SECONDS``.
    """
    repo, revision = _repository(weights)
    cached, lack = _in_cache(repo, revision)
    if cached is not None and not lack:
        return cached
    reason = _why_not(repo, cached, lack)
    if reason:
        raise BackboneError(reason)
    return _downloaded(repo, revision)


def out_of_reach(weights: str) -> str:
    """Return why ``hf-hub:owner/name`` can be had neither from the hub's cache nor from the hub, "" where it may be.

    Raises:
        BackboneError: no such name.
    """
    repo, revision = _repository(weights)
    cached, lack = _in_cache(repo, revision)
    return "" if cached is not None and not lack else _why_not(repo, cached, lack)


def _why_not(repo: str, cached: Path | None, lack: str) -> str:
    """Return why what the hub's cache does not hold cannot be had from the hub either, "" where it may be."""
    problem = hub_problem()
    found = f" (its cache, {cached}, holds {lack})" if lack else ""
    return f"the weights of {repo} would come from the hub, but {problem}{found}; {_ADVICE}" if problem else ""


def _repository(weights: str) -> tuple[str, str]:
    """Return owner/name and revision, "" where none is given."""
    name = weights.removeprefix(HUB)
    if not _NAME.fullmatch(name):
        raise BackboneError(f"backbone.weights is {weights!r}; expected hf-hub:OWNER/NAME, with @REVISION or without")
    repo, _, revision = name.partition("@")
    return repo, revision


def _in_cache(repo: str, revision: str) -> tuple[Path | None, str]:
    """Return the folder of a model in the hub's cache, None where there is none, and why it does not do, or ""."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(repo, revision=revision or None, local_files_only=True))
    except (OSError, ValueError):  # the client's kinds of "not there"
        return None, ""
    return folder, _lack(folder)


def _lack(folder: Path) -> str:
    """Return why a folder of the hub's cache does not do, "" where it holds the weights."""
    names = file_names(folder)
    file = chosen_file(names)
    if not file:
        return not_one(names)
    lost = sorted({*shard_names(folder / file)} - {*names}) if file.endswith(".json") else []
    return f"{file} and not {lost[0]}, which it lists" if lost else ""


def _downloaded(repo: str, revision: str) -> Path:
    from huggingface_hub import HfApi, hf_hub_download

    try:
        names = HfApi().list_repo_files(repo, revision=revision or None)
        file = chosen_file(names)
        if not file:
            raise BackboneError(f"{repo} on the hub holds {not_one(names)}; {_ADVICE}")
        path = Path(hf_hub_download(repo, file, revision=revision or None))
        for name in shard_names(path) if file.endswith(".json") else ():
            hf_hub_download(repo, name, revision=revision or None)
    except BackboneError:
        raise
    except Exception as error:  # the client raises many kinds; all mean the same to a user
        raise BackboneError(
            f"the weights of {repo} could not be had from the hub ({type(error).__name__}); {_ADVICE}"
        ) from error
    return path.parent


def is_cached(repo: str) -> bool:
    """Tell whether the hub's cache holds a file of ``owner/name``; the name may hold ``*``."""
    from huggingface_hub import constants

    pattern = repo.partition("@")[0].replace("/", "--")
    return any(Path(constants.HF_HUB_CACHE).glob(f"models--{pattern}/snapshots/*/*"))


def hub_problem() -> str:
    """Return why nothing can be had from the hub; "" where it answers. Behind a proxy it is not tried."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE forbids it"
    return unreachable(constants.ENDPOINT)


def unreachable(address: str) -> str:
    """Return a sentence where the host of ``address`` takes no connection in time, "" where it does."""
    from urllib.request import getproxies  # it loads an HTTP client and TLS, which `grappa status` needs not

    place = urlsplit(address)
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
