"""Long computations of the explorer: a thread each, with progress, asked for by name; results stay in memory."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

Report = Callable[[float], None]


@dataclass
class Job:
    """A computation: how far it is (0 to 1), then its result or the sentence of its error."""

    state: Literal["running", "done", "failed"] = "running"
    progress: float = 0.0
    result: Any = None
    error: str = ""

    def to_json(self) -> dict[str, Any]:
        return {"state": self.state, "progress": round(self.progress, 3), "error": self.error}


class Jobs:
    """Starts each computation once; one that failed may be started again."""

    def __init__(self) -> None:
        self._jobs: dict[str, Job] = {}
        self._lock = threading.Lock()

    def get(self, name: str) -> Job | None:
        with self._lock:
            return self._jobs.get(name)

    def start(self, name: str, compute: Callable[[Report], Any]) -> Job:
        """Start a computation in a thread, unless it runs or has its result; return its job."""
        with self._lock:
            known = self._jobs.get(name)
            if known and known.state != "failed":
                return known
            job = self._jobs[name] = Job()
        threading.Thread(target=_run, args=(job, compute), name=name, daemon=True).start()
        return job


def _run(job: Job, compute: Callable[[Report], Any]) -> None:
    def report(progress: float) -> None:
        job.progress = max(0.0, min(1.0, progress))

    try:
        job.result = compute(report)
        job.progress, job.state = 1.0, "done"
    except Exception as error:  # noqa: BLE001 - whatever it was, the page says it instead of waiting for ever
        job.error, job.state = str(error) or type(error).__name__, "failed"
