"""A run that takes seconds, made by the command line, and the bytes of its results."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from tests.helpers.tiny import draw_images, settings, split_of, write_table, write_weights

OWN = ("log.jsonl",)  # times and speeds: they differ from run to run
LEFTOVERS = (".partial", ".old", ".lock", ".take", ".tmp")


def write_material(work: Path) -> tuple[Path, Path]:
    """Draw images and write weights in ``work``; return the image table and the weights' file."""
    images = draw_images(work / "images", num_images=3)
    table = write_table(images, work / "table.csv", label=lambda path: path.parent.name, split=split_of)
    return table, write_weights(work / "weights.safetensors")


def init_arguments(run: Path, table: Path, weights: Path, **changes: object) -> list[str]:
    """Return the arguments of `grappa` that make a run folder."""
    values = settings(weights, compute__checkpoint_seconds=0.001, compute__inference_batch_size=8, **changes)
    return ["init", str(run), "--images", str(table), *(word for value in values for word in ("--set", value))]


def contents(run: Path) -> dict[str, str]:
    """Return the sha256 of every file of a run; of a manifest only recipe and outputs count, of logs nothing."""
    found = {}
    for path in sorted(run.rglob("*")):
        if path.is_file() and path.name not in OWN:
            data = path.read_bytes()
            if path.name == "manifest.json":
                manifest = json.loads(data)
                data = json.dumps([manifest["recipe"], manifest["outputs"]], sort_keys=True).encode()
            found[path.relative_to(run).as_posix()] = hashlib.sha256(data).hexdigest()
    return found


def is_leftover(path: Path) -> bool:
    """Tell whether a file or folder is one that only unfinished work has."""
    return any(suffix in LEFTOVERS for part in path.parts for suffix in Path(part).suffixes)
