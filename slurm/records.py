"""The records of submissions and jobs in ``RUN/jobs``, which any user can read on any host.

A submission has a folder: ``submission.json`` (the jobs and their pinned artifacts), ``config.yaml`` (the configuration
at the submission), ``events/TASK.jsonl`` (the events that a job writes), ``progress/TASK.json`` (a job's progress, at
most ten seconds old), ``outcomes.json`` (Slurm's account of jobs that ended without an event), and the logs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter

from grappa.core.notes import parse_json
from grappa.pipeline.engine.progress import Snapshot
from grappa.pipeline.graph.node import RANGES, Node, RowRange
from grappa.pipeline.store.artifacts import RunFolder
from grappa.pipeline.store.storage import atomic_write_json, read_json_lines, storage_errors

FORMAT = 1
JOBS_FOLDER, SUBMISSION_FILE, PINNED_CONFIG, OUTCOMES_FILE = "jobs", "submission.json", "config.yaml", "outcomes.json"


# The fields that an event needs to be used, beside its time; lines without them are damaged.
EVENT_FIELDS: Mapping[str, Mapping[str, type]] = {
    "start": {"restarts": int},
    "artifact": {"artifact": str},
    "made": {"artifact": str},
    "end": {"exit": int, "error": str},
}


class SubmittedArtifact(BaseModel):
    """The field of an artifact in ``submission.json`` that is read again."""

    name: str


class SubmittedJob(BaseModel):
    """The fields of a job in ``submission.json`` that are read again: an id for each task."""

    name: str
    ids: list[str]
    tasks: list[list[SubmittedArtifact]]
    after: list[str]


class SubmissionRecord(BaseModel):
    """The fields of ``submission.json`` that are read again."""

    format: int
    submitted: str
    cluster: str
    jobs: list[SubmittedJob]


@dataclass(frozen=True)
class Pin:
    """One artifact that a job makes; ``fingerprint`` is None where its inputs were not made at the submission."""

    name: str
    version: int
    force: bool
    fingerprint: Mapping[str, Any] | None

    @property
    def node(self) -> Node:
        return Node.parse(self.name)


@dataclass(frozen=True)
class Task:
    """One job, or one task of an array; it makes ``artifacts`` in turn and waits for the tasks ``after``."""

    submission: Path
    id: str
    job_name: str
    artifacts: tuple[str, ...]
    after: tuple[str, ...]
    submitted: str
    cluster: str

    @property
    def log(self) -> Path:
        """The file with all that the job printed, over all its starts."""
        return self.submission / f"{self.id}_0_log.out"

    @property
    def events_file(self) -> Path:
        return self.submission / "events" / f"{self.id}.jsonl"

    @property
    def progress(self) -> Snapshot | None:
        """The last progress that the job wrote; None where it wrote none."""
        try:
            return TypeAdapter(Snapshot).validate_json(
                progress_file(self.submission, self.id).read_bytes(), strict=True
            )
        except (OSError, ValueError):
            return None

    @cached_property
    def events(self) -> list[dict[str, Any]]:
        """The job's events: dicts with event (start, artifact, made, stop, end), time and more; no torn lines."""
        return list(read_events(self.events_file))

    def last(self, event: str) -> dict[str, Any] | None:
        """Return the newest event of a kind."""
        return next((each for each in reversed(self.events) if each["event"] == event), None)

    def made(self, artifact: str) -> bool:
        """Tell whether the job has made an artifact."""
        return any(each["event"] == "made" and each["artifact"] == artifact for each in self.events)

    @property
    def ended(self) -> dict[str, Any] | None:
        """The event of the job's end; None where the job has not ended by itself or was put back into the queue."""
        return self.events[-1] if self.events and self.events[-1]["event"] == "end" else None


def jobs_folder(run: RunFolder) -> Path:
    return run.root / JOBS_FOLDER


def progress_file(submission: Path, task: str) -> Path:
    return submission / "progress" / f"{task}.json"


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def append_event(file: Path, event: str, **fields: Any) -> None:
    """Append an event and sync it to the disk, because the job may be killed at any moment."""
    line = json.dumps({"event": event, "time": now(), **fields}) + "\n"
    with storage_errors(file), file.open("a", encoding="utf-8") as stream:
        stream.write(line)
        stream.flush()
        os.fsync(stream.fileno())


def read_events(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the events of a file, but for damaged lines; nothing where the file does not exist."""
    for found in read_json_lines(file):
        needed = {"time": str, **EVENT_FIELDS.get(str(found.get("event")), {"event": str})}
        if all(isinstance(found.get(name), kind) for name, kind in needed.items()):
            yield found


@dataclass(frozen=True)
class JobRecord:
    """One call of sbatch: the ids of its tasks and the artifacts that they make; a single task is no array."""

    name: str
    ids: tuple[str, ...]
    tasks: tuple[tuple[Pin, ...], ...]
    after: tuple[str, ...]
    resources: Mapping[str, Any]


def write_submission(folder: Path, jobs: Sequence[JobRecord], general: Mapping[str, Any]) -> None:
    """Write the jobs that were submitted so far, whole or not at all."""
    content = {"format": FORMAT, **general, "jobs": [asdict(job, dict_factory=_on_disk) for job in jobs]}
    atomic_write_json(folder / SUBMISSION_FILE, content)


def _on_disk(fields: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Return the fields with their keys on disk, where a fingerprint has the key ``recipe``, as in a manifest."""
    return {"recipe" if name == "fingerprint" else name: value for name, value in fields}


def read_submission(folder: Path) -> SubmissionRecord | None:
    """Return the record of a submission; None when it is damaged or of a newer version."""
    try:
        found = SubmissionRecord.model_validate_json((folder / SUBMISSION_FILE).read_bytes(), strict=True)
    except (OSError, ValueError):
        return None
    paired = all(len(job.ids) == len(job.tasks) for job in found.jobs)
    return found if found.format == FORMAT and paired else None


def damaged_submissions(run: RunFolder) -> list[Path]:
    """Return the records of submissions that are damaged or of a newer version, so that their jobs are not known."""
    records = (folder / SUBMISSION_FILE for folder in _submission_folders(run))
    return [record for record in records if record.exists() and read_submission(record.parent) is None]


def _submission_folders(run: RunFolder) -> list[Path]:
    home = jobs_folder(run)
    return sorted(path for path in home.iterdir() if path.is_dir()) if home.is_dir() else []


def all_tasks(run: RunFolder) -> list[Task]:
    """Return all tasks that were ever submitted for a run, the oldest submission first."""
    return [task for folder in _submission_folders(run) for task in _tasks(folder)]


def _tasks(folder: Path) -> Iterator[Task]:
    found = read_submission(folder)
    if found is None:
        return
    for job in found.jobs:
        for task_id, pins in zip(job.ids, job.tasks, strict=True):
            names = tuple(pin.name for pin in pins)
            yield Task(folder, task_id, job.name, names, tuple(job.after), found.submitted, found.cluster)


def newest_by_artifact(tasks: Sequence[Task]) -> dict[str, Task]:
    """Return the last submitted task of each artifact, by the artifact's name."""
    return {name: task for task in tasks for name in task.artifacts}


def newest_ranges(newest: Mapping[str, Task]) -> dict[str, dict[RowRange, Task]]:
    """Return the newest tasks of ranges of rows, in order, by the name of the artifact whose rows they are.

    ``newest``: the newest tasks by artifact. Only ranges of the total that was submitted last are returned.
    """
    found: dict[str, list[tuple[RowRange, Task]]] = {}
    for node, task in ((Node.parse(name), task) for name, task in newest.items() if f"{RANGES}/" in name):
        if node.rows:
            found.setdefault(node.whole.name, []).append((node.rows, task))
    return {name: _of_last_total(some) for name, some in found.items()}


def _of_last_total(found: Sequence[tuple[RowRange, Task]]) -> dict[RowRange, Task]:
    last, _ = max(found, key=lambda each: each[1].submission)
    return {rows: task for rows, task in sorted(found, key=lambda each: each[0].number) if rows.total == last.total}


def read_outcomes(folder: Path) -> dict[str, str]:
    """Return Slurm's account of how jobs ended that wrote no event of it, by task id, as sacct once gave it."""
    try:
        found = parse_json((folder / OUTCOMES_FILE).read_bytes())
    except (OSError, ValueError):
        return {}
    return {str(key): str(value) for key, value in found.items()} if isinstance(found, dict) else {}
