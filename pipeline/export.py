"""Exporting the adapted model: a folder that ``grappa.load_model`` opens, without run, hub or pickle."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from pipeline.artifacts import RunFolder
from pipeline.published import published
from pipeline.storage import storage_errors

FILES = ("model.json", "weights.safetensors")


def export(run: Path, folder: Path) -> str:
    """Copy the model of a run into the new folder ``folder``, whole or not at all; the result in one sentence."""
    if folder.exists():
        raise ValueError(f"{folder} exists already; give a new folder")
    source = published(RunFolder.open(run), "model")
    draft = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    with storage_errors(folder):
        draft.mkdir(parents=True)
        try:
            for name in FILES:
                shutil.copyfile(source / name, draft / name)
            os.rename(draft, folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    return f"wrote {' and '.join(FILES)} to {folder}; open them with grappa.load_model({str(folder)!r})"
