"""The training loop: AdamW under a warmed-up cosine schedule, with checkpoints and metrics."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from grappa.core.arrays import below
from grappa.core.distributed import ALONE, Processes, Sharded
from grappa.images.transforms import prefetch

Made = TypeVar("Made")
NUM_RECORDS = 100
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, of the shape of their parameter
Recorded = Callable[[dict[str, float]], None]


@dataclass(frozen=True)
class Optimization:
    """How long and how fast to train; warmup: the share (0-1) of steps in which the rate rises linearly from 0."""

    num_epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    warmup: float


@dataclass(frozen=True)
class Group:
    """Parameters that share a peak learning rate and a weight decay.

    num_rows: None where every process holds the whole parameters, and the gradients are summed over the processes. Else
    each process holds, and has the whole gradients of, its ``own_slice`` of so many rows.
    """

    parameters: list[nn.Parameter]
    learning_rate: float
    weight_decay: float
    num_rows: int | None = None


@dataclass(frozen=True)
class FitResult:
    """The metrics along the steps: dicts with step, epoch, learning_rate and the means since the last record (loss,
    ...).
    """

    metrics: list[dict[str, float]]


class Checkpointer(Protocol):
    """Where a training saves its state; ``save`` is called when ``due`` returns True.

    Several processes make all calls together; ``load`` and ``due`` return the same in all of them.
    """

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None: ...

    def due(self) -> bool: ...

    def save(self, tensors: Mapping[str, Tensor | Sharded], record: Mapping[str, Any]) -> None: ...


@dataclass
class _State:
    step: int = 0
    metrics: list[dict[str, float]] = field(default_factory=list)
    totals: dict[str, Tensor] = field(default_factory=dict)
    since: int = 0


def fit(
    module: nn.Module,
    groups: list[Group],
    optimization: Optimization,
    steps_per_epoch: int,
    batch: Callable[[int], Made],
    loss: Callable[[Made], tuple[Tensor, dict[str, Tensor]]],
    checkpoint: Checkpointer | None = None,
    progress: Callable[[int], None] | None = None,
    processes: Processes = ALONE,
    recorded: Recorded | None = None,
) -> FitResult:
    """Train ``module`` in place; several processes begin and end with equal parameters, but for those held in parts.

    Args:
        module: holds every trained tensor; its names are those of the checkpoint.
        batch: from a step to its batch, which a thread makes ahead; a pure function of the step.
        progress: called with the number of steps newly done; steps that a checkpoint brought are not counted.
        recorded: called with each record of the metrics as soon as it is known, not with what a checkpoint brought.
        loss: from a batch to its loss and to further scalars to record, all on the device. Of several processes each
            makes its slice of the batch and returns its share of every scalar: the shares add up to the batch's scalar.

    Raises:
        FloatingPointError: the loss is no longer finite.
    """
    num_steps = optimization.num_epochs * steps_per_epoch
    optimizer = torch.optim.AdamW(
        [{"params": g.parameters, "lr": g.learning_rate, "weight_decay": g.weight_decay} for g in groups]
    )
    sharded = _sharded(module, groups)
    state = _resume(module, optimizer, checkpoint, num_steps, processes, sharded)
    start, every = state.step, max(1, num_steps // NUM_RECORDS)
    for made in prefetch(lambda number: batch(start + number), num_steps - start):
        _set_rates(optimizer, groups, schedule(state.step, num_steps, optimization.warmup))
        _step(optimizer, groups, state, *loss(made), processes)
        if state.since == every or state.step == num_steps:
            _record(state, steps_per_epoch, optimizer.param_groups[0]["lr"])
            if recorded:
                recorded(dict(state.metrics[-1]))
        if progress:
            progress(1)
        if checkpoint and state.step < num_steps and checkpoint.due():
            tensors, record = _snapshot(module, optimizer, state, num_steps)
            parts = {name: Sharded(tensors[name], number, processes) for name, number in sharded.items()}
            checkpoint.save({**tensors, **parts}, record)
    return FitResult(state.metrics)


def schedule(step: int, num_steps: int, warmup: float) -> float:
    """Return the factor of the peak rate at ``step``: linear warm-up, then half a cosine towards 0."""
    num_warm = int(num_steps * warmup)
    if step < num_warm:
        return (step + 1) / num_warm
    return 0.5 * (1 + math.cos(math.pi * (step - num_warm) / max(1, num_steps - num_warm)))


def _set_rates(optimizer: torch.optim.Optimizer, groups: list[Group], factor: float) -> None:
    for running, group in zip(optimizer.param_groups, groups, strict=True):
        running["lr"] = group.learning_rate * factor


def _step(
    optimizer: torch.optim.Optimizer,
    groups: list[Group],
    state: _State,
    value: Tensor,
    scalars: dict[str, Tensor],
    processes: Processes,
) -> None:
    optimizer.zero_grad(set_to_none=True)
    value.backward()
    shares = {name: scalar.detach() for name, scalar in {"loss": value, **scalars}.items()}
    parameters = (parameter for group in groups if group.num_rows is None for parameter in group.parameters)
    processes.all_reduce([*(each.grad for each in parameters if each.grad is not None), *shares.values()])
    optimizer.step()
    for name, share in shares.items():
        total = share.double()
        state.totals[name] = state.totals[name] + total if name in state.totals else total
    state.step += 1
    state.since += 1


def _record(state: _State, steps_per_epoch: int, learning_rate: float) -> None:
    means = {name: float(total) / state.since for name, total in sorted(state.totals.items())}
    if not math.isfinite(means["loss"]):
        raise FloatingPointError(f"the loss became {means['loss']} before step {state.step}; lower the learning rate")
    epoch = state.step / steps_per_epoch
    state.metrics.append({"step": state.step, "epoch": epoch, "learning_rate": learning_rate, **means})
    state.totals, state.since = {}, 0


def _snapshot(
    module: nn.Module, optimizer: torch.optim.Optimizer, state: _State, num_steps: int
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = {f"module.{name}": value for name, value in module.state_dict().items()}
    for number, moments in optimizer.state_dict()["state"].items():
        tensors.update({f"optimizer.{number}.{name}": value for name, value in moments.items()})
    tensors.update({f"total.{name}": value for name, value in state.totals.items()})
    record = {"step": state.step, "num_steps": num_steps, "since": state.since, "metrics": state.metrics}
    return tensors, record


def _sharded(module: nn.Module, groups: list[Group]) -> dict[str, int]:
    """Return the rows of each tensor that the processes hold in parts, by its name in a checkpoint."""
    rows = {each: group.num_rows for group in groups if group.num_rows is not None for each in group.parameters}
    found = {f"module.{name}": rows[each] for name, each in module.named_parameters() if each in rows}
    for number, each in enumerate(each for group in groups for each in group.parameters):
        if each in rows:
            found.update({f"optimizer.{number}.{moment}": rows[each] for moment in MOMENTS})
    return found


def _resume(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    checkpoint: Checkpointer | None,
    num_steps: int,
    processes: Processes,
    sharded: Mapping[str, int],
) -> _State:
    loaded = checkpoint.load() if checkpoint else None
    if loaded is None:
        return _State()
    tensors, record = loaded
    if record["num_steps"] != num_steps:
        raise ValueError(f"the checkpoint is of a training of {record['num_steps']} steps, this one has {num_steps}")
    own = {name: tensors[name][processes.own_slice(rows)].clone() for name, rows in sharded.items()}  # a view keeps all
    tensors = {**tensors, **own}
    module.load_state_dict(below(tensors, "module."))
    _load_moments(optimizer, below(tensors, "optimizer."))
    device = next(module.parameters()).device
    totals = {name: value.to(device) for name, value in below(tensors, "total.").items()}
    return _State(record["step"], list(record["metrics"]), totals, record["since"])


def _load_moments(optimizer: torch.optim.Optimizer, moments: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in moments.items():
        number, _, kind = name.partition(".")
        state.setdefault(int(number), {})[kind] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
