"""The states of a run's jobs, from Slurm's queue, the jobs' events, and Slurm's accounting where both say nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from grappa.pipeline.store.artifacts import RunFolder
from grappa.pipeline.store.storage import StorageError, atomic_write_json
from grappa.slurm import scheduler
from grappa.slurm.records import OUTCOMES_FILE, Task, all_tasks, damaged_submissions, newest_by_artifact, read_outcomes
from grappa.slurm.scheduler import Queued, SchedulerError


@dataclass(frozen=True)
class Jobs:
    """The newest tasks by artifact, and their states; ``queue`` is None and ``warning`` says why if Slurm is silent."""

    tasks: Mapping[str, Task]
    queue: Mapping[scheduler.Key, Queued] | None = None
    outcomes: Mapping[scheduler.Key, str] = field(default_factory=dict)
    warning: str = ""

    def in_queue(self, task: Task) -> Queued | None:
        return self.queue.get((task.id, task.job_name)) if self.queue is not None else None

    def outcome(self, task: Task) -> str:
        """Return how a job ended that wrote no event of it, by Slurm's accounting; "" where that is not known."""
        return self.outcomes.get((task.id, task.job_name), "")


def read_jobs(run: RunFolder) -> Jobs:
    """Return the states of a run's jobs; at most two Slurm commands are called, however many jobs there are."""
    tasks, lost = newest_by_artifact(all_tasks(run)), damaged_submissions(run)
    damage = f"{lost[0]} is damaged, so its jobs are not known ({len(lost)} such records)" if lost else ""
    known = {key: outcome for task in _distinct(tasks.values()) for key, outcome in _known_outcome(task)}
    unsettled = [
        task
        for task in _distinct(tasks.values())
        if task.cluster == "slurm" and not task.ended and (task.id, task.job_name) not in known
    ]
    try:
        queue = scheduler.queued(task.job_name for task in unsettled)
    except SchedulerError as error:
        silence = f"{error}; what follows of the jobs is what they said themselves"
        return Jobs(tasks, None, known, "; ".join(filter(None, (silence, damage))))
    silent = [task for task in unsettled if task.events and (task.id, task.job_name) not in queue]
    try:
        found = scheduler.outcomes([(task.id, task.job_name) for task in silent])
    except SchedulerError:  # this cluster has no accounting, so nothing more can be known
        found = {}
    _write_outcomes(silent, found)
    return Jobs(tasks, queue, {**known, **found}, damage)


def live_tasks(run: RunFolder) -> dict[str, Task]:
    """Return the queued and running tasks, by the artifacts that they will make; SchedulerError if Slurm is silent.

    A task that waits for a failed task is left out, because Slurm will cancel it.
    """
    everything = [task for task in all_tasks(run) if task.cluster == "slurm"]
    by_id, newest = {task.id: task for task in everything}, newest_by_artifact(everything)
    queue = scheduler.queued(task.job_name for task in newest.values() if not task.ended)

    def doomed(task: Task) -> bool:
        waited = [] if task.events else [by_id[other] for other in task.after if other in by_id]
        return any(
            doomed(other) if (other.id, other.job_name) in queue else not all(map(other.made, other.artifacts))
            for other in waited
        )

    return {
        name: task
        for name, task in newest.items()
        if (task.id, task.job_name) in queue and not task.made(name) and not doomed(task)
    }


def _distinct(tasks: Iterable[Task]) -> list[Task]:
    return list({(task.submission, task.id): task for task in tasks}.values())


def _known_outcome(task: Task) -> list[tuple[scheduler.Key, str]]:
    """Return the outcome that accounting gave at an earlier call, with its key, or an empty list."""
    outcome = read_outcomes(task.submission).get(task.id)
    return [((task.id, task.job_name), outcome)] if outcome else []


def _write_outcomes(tasks: Sequence[Task], found: Mapping[scheduler.Key, str]) -> None:
    """Write how jobs ended, so that accounting is asked only once; a state that may still change is left out."""
    for folder in {task.submission for task in tasks}:
        new = {
            task.id: found[task.id, task.job_name]
            for task in tasks
            if task.submission == folder and is_final(found.get((task.id, task.job_name), "RUNNING"))
        }
        if new:
            with suppress(StorageError):
                atomic_write_json(folder / OUTCOMES_FILE, {**read_outcomes(folder), **new})


def is_final(outcome: str) -> bool:
    """Tell whether a state in Slurm's accounting is final."""
    return not outcome.startswith(("PENDING", "RUNNING", "REQUEUED", "SUSPENDED", "COMPLETING", "RESIZING"))
