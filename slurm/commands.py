"""``grappa status`` of a run with jobs: freshness and job state in one table; ``logs`` and ``cancel``."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from grappa.core.printing import printable
from grappa.pipeline.engine.execution import Say, Selection, selected
from grappa.pipeline.engine.glance import short_lines
from grappa.pipeline.engine.live.additions import addition_lines
from grappa.pipeline.engine.status import cure_lines, read_config, states, status_lines
from grappa.pipeline.graph.node import Node
from grappa.pipeline.store.artifacts import RunFolder, quoted
from grappa.slurm import scheduler
from grappa.slurm.jobs_table import write_jobs_table
from grappa.slurm.notes import JobNote, job_notes
from grappa.slurm.records import Task, all_tasks, newest_by_artifact, newest_ranges
from grappa.slurm.states import live_tasks

WATCH_SECONDS = 30.0


def say_status(run: RunFolder, *, verify: bool, watch: bool, long: bool, as_json: bool, say: Say) -> list[str]:
    """Print the artifacts and jobs; ``watch``: repeat it every half minute until no job is left.

    ``long``: a line for every artifact, with all its reasons. Returns the last lines, which name the commands that
    repair what is damaged; empty when nothing is.
    """
    while True:
        found = states(run, read_config(run), verify=verify)
        notes, warning = job_notes(run, found)
        write_jobs_table(run)
        cure = cure_lines(run, found)
        texts = {name: note.text for name, note in notes.items()}
        if as_json:
            jobs = ({"job": texts.get(each.name, ""), "job_state": _state(notes.get(each.name))} for each in found)
            print(json.dumps([{**each.to_json(), **job} for each, job in zip(found, jobs, strict=True)], indent=2))
            return cure
        lines = (status_lines if long else short_lines)(found, texts) + addition_lines(run) + cure
        for line in ([f"warning: {warning}"] if warning else []) + lines:
            say(line)
        if not (watch and any(note.alive for note in notes.values())):
            return cure
        time.sleep(WATCH_SECONDS)
        print("\033[2J\033[H" if sys.stdout.isatty() else "")


def _state(note: JobNote | None) -> str:
    return note.state if note else ""


def logs(root: Path, stage: str, instance: str | None, *, follow: bool, say: Say, number: int | None = None) -> None:
    """Print the log of the newest job of an artifact, or of a range of its rows (``number``, from 1).

    ``follow``: print new lines until the job ends.
    """
    run = RunFolder.open(root.resolve())
    node = _one_node(run, stage, instance)
    newest = newest_by_artifact(all_tasks(run))
    ranges = {rows.number: task for rows, task in newest_ranges(newest).get(node.name, {}).items()}
    task = newest.get(node.name) if number is None else ranges.get(number)
    if task is None and number is not None and ranges:
        raise ValueError(f"no job was submitted for range {number} of {node}; found {', '.join(map(str, ranges))}")
    if task is None:
        raise ValueError(f"no job was submitted for {node}; grappa submit {quoted(run.root)} --stage {stage}")
    say(f"# job {task.id}, {task.log}")
    if ranges and number is None:
        say(f"# it joins ranges of rows; --range prints the log of one of them: {', '.join(map(str, ranges))}")
    position = _print_from(task.log, 0)
    while follow and _is_alive(run, task):
        time.sleep(1)
        position = _print_from(task.log, position)


def cancel(root: Path, stage: str | None, instance: str | None, *, say: Say) -> None:
    """Cancel the queued and running jobs of a run, a stage or an instance; a later job resumes their work."""
    run = RunFolder.open(root.resolve())
    chosen = selected(read_config(run), Selection(stage, instance))
    live = live_tasks(run)
    tasks = {task.id: task for name, task in live.items() if Node.parse(name).whole in chosen}
    scheduler.cancel(list(tasks))
    for task in tasks.values():
        say(f"cancelled job {task.id}: {', '.join(name for name in task.artifacts if name in live)}")
    if not tasks:
        say("nothing to cancel: no such job is queued or running")


def _one_node(run: RunFolder, stage: str, instance: str | None) -> Node:
    found = selected(read_config(run), Selection(stage, instance))
    if len(found) > 1:
        names = ", ".join(str(node.instance) for node in found)
        raise ValueError(f"{stage} has several instances; name one of {names}")
    return found[0]


def _print_from(log: Path, position: int) -> int:
    if not log.exists():
        return position
    with log.open("rb") as file:
        file.seek(position)
        text = file.read()
    sys.stdout.write(printable(text.decode(errors="replace").replace("\r", "\n"), kept="\n\t"))
    sys.stdout.flush()
    return position + len(text)


def _is_alive(run: RunFolder, task: Task) -> bool:
    """Tell whether a job may still print; Slurm is asked only when the job has written no event that it ended."""
    fresh = next((each for each in all_tasks(run) if each.id == task.id and each.submission == task.submission), task)
    if fresh.ended:
        return False
    return (task.id, task.job_name) in scheduler.queued([task.job_name])
