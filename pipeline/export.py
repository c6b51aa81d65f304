"""Exporting the adapted model: a folder that ``grappa.load_model`` opens, without run, hub or pickle."""

from __future__ import annotations

import shutil
from pathlib import Path

from pipeline.artifacts import RunFolder
from pipeline.published import published
from pipeline.storage import new_folder, refuse_existing

FILES = ("model.json", "weights.safetensors")


def export(run: Path, folder: Path) -> str:
    """Copy the model of a run into the new folder ``folder``, whole or not at all; the result in one sentence."""
    refuse_existing(folder)
    source = published(RunFolder.open(run), "model")
    with new_folder(folder) as draft:
        for name in FILES:
            shutil.copyfile(source / name, draft / name)
    return f"wrote {' and '.join(FILES)} to {folder}; open them with grappa.load_model({str(folder)!r})"
