"""``grappa status`` of a run with jobs: freshness and job state in one table; ``logs`` and ``cancel``."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from grappa.pipeline.engine.execution import Say, Selection, selected
from grappa.pipeline.engine.status import InstanceState, read_config, states, status_lines
from grappa.pipeline.graph.stages import artifact_name
from grappa.pipeline.store.artifacts import RunFolder, quoted
from grappa.slurm import scheduler
from grappa.slurm.jobs_table import write_jobs_table
from grappa.slurm.records import Task, all_tasks, newest_by_artifact
from grappa.slurm.scheduler import Queued
from grappa.slurm.states import Jobs, live_tasks, read_jobs

WATCH_SECONDS = 30.0
ALIVE = ("pending", "running", "requeued", "completing", "follows")
TAIL_BYTES = 64 * 1024


def job_notes(run: RunFolder, found: Sequence[InstanceState]) -> tuple[dict[str, str], str]:
    """Return what is to be said of the jobs, by artifact, and a warning when Slurm does not answer."""
    jobs = read_jobs(run)
    notes: dict[str, str] = {}
    lost: set[str] = set()
    for each in found:  # in the order of the graph: what blocks comes before what is blocked
        task = jobs.tasks.get(each.name)
        if task is None:
            continue
        note = _note(each.name, task, jobs, notes, lost)
        if each.state.kind != "fresh" or (jobs.in_queue(task) and not task.made(each.name)):
            notes[each.name] = note
            if note.startswith(("failed", "blocked", "cancelled")):
                lost.add(each.name)
    return {name: note for name, note in notes.items() if note}, jobs.warning


def _note(name: str, task: Task, jobs: Jobs, notes: Mapping[str, str], lost: set[str]) -> str:
    waiting = jobs.in_queue(task)
    if waiting is not None:
        return _queued_note(name, task, waiting, jobs, lost)
    begun = any(each.get("artifact") == name for each in task.events)
    if task.ended or jobs.outcome(task):
        return _ended_note(name, task, jobs, begun)
    if task.cluster != "slurm":
        return f"{'running or killed' if begun else 'not begun'} (process {task.id}, {task.log})"
    if jobs.queue is None:
        return f"{'begun' if task.events else 'submitted'} (job {task.id})"
    if task.events:
        left = task.events[-1]["event"] == "stop"
        words = "left at a signal and did not come back" if left else "ended without a word (killed, or its node died)"
        return f"failed: job {task.id} {words}, {task.log}"
    blocker = _blocker(name, task, jobs, lost)
    return f"blocked by {blocker}" if blocker else f"cancelled before it began (job {task.id})"


def _queued_note(name: str, task: Task, waiting: Queued, jobs: Jobs, lost: set[str]) -> str:
    if waiting.state == "PENDING":
        blocker = _blocker(name, task, jobs, lost) if waiting.reason == "DependencyNeverSatisfied" else None
        if blocker:
            return f"blocked by {blocker} (job {task.id})"
        start = task.last("start")
        how = f"requeued {int(start['restarts']) + 1}x, pending" if start else "pending"
        return f"{how}: {waiting.reason} (job {task.id})"
    if waiting.state != "RUNNING":
        return f"{waiting.state.lower()} on {waiting.node} (job {task.id})"
    at_work = task.last("artifact")
    if at_work and at_work["artifact"] != name:
        return f"follows {at_work['artifact']} in job {task.id}"
    parts = [f"running on {waiting.node}", last_progress(task.log, name), f"limit in {waiting.left}"]
    return f"{', '.join(part for part in parts if part)} (job {task.id})"


def _ended_note(name: str, task: Task, jobs: Jobs, begun: bool) -> str:
    end, outcome = task.ended, jobs.outcome(task)
    words = end["error"] if end else outcome
    at_work = task.last("artifact")
    if outcome.startswith("CANCELLED"):
        return f"cancelled (job {task.id}, {task.log})"
    if end and end["exit"] == 0:
        return ""  # it was made then, and is stale or gone now
    if not begun and at_work:
        return f"blocked by {at_work['artifact']}"
    return f"failed: {words} (job {task.id}, {task.log})"


def _blocker(name: str, task: Task, jobs: Jobs, lost: set[str]) -> str | None:
    """Return an artifact that failed, was cancelled or is blocked itself, and that the task waited for."""
    waited = [other for other, maker in jobs.tasks.items() if maker.id in task.after and other in lost]
    return waited[0] if waited else None


def last_progress(log: Path, name: str) -> str:
    """Return the newest line of progress in a job's log, such as ``training: 120/400 images, ..., 0:09 left``."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    found = [line.removeprefix(f"{name}: ") for line in lines if line.startswith(f"{name}: ") and " left" in line]
    return found[-1] if found else ""


def say_status(run: RunFolder, *, verify: bool, watch: bool, as_json: bool, say: Say) -> None:
    """Say the table; ``watch``: again every half minute until no job is queued or running any more."""
    while True:
        found = states(run, read_config(run), verify=verify)
        notes, warning = job_notes(run, found)
        write_jobs_table(run)
        if as_json:
            say(json.dumps([{**each.to_json(), "job": notes.get(each.name, "")} for each in found], indent=2))
            return
        for line in ([f"warning: {warning}"] if warning else []) + status_lines(found, notes):
            say(line)
        if not (watch and any(note.startswith(ALIVE) for note in notes.values())):
            return
        time.sleep(WATCH_SECONDS)
        say("\033[2J\033[H" if sys.stdout.isatty() else "")


def logs(root: Path, stage: str, instance: str | None, *, follow: bool, say: Say) -> None:
    """Print what the newest job of an artifact printed; ``follow``: until it ends."""
    run = RunFolder.open(root.resolve())
    name = _one_artifact(run, stage, instance)
    task = newest_by_artifact(all_tasks(run)).get(name)
    if task is None:
        raise ValueError(f"no job was submitted for {name}; grappa submit {quoted(run.root)} --stage {stage}")
    say(f"# job {task.id}, {task.log}")
    position = _print_from(task.log, 0)
    while follow and _is_alive(run, task):
        time.sleep(1)
        position = _print_from(task.log, position)


def cancel(root: Path, stage: str | None, instance: str | None, *, say: Say) -> None:
    """Cancel the queued and running jobs of a run, a stage or an instance; what they did is kept."""
    run = RunFolder.open(root.resolve())
    chosen = {artifact_name(each.name, name) for each, name in selected(read_config(run), Selection(stage, instance))}
    live = live_tasks(run)
    tasks = {task.id: task for name, task in live.items() if name in chosen}
    scheduler.cancel(list(tasks))
    for task in tasks.values():
        say(f"cancelled job {task.id}: {', '.join(name for name in task.artifacts if name in live)}")
    if not tasks:
        say("nothing to cancel: no such job is queued or running")


def _one_artifact(run: RunFolder, stage: str, instance: str | None) -> str:
    found = selected(read_config(run), Selection(stage, instance))
    if len(found) > 1:
        names = ", ".join(str(name) for _, name in found)
        raise ValueError(f"{stage} has several instances; name one of {names}")
    return artifact_name(found[0][0].name, found[0][1])


def _print_from(log: Path, position: int) -> int:
    if not log.exists():
        return position
    with log.open("rb") as file:
        file.seek(position)
        text = file.read()
    sys.stdout.write(text.decode(errors="replace"))
    sys.stdout.flush()
    return position + len(text)


def _is_alive(run: RunFolder, task: Task) -> bool:
    """Tell whether a job may still print; Slurm is asked only when the job itself has not said that it ended."""
    fresh = next((each for each in all_tasks(run) if each.id == task.id and each.submission == task.submission), task)
    if fresh.ended:
        return False
    return (task.id, task.job_name) in scheduler.queued([task.job_name])
