"""Where weights are: a file, a folder as the hub's clients leave it, ``local-dir:FOLDER`` or ``hf-hub:OWNER/NAME``.

No torch is imported here, so that a command line may ask.
"""

from __future__ import annotations

import os
from pathlib import Path

from grappa.backbone.files.hub import (
    SUFFIXES,
    chosen_file,
    fetched,
    file_names,
    is_hub_name,
    not_one,
    shard_names,
    weight_names,
)
from grappa.backbone.unusable import BackboneError
from grappa.core.home import expanded

LOCAL = "local-dir:"


def absolute(weights: str) -> str:
    """Return ``backbone.weights`` with an absolute path: ``~`` and ``local-dir:`` are taken off; a hub's name stays."""
    return weights if is_hub_name(weights) else os.path.abspath(expanded(weights.removeprefix(LOCAL)))


def files_of(weights: str | Path) -> list[Path]:
    """Return the files that hold the weights, in the order of their names; several where a model lies in shards.

    Args:
        weights: a file, a folder with config.json and model.safetensors (or another weight file), ``local-dir:`` and a
            folder, or ``hf-hub:`` and a name, which is downloaded where the hub's cache does not hold it.

    Raises:
        BackboneError: no such file, no one weight file in a folder, a hub that cannot be reached.
    """
    text = str(weights)
    path = fetched(text) if is_hub_name(text) else Path(absolute(text))
    if path.is_dir():
        return _files_in(path)
    if not path.is_file():
        raise BackboneError(f"backbone.weights names {path}, which is no file; {hint(text)}")
    return _shards(path) if path.name.endswith(".index.json") else [path]


def hint(weights: str) -> str:
    """Return what to give instead of ``weights``, which is no file: the hub's name, if it looks like one."""
    parts = weights.split("/")
    if len(parts) == 2 and all(parts) and not weights.startswith((".", "~")) and not weights.endswith(SUFFIXES):
        return f"give an existing file, or hf-hub:{weights} for a model of the hub"
    return "give an existing file or folder"


def _files_in(folder: Path) -> list[Path]:
    snapshots = sorted(folder.glob("snapshots/*/"))
    if len(snapshots) == 1:  # a model's folder of the hub's cache
        return _files_in(snapshots[0])
    names = file_names(folder)
    name = chosen_file(names)
    if name:
        return _shards(folder / name) if name.endswith(".index.json") else [folder / name]
    found = not_one(names) if not snapshots else f"several snapshots ({snapshots[0]}, ...), expected one"
    inside = weight_names(path.name for path in folder.iterdir() if path.is_dir())
    beside = f", beside folders that are called so ({'/, '.join(inside[:3])}/)" if inside else ""
    raise BackboneError(f"{folder} holds {found}{beside}; name the file or its folder by --set backbone.weights=FILE")


def _shards(index: Path) -> list[Path]:
    files = [index.parent / name for name in shard_names(index)]
    for file in files:
        if not file.is_file():
            raise BackboneError(f"{index} lists {file.name}, which is not there; download the folder again")
    return files
