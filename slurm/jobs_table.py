"""``jobs/jobs.csv``: a row for each artifact of each job, from the jobs' events; `tables.load_jobs` opens it."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import time
from collections.abc import Mapping
from typing import Any

from grappa.pipeline.store.artifacts import RunFolder
from grappa.pipeline.store.csv_cells import guarded
from grappa.pipeline.store.locks import LockedError, acquire
from grappa.pipeline.store.storage import StorageError, atomic_write_text
from grappa.slurm.records import Task, all_tasks, jobs_folder, read_outcomes

TABLE_FILE = "jobs.csv"
COLUMNS = (
    "artifact job_id job_name state submitted started ended seconds restarts node peak_memory_bytes exit recipe error "
    "outcome log"
).split()


def fingerprint_digest(fingerprint: Mapping[str, Any]) -> str:
    """Return the sha256 of a fingerprint's canonical JSON."""
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()


def write_jobs_table(run: RunFolder) -> None:
    """Write the table again; several writers take turns, so that the last one has read all events."""
    home = jobs_folder(run)
    end = time.monotonic() + 30
    while True:
        try:
            with acquire(home / f"{TABLE_FILE}.lock", what=TABLE_FILE):
                atomic_write_text(home / TABLE_FILE, _text(run))
                return
        except StorageError:
            return  # the disk is full or the folder belongs to another user; the next writer reads the same events
        except LockedError:
            if time.monotonic() > end:
                return
            time.sleep(0.1)


def _text(run: RunFolder) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for task in all_tasks(run):
        outcome = read_outcomes(task.submission).get(task.id, "")
        for name in task.artifacts:
            row = _row(run, task, name, outcome)
            writer.writerow({column: guarded(value) for column, value in row.items()})
    return out.getvalue()


def _row(run: RunFolder, task: Task, name: str, outcome: str) -> dict[str, Any]:
    starts = [each for each in task.events if each["event"] == "start"]
    own = [each for each in task.events if each.get("artifact") == name]
    begun, made = (
        [each for each in own if each["event"] == "artifact"],
        [each for each in own if each["event"] == "made"],
    )
    end = task.ended if begun else None
    said = end or (None if task.last("artifact") else task.ended)  # a job that began none failed for all of them
    return {
        "artifact": name,
        "job_id": task.id,
        "job_name": task.job_name,
        "state": _state(task, bool(begun), bool(made), outcome),
        "submitted": task.submitted,
        "started": begun[0]["time"] if begun else "",
        "ended": made[-1]["time"] if made else end["time"] if end else "",
        "seconds": made[-1].get("seconds", "") if made else "",
        "restarts": starts[-1]["restarts"] if starts else "",
        "node": starts[-1].get("node", "") if starts else "",
        "peak_memory_bytes": end.get("peak_memory_bytes", "") if end else "",
        "exit": (0 if made else end["exit"]) if end else "",
        "recipe": made[-1].get("recipe", "") if made else "",
        "error": said["error"] if said and not made else "",
        "outcome": outcome,
        "log": task.log.relative_to(run.root).as_posix(),
    }


def _state(task: Task, begun: bool, made: bool, outcome: str) -> str:
    """Return the state of an artifact in a job, by the job's events: submitted, running, stopped, made, failed ..."""
    if made:
        return "made"
    if task.ended or outcome:
        return "failed" if begun else "not begun"
    if begun:
        return "stopped" if task.events[-1]["event"] == "stop" else "running"
    return "submitted"
