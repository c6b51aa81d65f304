"""Notes on the jobs of artifacts for `grappa status`: a state for programs and a sentence for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from grappa.pipeline.engine.status import NodeState
from grappa.pipeline.store.artifacts import RunFolder
from grappa.slurm.records import Task
from grappa.slurm.scheduler import Queued
from grappa.slurm.states import Jobs, read_jobs

JobState = Literal[
    "pending", "running", "other", "follows", "submitted", "begun", "not begun", "failed", "blocked", "cancelled"
]
ALIVE: frozenset[JobState] = frozenset({"pending", "running", "other", "follows"})
LOST: frozenset[JobState] = frozenset({"failed", "blocked", "cancelled"})


@dataclass(frozen=True)
class JobNote:
    """The state of an artifact's job, and a text for people.

    ``other``: the job is in Slurm's queue, but neither pending nor running (configuring, completing ...). ``follows``:
    the job makes another artifact first. ``submitted``, ``begun``: Slurm does not answer; the job's events say this.
    """

    state: JobState
    text: str

    @property
    def alive(self) -> bool:
        """Whether the job may still make the artifact."""
        return self.state in ALIVE

    @property
    def lost(self) -> bool:
        """Whether the job will not make the artifact, so that other jobs wait for it in vain."""
        return self.state in LOST


def job_notes(run: RunFolder, found: Sequence[NodeState]) -> tuple[dict[str, JobNote], str]:
    """Return the notes on the jobs by artifact, and a warning when Slurm does not answer."""
    jobs = read_jobs(run)
    notes: dict[str, JobNote] = {}
    for each in found:  # in the order of the graph: an artifact comes before the artifacts that it blocks
        task = jobs.tasks.get(each.name)
        if task is None or (each.state.kind == "fresh" and (task.made(each.name) or not jobs.in_queue(task))):
            continue
        note = _note(each.name, task, jobs, lost=[name for name, note in notes.items() if note.lost])
        if note:
            notes[each.name] = note
    return notes, jobs.warning


def _note(name: str, task: Task, jobs: Jobs, *, lost: Sequence[str]) -> JobNote | None:
    waiting = jobs.in_queue(task)
    if waiting is not None:
        return _queued_note(name, task, waiting, _blocker(task, jobs, lost))
    begun = any(each.get("artifact") == name for each in task.events)
    if task.ended or jobs.outcome(task):
        return _ended_note(task, jobs, begun)
    if task.cluster != "slurm":
        where = f"(process {task.id}, {task.log})"
        return JobNote("running", f"running or killed {where}") if begun else JobNote("not begun", f"not begun {where}")
    if jobs.queue is None:
        state: JobState = "begun" if task.events else "submitted"
        return JobNote(state, f"{state} (job {task.id})")
    return _silent_note(task, _blocker(task, jobs, lost))


def _queued_note(name: str, task: Task, waiting: Queued, blocker: str | None) -> JobNote:
    if waiting.state == "PENDING":
        return _pending_note(task, waiting, blocker)
    if waiting.state != "RUNNING":
        return JobNote("other", f"{waiting.state.lower()} on {waiting.node} (job {task.id})")
    at_work = task.last("artifact")
    if at_work and at_work["artifact"] != name:
        return JobNote("follows", f"follows {at_work['artifact']} in job {task.id}")
    progress = task.progress
    at = progress.text if progress and progress.artifact == name else ""
    parts = [f"running on {waiting.node}", at, f"limit in {waiting.left}"]
    return JobNote("running", f"{', '.join(part for part in parts if part)} (job {task.id})")


def _pending_note(task: Task, waiting: Queued, blocker: str | None) -> JobNote:
    if blocker and waiting.reason == "DependencyNeverSatisfied":
        return JobNote("blocked", f"blocked by {blocker} (job {task.id})")
    start = task.last("start")
    how = f"requeued {int(start['restarts']) + 1}x, pending" if start else "pending"
    return JobNote("pending", f"{how}: {waiting.reason} (job {task.id})")


def _ended_note(task: Task, jobs: Jobs, begun: bool) -> JobNote | None:
    end, outcome = task.ended, jobs.outcome(task)
    words = end["error"] if end else outcome
    at_work = task.last("artifact")
    if outcome.startswith("CANCELLED"):
        return JobNote("cancelled", f"cancelled (job {task.id}, {task.log})")
    if end and end["exit"] == 0:
        return None  # the job made the artifact, which is stale or missing now
    if not begun and at_work:
        return JobNote("blocked", f"blocked by {at_work['artifact']}")
    return JobNote("failed", f"failed: {words} (job {task.id}, {task.log})")


def _silent_note(task: Task, blocker: str | None) -> JobNote:
    """Return the note on a job that is not in the queue and has written no event that it ended."""
    if task.events:
        left = task.events[-1]["event"] == "stop"
        words = "left at a signal and did not come back" if left else "ended without a word (killed, or its node died)"
        return JobNote("failed", f"failed: job {task.id} {words}, {task.log}")
    if blocker:
        return JobNote("blocked", f"blocked by {blocker}")
    return JobNote("cancelled", f"cancelled before it began (job {task.id})")


def _blocker(task: Task, jobs: Jobs, lost: Sequence[str]) -> str | None:
    """Return an artifact that the task waited for and that failed, was cancelled or is blocked; None without one."""
    return next((name for name in lost if jobs.tasks[name].id in task.after), None)
