"""Notes on the jobs of artifacts for `grappa status`: a state for programs and a sentence for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from grappa.pipeline.engine.status import NodeState
from grappa.pipeline.graph.node import RANGES, Node, RowRange
from grappa.pipeline.store.artifacts import RunFolder
from grappa.slurm.records import Task, newest_ranges
from grappa.slurm.scheduler import Queued
from grappa.slurm.states import Jobs, read_jobs

JobState = Literal[
    "running", "pending", "other", "follows", "submitted", "begun", "not begun", "failed", "blocked", "cancelled"
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
    ranges = newest_ranges(jobs.tasks)
    for each in found:  # in the order of the graph: an artifact comes before the artifacts that it blocks
        task, fresh = jobs.tasks.get(each.name), each.state.kind == "fresh"
        lost, note = [name for name, note in notes.items() if note.lost], None
        if task and not (fresh and (task.made(each.name) or not jobs.in_queue(task))):
            note = _note(each.name, task, jobs, lost=lost)
        if each.name in ranges and not fresh:
            note = _with_ranges(run, each.node, ranges[each.name], jobs, lost, note)
        if note:
            notes[each.name] = note
    return notes, jobs.warning


def _with_ranges(
    run: RunFolder,
    node: Node,
    tasks: Mapping[RowRange, Task],
    jobs: Jobs,
    lost: Sequence[str],
    joining: JobNote | None,
) -> JobNote | None:
    """Return the note on the ranges of an artifact's rows and on the job that joins them, which may have no note."""
    total = next(iter(tasks)).total
    names = [each.name for each in node.ranges(total)]
    by_name = {replace(node, rows=rows).name: task for rows, task in tasks.items()}
    notes = {name: _note(name, task, jobs, lost=lost) for name, task in by_name.items()}
    made = [name for name in names if not _alive(notes.get(name)) and run.artifact(name).home.exists()]
    open_ = [note for name, note in notes.items() if note and name not in made]
    if not made and not open_:
        return joining
    parts = [f"{len(made)} of {total} ranges made", *_counts(open_), *_rows_done(by_name.values(), jobs)]
    text = ", ".join(parts) + (f"; joining {joining.text}" if joining else "")
    running = next((note for note in open_ if note.state == "running"), None)
    state = (running or joining or next(iter(open_), None) or JobNote("not begun", "")).state
    return JobNote(state, text)


def _alive(note: JobNote | None) -> bool:
    return note is not None and note.alive


def _counts(notes: Sequence[JobNote]) -> list[str]:
    """Return ``3 running``, ``1 failed: ...`` and so on; of those that are lost, the first one says why."""
    first = {note.state: note for note in reversed(notes)}
    numbers = Counter(note.state for note in notes)
    known = [state for state in get_args(JobState) if numbers[state]]
    return [f"{numbers[state]} {first[state].text if first[state].lost else state}" for state in known]


def _rows_done(tasks: Iterable[Task], jobs: Jobs) -> list[str]:
    """Return how far the running tasks are, together, such as ``120/400 images, 33.1 images/s``."""
    found = [task.progress for task in tasks if (queued := jobs.in_queue(task)) and queued.state == "RUNNING"]
    at_work = [each for each in found if each]
    if not at_work:
        return []
    done, total, speed = (sum(getattr(each, name) for each in at_work) for name in ("done", "total", "per_second"))
    return [f"{done}/{total} {at_work[0].unit}, {speed:.1f} {at_work[0].unit}/s"]


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
    progress = task.progress  # the job that joins ranges also makes those that are missing
    shown = (progress.artifact, progress.artifact.partition(f"{RANGES}/")[0]) if progress else ()
    at = progress.text if progress and name in shown else ""
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
