"""Loaded by every Python that has this folder in its path (jobs of the tests): a gate in the middle of a training.

At its fifth step (of this process) a training waits until the file ``open`` is in the folder GRAPPA_TEST_GATE, or until
it is asked to stop. A file ``fail-NAME`` there makes the training of artifact NAME (``adaptors-k00004``) fail instead.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from grappa.pipeline.store import checkpoints

GATE_STEP = 5
_steps = 0


def _due(checkpoint: checkpoints.FileCheckpoint) -> bool:
    global _steps
    _steps += 1
    partial = checkpoint.path.parent
    name = f"{partial.parent.name}-{partial.name.partition('.partial')[0]}"
    if _steps == GATE_STEP:
        _wait(Path(os.environ["GRAPPA_TEST_GATE"]), name)
    return real_due(checkpoint)


def _wait(gate: Path, name: str) -> None:
    (gate / f"reached-{name}-{os.environ.get('SLURM_RESTART_COUNT', 0)}").touch()
    while not ((gate / "open").exists() or checkpoints._stop.is_set()):
        if (gate / f"fail-{name}").exists():
            raise ValueError(f"the test lets {name} fail")
        time.sleep(0.05)


if "GRAPPA_TEST_GATE" in os.environ:
    real_due = checkpoints.FileCheckpoint.due
    checkpoints.FileCheckpoint.due = _due
