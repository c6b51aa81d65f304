"""A tiny finished run whose domains, labels and cluster names are hostile, shared by the tests of the explorer."""

from __future__ import annotations

import shutil
from pathlib import Path

from grappa.pipeline.store.artifacts import RunFolder
from tests.helpers.tiny import draw_images, make_run, run_all, split_of, write_table, write_weights

EVIL = "<img src=x onerror=alert(1)>"


def make_explored(folder: Path) -> RunFolder:
    """Make a run of 36 images with labels, two of them of the same bytes."""
    images = draw_images(folder / "images", num_images=3)
    shutil.copy(images / "discs" / "class_2" / "0.png", images / "discs" / "class_2" / "twin.png")
    table = write_table(images, folder / "table.csv", label=lambda path: f"{path.parent.name} {EVIL}", split=split_of)
    run = make_run(folder / "run", [table], write_weights(folder / "weights.safetensors"), student__num_epochs=1)
    run_all(run)
    return run
