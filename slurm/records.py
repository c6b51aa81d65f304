"""What was submitted and what became of it, in ``RUN/jobs``: read from any folder, host and user.

One folder a submission: ``submission.json`` (what was asked, pinned), ``config.yaml`` (the configuration then),
``events/TASK.jsonl`` (what the job itself says), ``progress/TASK.json`` (how far it was ten seconds ago),
``outcomes.json`` (how Slurm says that silent jobs ended), the logs.
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

from grappa.pipeline.engine.progress import Snapshot
from grappa.pipeline.graph.node import Node
from grappa.pipeline.store.artifacts import RunFolder
from grappa.pipeline.store.storage import atomic_write_json, storage_errors

FORMAT = 1
JOBS_FOLDER, SUBMISSION_FILE, PINNED_CONFIG, OUTCOMES_FILE = "jobs", "submission.json", "config.yaml", "outcomes.json"


@dataclass(frozen=True)
class Pin:
    """One artifact that a job makes: ``fingerprint`` is None while what it reads was not made yet."""

    name: str
    version: int
    force: bool
    fingerprint: Mapping[str, Any] | None

    @property
    def node(self) -> Node:
        return Node.parse(self.name)


@dataclass(frozen=True)
class Task:
    """One job, or one task of an array: the artifacts that it makes in turn. ``after``: the tasks it waits for."""

    submission: Path
    id: str
    job_name: str
    artifacts: tuple[str, ...]
    after: tuple[str, ...]
    submitted: str
    cluster: str

    @property
    def log(self) -> Path:
        """Everything the job printed, all its starts."""
        return self.submission / f"{self.id}_0_log.out"

    @property
    def events_file(self) -> Path:
        return self.submission / "events" / f"{self.id}.jsonl"

    @property
    def progress(self) -> Snapshot | None:
        """How far the job's last task was when it said so last; None where it said nothing."""
        try:
            return Snapshot(**json.loads(progress_file(self.submission, self.id).read_bytes()))
        except (OSError, ValueError, TypeError):
            return None

    @cached_property
    def events(self) -> list[dict[str, Any]]:
        """What the job said: dicts with event (start, artifact, stop, end), time and more; a torn line is left out."""
        return list(read_events(self.events_file))

    def last(self, event: str) -> dict[str, Any] | None:
        """Return the newest event of a kind."""
        return next((each for each in reversed(self.events) if each["event"] == event), None)

    def made(self, artifact: str) -> bool:
        """Tell whether the job has made an artifact."""
        return any(each["event"] == "made" and each["artifact"] == artifact for each in self.events)

    @property
    def ended(self) -> dict[str, Any] | None:
        """The event with which the job ended by itself, None while it has not (or was put back into the queue)."""
        return self.events[-1] if self.events and self.events[-1]["event"] == "end" else None


def jobs_folder(run: RunFolder) -> Path:
    return run.root / JOBS_FOLDER


def progress_file(submission: Path, task: str) -> Path:
    return submission / "progress" / f"{task}.json"


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def append_event(file: Path, event: str, **fields: Any) -> None:
    """Append an event, durable at once: the job may be killed at any moment."""
    line = json.dumps({"event": event, "time": now(), **fields}) + "\n"
    with storage_errors(file), file.open("a", encoding="utf-8") as stream:
        stream.write(line)
        stream.flush()
        os.fsync(stream.fileno())


def read_events(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the events of a file, none when there is no such."""
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return
    for line in lines:
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict) and "event" in found:
            yield found


@dataclass(frozen=True)
class JobRecord:
    """One call of sbatch: the ids of its tasks, and what each of them makes (one task: no array)."""

    name: str
    ids: tuple[str, ...]
    tasks: tuple[tuple[Pin, ...], ...]
    after: tuple[str, ...]
    resources: Mapping[str, Any]


def write_submission(folder: Path, jobs: Sequence[JobRecord], general: Mapping[str, Any]) -> None:
    """Write what was submitted so far; whole or not at all."""
    content = {"format": FORMAT, **general, "jobs": [asdict(job, dict_factory=_on_disk) for job in jobs]}
    atomic_write_json(folder / SUBMISSION_FILE, content)


def _on_disk(fields: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """On disk a fingerprint has the key ``recipe``, as it has in a manifest."""
    return {"recipe" if name == "fingerprint" else name: value for name, value in fields}


def read_submission(folder: Path) -> dict[str, Any] | None:
    """Return a submission's record; None when it is damaged or of a newer version."""
    try:
        content = json.loads((folder / SUBMISSION_FILE).read_bytes())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and content.get("format") == FORMAT else None


def all_tasks(run: RunFolder) -> list[Task]:
    """Return every task ever submitted for a run, oldest submission first."""
    home = jobs_folder(run)
    folders = sorted(path for path in home.iterdir() if path.is_dir()) if home.is_dir() else []
    return [task for folder in folders for task in _tasks(folder)]


def _tasks(folder: Path) -> Iterator[Task]:
    content = read_submission(folder)
    if content is None:
        return
    for job in content["jobs"]:
        for task_id, pins in zip(job["ids"], job["tasks"], strict=True):
            names, after = tuple(pin["name"] for pin in pins), tuple(job["after"])
            yield Task(folder, task_id, job["name"], names, after, content["submitted"], content["cluster"])


def newest_by_artifact(tasks: Sequence[Task]) -> dict[str, Task]:
    """Return the task that was submitted last for each artifact."""
    return {name: task for task in tasks for name in task.artifacts}


def read_outcomes(folder: Path) -> dict[str, str]:
    """Return how silent jobs of a submission ended, by task id: what sacct said once."""
    try:
        found = json.loads((folder / OUTCOMES_FILE).read_bytes())
    except (OSError, ValueError):
        return {}
    return {str(key): str(value) for key, value in found.items()} if isinstance(found, dict) else {}
