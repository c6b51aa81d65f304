"""Trackers: the curves of a training in TensorBoard, MLflow or Weights & Biases, point by point while it runs.

Each is a package of its own, an extra, and off by default (``compute.trackers``). All get the same curves: what
``metrics.jsonl`` holds at the end, under the same names, by step. They write below ``RUN/trackers/``; MLflow and W&B
also where their own variables say (MLFLOW_TRACKING_URI, WANDB_MODE; without it offline). A tracker that
fails is named and left out: it never ends a training.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

FOLDER = "trackers"
Record = Mapping[str, float]


@dataclass(frozen=True)
class Tracked:
    """What is trained: the run folder, the artifact's name, its settings, and the id of its fingerprint.

    A training that is resumed has the id that it began with.
    """

    root: Path
    artifact: str
    settings: Mapping[str, Any]
    identity: str

    @property
    def name(self) -> str:
        """A name in which slashes are dashes, such as ``adaptors-k00256-1a2b3c4d``."""
        return f"{self.artifact.replace('/', '-')}-{self.identity}"

    def folder(self, tracker: str) -> Path:
        """Return the folder of a tracker in the run."""
        return self.root / FOLDER / tracker


class Tracker(Protocol):
    """Where the points of curves go."""

    def log(self, step: int, values: Record) -> None: ...

    def close(self) -> None: ...


def identity_of(fingerprint: Mapping[str, Any]) -> str:
    """Return 8 digits that tell trainings with different fingerprints apart."""
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:8]


@contextmanager
def tracked(
    names: Sequence[str], training: Tracked, say: Callable[[str], None]
) -> Iterator[Callable[[Record], None] | None]:
    """Yield what takes a record (with ``step``) of a training's metrics; None without trackers.

    The trackers are opened by the first record, and closed when the block ends.
    """
    if not names:
        yield None
        return
    running: dict[str, Tracker] = {}
    failed: set[str] = set()

    def attempt(name: str, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # noqa: BLE001 (a tracker's package and its server can fail in any way)
            failed.add(name)
            reason = " ".join(str(error).split()) or type(error).__name__
            say(f"warning: {training.artifact} goes on without {name}: {reason[:300]}")

    def log(name: str, record: Record) -> None:
        step, values = int(record["step"]), {key: value for key, value in record.items() if key != "step"}
        if name not in running:
            running[name] = OPENED[name](training, step)
        running[name].log(step, values)

    def recorded(record: Record) -> None:
        for name in names:
            if name not in failed:
                attempt(name, lambda name=name: log(name, record))  # type: ignore[misc]

    try:
        yield recorded
    finally:
        for name, tracker in running.items():
            attempt(name, tracker.close)


class TensorBoard:
    """Events below ``RUN/trackers/tensorboard/``: ``tensorboard --logdir`` shows them while they are written.

    Points that a former process wrote after its last checkpoint are dropped.
    """

    def __init__(self, training: Tracked, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = training.folder("tensorboard") / training.name
        self._writer: Any = SummaryWriter(str(folder), purge_step=step)

    def log(self, step: int, values: Record) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class MLflow:
    """A run of MLflow for each training, in an experiment of the run folder's name; a resumed one goes on there."""

    def __init__(self, training: Tracked, step: int) -> None:
        from mlflow import MlflowClient

        place = training.folder("mlflow")
        if "MLFLOW_TRACKING_URI" not in os.environ:
            place.mkdir(parents=True, exist_ok=True)
        self._client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{place}/mlflow.db"))
        name = training.root.resolve().name
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name, str(place / "artifacts"))
        query = f"tags.identity = '{training.name}'"
        runs = self._client.search_runs([experiment], filter_string=query, max_results=1)
        self._run = runs[0].info.run_id if runs else self._begin(experiment, training)

    def _begin(self, experiment: str, training: Tracked) -> str:
        tags = {"identity": training.name, "artifact": training.artifact}
        run: str = self._client.create_run(experiment, tags=tags, run_name=training.artifact).info.run_id
        for name, value in training.settings.items():
            self._client.log_param(run, name, value)
        return run

    def log(self, step: int, values: Record) -> None:
        for name, value in values.items():
            self._client.log_metric(self._run, name, value, step=step)

    def close(self) -> None:
        self._client.set_terminated(self._run)


class WeightsAndBiases:
    """A run of Weights & Biases for each training; offline, so `wandb sync` sends it when its owner wants that."""

    def __init__(self, training: Tracked, step: int) -> None:
        import wandb

        place = training.folder("wandb")
        place.mkdir(parents=True, exist_ok=True)
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", training.root.resolve().name),
            name=training.artifact,
            id=training.name,
            dir=str(place),
            mode=os.environ.get("WANDB_MODE", "offline"),
            resume="allow",
            reinit="create_new",
            settings=wandb.Settings(silent=True),
            config=dict(training.settings),
        )

    def log(self, step: int, values: Record) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


OPENED: Mapping[str, Callable[[Tracked, int], Tracker]] = {
    "tensorboard": TensorBoard,
    "mlflow": MLflow,
    "wandb": WeightsAndBiases,
}
