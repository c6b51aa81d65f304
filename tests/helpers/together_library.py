"""What the processes of ``test_processes.py`` compute.

Run as a script, with FOLDER RUN STAGE: each rank's results go into the folder, then the run is made up to the stage.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from grappa.core.distributed import ALONE, Processes, Sharded
from grappa.core.randomness import id_numbers
from grappa.images.transforms import Augmentation
from grappa.method import losses
from grappa.method.adaptor_training import AdaptorLoss, new_adaptor_set, train_adaptor_set
from grappa.method.fusion_training import PropagationLoss, train_fusion
from grappa.method.student import Transfer, new_student, train_student
from grappa.search import shared_points
from grappa.training.batches import Runtime, Views
from grappa.training.loop import Optimization, schedule
from grappa.training.targets import Targets
from tests.helpers.tiny import tiny_backbone, tiny_cache, tiny_set

NUM = 40
ROWS = np.arange(4, NUM)
PART_ROWS = 16  # of k-means: its images are shared by four processes, too
TERMS = 2 * 10 * 17  # what a weight's gradient sums: two views of 10 images of 17 tokens
OPTIMIZATION = Optimization(num_epochs=2, batch_size=10, learning_rate=3e-3, weight_decay=0.01, warmup=0.1)
PATH = OPTIMIZATION.learning_rate * sum(schedule(step, 6, OPTIMIZATION.warmup) for step in range(6))
LOSSES = {
    "mutual_information": PropagationLoss("mutual_information"),
    "swapped": PropagationLoss("swapped"),
    "barlow": PropagationLoss("none", barlow_weight=1.0),
}


class FirstMoments:
    """A checkpointer that keeps Adam's first moments after the first step, in memory."""

    def __init__(self) -> None:
        self.moments = np.empty(0, dtype=np.float32)

    def load(self) -> None:
        return None

    def due(self) -> bool:
        return not self.moments.size

    def save(self, tensors: Mapping[str, torch.Tensor | Sharded], record: Mapping[str, Any]) -> None:
        moments = [_whole(value).numpy().ravel() for name, value in tensors.items() if name.endswith(".exp_avg")]
        self.moments = np.concatenate(moments)


def _whole(value: torch.Tensor | Sharded) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else value.processes.all_gather(value.own, value.number)


def results(folder: Path, processes: Processes = ALONE) -> dict[str, np.ndarray[Any, Any]]:
    """Return the trained tensors and the losses of two adaptor sets, of a fusion by each loss and of a student.

    ``NAME/first`` are the first step's gradients, all in one array, times 0.1: Adam's first moments.
    """
    cache = tiny_cache(folder / f"pixels{processes.rank}", NUM)
    views = Views(cache, id_numbers([str(i) for i in range(NUM)]), 32, Augmentation(0.7, 0.5, 0.2, 0.2, 0.2, 0.1))
    run = Runtime(torch.device("cpu"), "float32", processes=processes)
    found = {"gradient": _gradient(processes)}
    trainings: dict[str, Callable[[Runtime], Any]] = {
        "set": lambda run: _set(views, run, 1),
        "heads": lambda run: _set(views, run, 2),
        "student": lambda run: _student(views, run),
    }
    for name, propagation in LOSSES.items():
        trainings[name] = partial(_fusion, views, propagation)
    for name, train in trainings.items():
        first = FirstMoments()
        _keep(found, name, *train(replace(run, checkpoint=first)))
        found[f"{name}/first"] = first.moments
    return found


def _gradient(processes: Processes) -> np.ndarray[Any, Any]:
    """Return the gradient of a loss that looks across the batch: a wrong scale, to which Adam is blind, shows here."""
    generator = torch.Generator().manual_seed(0)
    images, weight = torch.randn(2, 10, 6, generator=generator), torch.randn(6, 4, generator=generator)
    weight.requires_grad_()
    halves = (processes.all_gather(half[processes.own_slice(10)] @ weight, 10) for half in images)
    (losses.barlow_twins(*halves, off_diagonal=0.1) / processes.world_size).backward()
    assert weight.grad is not None
    processes.all_reduce([weight.grad])
    return weight.grad.numpy()


def _set(views: Views, run: Runtime, num_targets: int) -> Any:
    rng = np.random.default_rng(0)
    targets = [Targets(ROWS % (4 + i), rng.normal(size=(4 + i, 32)).astype(np.float32)) for i in range(num_targets)]
    return train_adaptor_set(
        tiny_backbone(),
        views,
        ROWS,
        targets,
        name="k00004",
        start=new_adaptor_set(tiny_backbone(), 4, name="k00004", seed=0),
        adaptor_loss=AdaptorLoss(temperature=0.1),
        proxy_learning_rate=3e-3,
        optimization=OPTIMIZATION,
        seed=0,
        run=run,
    )


def _fusion(views: Views, propagation: PropagationLoss, run: Runtime) -> Any:
    return train_fusion(
        tiny_backbone(),
        [tiny_set(i) for i in range(3)],
        views,
        ROWS,
        np.stack([(ROWS + 4) % NUM, (ROWS + 8) % NUM], axis=1),
        level="token",
        attention_temperature=1.0,
        propagation=propagation,
        initial_std=0.1,
        optimization=OPTIMIZATION,
        seed=0,
        run=run,
    )


def _student(views: Views, run: Runtime) -> Any:
    backbone = tiny_backbone()
    return train_student(
        backbone,
        tiny_set(1),
        views,
        ROWS,
        start=new_student(backbone, 4, seed=0),
        transfer=Transfer(bank_size=8),
        optimization=OPTIMIZATION,
        seed=0,
        run=run,
    )


def _keep(found: dict[str, np.ndarray[Any, Any]], name: str, module: torch.nn.Module, result: Any) -> None:
    found.update({f"{name}/{key}": value.numpy() for key, value in module.state_dict().items()})
    scalars = [key for key in result.metrics[0] if key not in ("step", "epoch", "learning_rate")]
    found[f"{name}/metrics"] = np.array([[record[key] for key in scalars] for record in result.metrics])


if __name__ == "__main__":
    from grappa.pipeline.engine.team import joined
    from grappa.pipeline.store.artifacts import RunFolder
    from tests.helpers.tiny import run_all

    torch.set_num_threads(1)
    shared_points.PART_ROWS = PART_ROWS
    with joined() as team:
        np.savez(f"{sys.argv[1]}/rank{team.rank}.npz", **results(Path(sys.argv[1]), team.processes))
    print(*run_all(RunFolder.open(Path(sys.argv[2])), until=sys.argv[3]), sep="\n")
