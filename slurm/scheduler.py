"""Questions to Slurm: one squeue and at most one sacct for any number of jobs, with a time limit for each call."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

SECONDS = 20.0
# A task's id and its job's name. Slurm uses an id again after a while; a name has a random mark and is used only once.
Key = tuple[str, str]


class SchedulerError(ValueError):
    """Slurm did not answer, or it refused the command; the message has Slurm's words."""


@dataclass(frozen=True)
class Queued:
    """A task in Slurm's queue: ``state`` such as PENDING or RUNNING; ``left``: the rest of its time limit."""

    state: str
    reason: str
    node: str
    left: str


def call(*command: str, seconds: float = SECONDS) -> str:
    """Return the output of a Slurm command; SchedulerError when it fails, does not exist or takes too long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except FileNotFoundError:
        raise SchedulerError(f"{command[0]} is not on the PATH; run this where Slurm's commands are") from None
    except subprocess.TimeoutExpired:
        raise SchedulerError(f"{command[0]} did not answer within {seconds:.0f} s; try again later") from None
    if done.returncode:
        words = " ".join((done.stderr or done.stdout).split())
        raise SchedulerError(f"{command[0]}: {words or f'exit status {done.returncode}'}")
    return done.stdout


def queued(names: Iterable[str]) -> dict[Key, Queued]:
    """Return the tasks in the queue whose jobs have these names: they wait, run or are about to end."""
    names = sorted(set(names))
    if not names:
        return {}
    form = "%i|%j|%T|%r|%N|%L"
    lines = call("squeue", "--noheader", "--array", f"--name={','.join(names)}", f"--format={form}").splitlines()
    found = {}
    for line in lines:
        task, name, state, reason, node, left = (part.strip() for part in line.split("|"))
        found[task, name] = Queued(state, reason, node, left)
    return found


def outcomes(keys: Sequence[Key]) -> dict[Key, str]:
    """Return how jobs ended that are no longer in the queue, such as ``FAILED 137:0``, where accounting knows it."""
    if not keys:
        return {}
    ids = ",".join(sorted({task.partition("_")[0] for task, _ in keys}))
    form = "--format=JobID,JobName%-200,State,ExitCode"
    lines = call("sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={ids}", form).splitlines()
    found: dict[Key, str] = {}
    for line in lines:
        task, name, state, code = (part.strip() for part in line.split("|"))
        for each in _expanded(task):
            found[each, name] = f"{state} {code}"
    return {key: found[key] for key in keys if key in found}


def _expanded(task: str) -> list[str]:
    """Return ``12_0`` and ``12_1`` for ``12_[0-1%4]``, which stands for array tasks that never started."""
    base, bracket, rest = task.partition("_[")
    if not bracket:
        return [task]
    numbers: list[int] = []
    for part in re.sub(r"(%\d+)?\]$", "", rest).split(","):
        first, _, last = part.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return [f"{base}_{number}" for number in numbers]


def cancel(ids: Sequence[str]) -> None:
    """Cancel tasks by id."""
    if ids:
        call("scancel", *ids)
