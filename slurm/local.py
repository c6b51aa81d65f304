"""Jobs without Slurm: processes on this machine (submitit's local executor), or calls in this process."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from grappa.core.printing import sentence
from grappa.pipeline.engine.execution import Say
from grappa.slurm.jobs_table import write_jobs_table
from grappa.slurm.launch import run_here, start_local
from grappa.slurm.plan import PlannedJob
from grappa.slurm.records import JobRecord, Pin, append_event, read_events
from grappa.slurm.submission import Submission


class JobsFailedError(ValueError):
    """Some jobs failed; the message names them and their logs."""


def run_locally(submission: Submission, jobs: Sequence[PlannedJob], say: Say) -> None:
    """Run the jobs in order; a job whose inputs were not made is skipped. JobsFailedError at the end if any failed."""
    run_job = _run_processes if submission.profile.cluster == "local" else _run_here
    records: list[JobRecord] = []
    lost: dict[str, str] = {}  # artifacts that were not made, with the reason
    submission.prepare()
    for job in jobs:
        blocker = next((name for name in job.needs if name in lost), None)
        if blocker:
            lost |= dict.fromkeys(job.artifacts, f"blocked by {blocker}")
            say(f"{job.title}: blocked by {blocker}")
            continue
        say(f"{job.title}: started")
        failed = run_job(submission, job, records)
        lost |= failed
        for name, reason in failed.items():
            say(f"{name}: failed: {reason}")
        if not job.by_ranges:  # the artifacts are made or lost now, so their ranges do not matter any more
            lost = {name: reason for name, reason in lost.items() if name not in job.joins}
    write_jobs_table(submission.run)
    if lost:
        raise JobsFailedError(f"not made: {'; '.join(f'{name} ({reason})' for name, reason in lost.items())}")


def _run_processes(submission: Submission, job: PlannedJob, records: list[JobRecord]) -> dict[str, str]:
    """Run ``array_parallelism`` tasks at a time; return the artifacts that were not made, with the reason."""
    calls, width = submission.calls(job), submission.profile.array_parallelism
    failed: dict[str, str] = {}
    for start in range(0, len(calls), width):
        some = job.tasks[start : start + width]
        started = start_local(submission.profile, job, submission.folder, calls[start : start + width])
        records.append(JobRecord(submission.job_name(job), tuple(each.job_id for each in started), some, (), {}))
        submission.write(records)
        for each, pins in zip(started, some, strict=True):
            each.wait()
            _note_end(submission, each.job_id)
            failed |= _not_made(submission, each.job_id, pins)
    return failed


def _run_here(submission: Submission, job: PlannedJob, records: list[JobRecord]) -> dict[str, str]:
    """Make the calls of all tasks in this process; return the artifacts that were not made, with the reason."""
    ids = tuple(f"here{secrets.token_hex(3)}" for _ in job.tasks)
    records.append(JobRecord(submission.job_name(job), ids, job.tasks, (), {}))
    submission.write(records)
    failed: dict[str, str] = {}
    for call, task, pins in zip(submission.calls(job), ids, job.tasks, strict=True):
        with suppress(SystemExit):
            run_here(call, task)
        failed |= _not_made(submission, task, pins)
    return failed


def _note_end(submission: Submission, task: str) -> None:
    """Write the end of a process that could not do so itself, with what is known of the reason."""
    file = _events_file(submission, task)
    events = list(read_events(file))
    if events and events[-1]["event"] == "end":
        return
    when = "while it worked" if events else "before it began"
    append_event(file, "end", exit=1, error=f"its process ended {when}{_last_words(_log(submission, task))}")


def _last_words(log: Path) -> str:
    """Return what the log of a process that ended tells of the reason, as the end of a sentence."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return " and left no log: a command of the profile's `setup` failed, and printed why"
    last = next((line for line in reversed(lines) if line.strip() and not line.startswith("submitit ")), "")
    return f"; the last line of its log: {sentence(last)}" if last else " without a word (killed?)"


def _not_made(submission: Submission, task: str, pins: Sequence[Pin]) -> dict[str, str]:
    """Return the artifacts that a task did not make, with the error of its last event and the place of its log."""
    events = list(read_events(_events_file(submission, task)))
    made = {each["artifact"] for each in events if each["event"] == "made"}
    words, log = events[-1].get("error", "") if events else "", _log(submission, task)
    where = f"; log: {log}" if log.exists() else ""
    return {pin.name: f"{words}{where}" for pin in pins if pin.name not in made}


def _events_file(submission: Submission, task: str) -> Path:
    return submission.folder / "events" / f"{task}.jsonl"


def _log(submission: Submission, task: str) -> Path:
    return submission.folder / f"{task}_0_log.out"
