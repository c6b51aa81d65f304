"""Trainings whose proxies several processes hold together, for ``test_sharded_proxies.py``.

Run as a script, with FOLDER, each rank writes ``FOLDER/rankN.npz``: of each case the tensors of a training that was not
disturbed, of one that crashed and went on, and of one that went on from a single process's checkpoint.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from grappa.core.distributed import ALONE, Processes
from grappa.core.randomness import id_numbers
from grappa.images.transforms import Augmentation
from grappa.method.adaptor_training import AdaptorLoss, new_adaptor_set, train_adaptor_set
from grappa.pipeline.store.checkpoints import FileCheckpoint, SharedCheckpoint
from grappa.training.batches import Runtime, Views
from grappa.training.loop import Checkpointer, Optimization, schedule
from grappa.training.targets import Targets
from tests.helpers.tiny import tiny_backbone, tiny_cache

SIZE, NUM, BATCH = 3, 20, 10
CASES = {"seven classes": (7,), "fewer classes than processes": (2,), "two targets": (2, 7)}
TERMS = BATCH * 17  # what a weight's gradient sums: 10 images of 17 tokens
OPTIMIZATION = Optimization(num_epochs=2, batch_size=BATCH, learning_rate=3e-3, weight_decay=0.01, warmup=0.1)
PATH = OPTIMIZATION.learning_rate * sum(schedule(step, 4, OPTIMIZATION.warmup) for step in range(4))


class CrashedError(Exception):
    """Stands for a crash."""


class Crashing:
    """A checkpointer that crashes after its first save."""

    def __init__(self, inner: Checkpointer) -> None:
        self.load, self.due, self._inner = inner.load, inner.due, inner

    def save(self, tensors: Mapping[str, Any], record: Mapping[str, Any]) -> None:
        self._inner.save(tensors, record)
        raise CrashedError


def checkpoint(folder: Path, processes: Processes = ALONE, *, seconds: float = 0) -> Checkpointer:
    """Return the checkpoint in a folder, as the stage opens it."""
    folder.mkdir(exist_ok=True)
    file = FileCheckpoint(folder, seconds=seconds)
    return file if processes.world_size == 1 else SharedCheckpoint(file, processes)


def train(views: Views, case: str, kept: Checkpointer | None, processes: Processes = ALONE) -> dict[str, Any]:
    """Return the tensors and the losses of the training of a case."""
    rng = np.random.default_rng(0)
    targets = [Targets(np.arange(NUM) % k, rng.normal(size=(k, 32)).astype(np.float32)) for k in CASES[case]]
    adaptors, result = train_adaptor_set(
        tiny_backbone(),
        views,
        np.arange(NUM),
        targets,
        name="k00007",
        start=new_adaptor_set(tiny_backbone(), 4, name="k00007", seed=0),
        adaptor_loss=AdaptorLoss(temperature=0.1),
        proxy_learning_rate=3e-3,
        optimization=OPTIMIZATION,
        seed=0,
        run=Runtime(torch.device("cpu"), "float32", kept, processes=processes),
    )
    told = np.array([[record["loss"], record["accuracy"]] for record in result.metrics])
    return {"metrics": told, **{name: value.numpy() for name, value in adaptors.state_dict().items()}}


def crash(views: Views, case: str, folder: Path, processes: Processes = ALONE) -> None:
    """Train up to the first checkpoint."""
    try:
        train(views, case, Crashing(checkpoint(folder, processes)), processes)
    except CrashedError:
        return
    raise AssertionError("no checkpoint was saved")


def open_views(folder: Path) -> Views:
    ids = id_numbers([str(i) for i in range(NUM)])
    return Views(tiny_cache(folder, NUM), ids, 32, Augmentation(0.7, 0.5, 0.2, 0.2, 0.2, 0.1))


def main(folder: Path, processes: Processes) -> None:
    views, found = open_views(folder / f"pixels{processes.rank}"), {}
    for case in CASES:
        crash(views, case, folder / case, processes)
        trained = {
            "whole": train(views, case, None, processes),
            "resumed": train(views, case, checkpoint(folder / case, processes, seconds=1e9), processes),
            "one's": train(views, case, checkpoint(folder / f"{case} alone", processes, seconds=1e9), processes),
        }
        found.update({f"{case}/{how}/{name}": each for how, all_ in trained.items() for name, each in all_.items()})
    np.savez(folder / f"rank{processes.rank}.npz", **found)


if __name__ == "__main__":
    from grappa.pipeline.engine.team import joined

    torch.set_num_threads(1)
    with joined() as team:
        main(Path(sys.argv[1]), team.processes)
