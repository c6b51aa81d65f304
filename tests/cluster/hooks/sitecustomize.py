"""Loaded by every Python that has this folder in its path (jobs of the tests): a gate in the middle of their work.

At its fifth step (of this process) a training, and after its second batch a range of rows, waits until the file
``open`` is in the folder GRAPPA_TEST_GATE, or until it is asked to stop. A file ``fail-NAME`` there makes the work at
artifact NAME (``adaptors-k00004``) fail instead.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from grappa.pipeline.store import checkpoints

GATE_STEP, GATE_BATCH = 5, 2
_steps = 0


def _due(checkpoint: checkpoints.FileCheckpoint) -> bool:
    _step(checkpoint.path.parent, GATE_STEP)
    return real_due(checkpoint)


def _offer(checkpoint: checkpoints.RowCheckpoint, num_rows: int, out: Any) -> None:
    if checkpoint.path.parent.parent.name.endswith(".ranges"):
        _step(checkpoint.path.parent, GATE_BATCH)
    real_offer(checkpoint, num_rows, out)


def _step(partial: Path, gate_step: int) -> None:
    global _steps
    _steps += 1
    name = f"{partial.parent.name}-{partial.name.partition('.partial')[0]}"
    if _steps == gate_step:
        _wait(Path(os.environ["GRAPPA_TEST_GATE"]), name)


def _wait(gate: Path, name: str) -> None:
    (gate / f"reached-{name}-{os.environ.get('SLURM_RESTART_COUNT', 0)}").touch()
    while not ((gate / "open").exists() or checkpoints._stop.is_set()):
        if (gate / f"fail-{name}").exists():
            raise ValueError(f"the test lets {name} fail")
        time.sleep(0.05)


if "GRAPPA_TEST_GATE" in os.environ:
    real_due = checkpoints.FileCheckpoint.due
    checkpoints.FileCheckpoint.due = _due
    real_offer = checkpoints.RowCheckpoint.offer
    checkpoints.RowCheckpoint.offer = _offer
