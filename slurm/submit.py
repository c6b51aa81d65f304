"""``grappa submit``: plan the jobs, pin their artifacts and submit them, either all jobs or none."""

from __future__ import annotations

import re
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from grappa.core.printing import printable
from grappa.pipeline.config.schema import Config
from grappa.pipeline.engine.execution import Say, Selection
from grappa.pipeline.engine.status import read_config
from grappa.pipeline.store.artifacts import RunFolder, quoted
from grappa.pipeline.store.locks import LockedError, acquire
from grappa.pipeline.store.ranges import drop_ranges
from grappa.pipeline.store.storage import storage_errors
from grappa.slurm import scheduler
from grappa.slurm.jobs import code_here
from grappa.slurm.jobs_table import write_jobs_table
from grappa.slurm.launch import Waits, sbatch_text, submit_slurm
from grappa.slurm.local import run_locally
from grappa.slurm.plan import PlannedJob, plan
from grappa.slurm.profiles import Profile, load_profile
from grappa.slurm.records import JobRecord, Task, damaged_submissions, jobs_folder
from grappa.slurm.states import live_tasks
from grappa.slurm.submission import Submission

LOCK_SECONDS = 120.0


def submit(root: Path, selection: Selection, profile_name: str, *, say: Say, dry_run: bool = False) -> None:
    """Submit jobs for the artifacts that are not fresh and that no job makes already; ``say`` gets a line for each job.

    Raises NotReadyError for a stage whose inputs are missing, SchedulerError with Slurm's words when Slurm refuses a
    job (then no job stays in the queue), LockedError when another submission of the run takes more than two minutes, or
    when ranges of rows that ``force`` would drop are being made.
    """
    run = RunFolder.open(root.resolve(), writable=not dry_run)
    profile = load_profile(profile_name)
    _refuse_odd_name(run.root)
    if dry_run:
        submission = _submission(run, read_config(run), profile)
        jobs = plan(run, submission.config, selection, profile, _live(run, profile, say))
        _say_plan(submission, jobs, say)
        return
    with storage_errors(run.root):
        jobs_folder(run).mkdir(exist_ok=True)
    with _alone(run):
        submission, live = _submission(run, read_config(run), profile), _live(run, profile, say)
        if profile.cluster == "slurm":
            _remove_left_over(run, live)
        jobs = plan(run, submission.config, selection, profile, live)
        for pin in (pin for job in jobs for pins in job.tasks for pin in pins if pin.force and not pin.node.rows):
            drop_ranges(run, pin.node)
        if not jobs:
            say(f"nothing to submit: {f'{len(live)} artifacts are on their way' if live else 'all is fresh'}")
        elif profile.cluster == "slurm":
            _submit_all(submission, jobs, live, say)
        else:
            run_locally(submission, jobs, say)


def _remove_left_over(run: RunFolder, live: Mapping[str, Task]) -> None:
    from grappa.slurm.entry import remove_left_over

    remove_left_over(jobs_folder(run), {task.id for task in live.values()})


def _live(run: RunFolder, profile: Profile, say: Say) -> dict[str, Task]:
    """Return the tasks that Slurm still has, by artifact; say which records cannot tell of theirs."""
    for record in damaged_submissions(run):
        say(f"warning: {record} is damaged, so its jobs are not known; look for them by `squeue`")
    return live_tasks(run) if profile.cluster == "slurm" else {}


def _submission(run: RunFolder, config: Config, profile: Profile) -> Submission:
    mark = secrets.token_hex(4)
    folder = jobs_folder(run) / f"{datetime.now(UTC):%Y%m%d-%H%M%S-%f}-{mark}"
    return Submission(run, config, profile, folder, mark, code_here())


def _submit_all(submission: Submission, jobs: Sequence[PlannedJob], live: Mapping[str, Task], say: Say) -> None:
    records: list[JobRecord] = []
    makers = {name: task.id for name, task in live.items()}
    submission.prepare()
    try:
        for job in jobs:
            waits = _waits(job, makers)
            name, calls = submission.job_name(job), submission.calls(job)
            ids = submit_slurm(submission.profile, job, submission.folder, name, waits, calls)
            records.append(submission.record(job, ids, waits.made))
            submission.write(records)
            makers |= {pin.name: task for task, pins in zip(ids, job.tasks, strict=True) for pin in pins}
            say(f"job {_base(ids[0])}: {job.title}{_after(waits)}")
    except BaseException:
        _withdraw(submission, records)
        raise
    write_jobs_table(submission.run)
    root = quoted(submission.run.root)
    say(f"you may log out now; grappa status {root}, grappa logs {root} STAGE, grappa cancel {root}")


def _withdraw(submission: Submission, records: Sequence[JobRecord]) -> None:
    """Cancel the jobs that were submitted before the error, and delete their folder."""
    with suppress(scheduler.SchedulerError):
        scheduler.cancel([task for record in records for task in record.ids])
    shutil.rmtree(submission.folder, ignore_errors=True)


def _say_plan(submission: Submission, jobs: Sequence[PlannedJob], say: Say) -> None:
    """Say which jobs would be submitted; in the scripts ``<stages>`` stands for an id that only Slurm can give."""
    makers = {pin: f"<{job.name}>" for job in jobs for pin in job.artifacts}
    for number, job in enumerate(jobs, 1):
        waits = _waits(job, {name: makers.get(name, name) for name in (*job.needs, *job.joins)})
        say(f"job {number}: {job.title}{_after(waits)}")
        for name, reason in job.reasons.items():
            say(f"    {name}: {reason}")
        resources = job.resources.model_dump(exclude={"ranges"})  # they are tasks of an array
        asked = {name: value for name, value in resources.items() if value is not None}
        say("    " + ", ".join(f"{name} {value}{' min' if name == 'time' else ''}" for name, value in asked.items()))
        if submission.profile.cluster == "slurm":
            text = sbatch_text(submission.profile, job, submission.folder, submission.job_name(job), waits)
            for line in text.rstrip().splitlines():
                say(f"    | {line}".rstrip())
    tasks = sum(len(job.tasks) for job in jobs)
    say(f"{len(jobs)} jobs, {tasks} tasks; nothing was submitted" if jobs else "nothing to submit")


@contextmanager
def _alone(run: RunFolder) -> Iterator[None]:
    """Lock the submissions of the run: a second one waits for the first, and then finds the jobs of the first."""
    end = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            lock = acquire(jobs_folder(run) / "submit.lock", what=f"the queue of {run.root}")
            break
        except LockedError:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)
    with lock:
        yield


def _refuse_odd_name(root: Path) -> None:
    """Refuse a path with ``%``, a backslash (both have a meaning in Slurm's log names) or a control character."""
    found = next((each for each in str(root) if each in "%\\" or printable(each) != each), None)
    if found:
        raise ValueError(f"{root} has {found!r} in its name, which Slurm cannot have in a log's; rename the folder")


def _waits(job: PlannedJob, makers: Mapping[str, str]) -> Waits:
    """Return what a job waits for; ``makers``: the ids of tasks by the artifacts that they make."""
    made = dict.fromkeys(makers[name] for name in job.needs)
    return Waits(tuple(made), tuple(dict.fromkeys(_base(makers[name]) for name in job.joins)))


def _after(waits: Waits) -> str:
    """Return ``, after 7, 8``, or nothing for a job that waits for none."""
    found = dict.fromkeys(_base(each) for each in (*waits.made, *waits.ended))
    return f", after {', '.join(found)}" if found else ""


def _base(task: str) -> str:
    """Return the job of a task of an array; the name of a stage, in a dry run, is whole."""
    return re.sub(r"_\d+$", "", task)
