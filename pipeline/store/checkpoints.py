"""Checkpoints of unfinished work in its partial folder: tensors as safetensors, the rest as JSON, never a pickle."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grappa.pipeline.store.storage import atomic_write_bytes, atomic_write_json

if TYPE_CHECKING:
    from torch import Tensor

    from grappa.core.distributed import Processes

TENSORS_FILE, RECORD_FILE = "checkpoint.safetensors", "checkpoint.json"
_stop = threading.Event()


class Stopped(Exception):
    """A stage was asked to stop and has saved its state; the same call resumes it."""


def request_stop() -> None:
    """Ask the stage that this process runs to save its state at the next step, then to raise Stopped.

    A signal handler may call this. A stage without checkpoints runs to its end.
    """
    _stop.set()


def withdraw_stop() -> None:
    """Withdraw the request to stop, so that the next stage of this process runs."""
    _stop.clear()


def refuse_if_stopped() -> None:
    """Raise Stopped if a stop was requested; to be called where no work would be lost."""
    if _stop.is_set():
        raise Stopped


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file whole or not at all; a full disk is an OSError (the writer of safetensors hides it)."""
    from safetensors.torch import save

    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    atomic_write_bytes(path, save(plain, dict(metadata) if metadata else None))


class FileCheckpoint:
    """Saves the newest state of a training in a folder; a checkpoint is due every ``seconds``.

    The record lies in the metadata of the safetensors file, so that one rename publishes tensors and record.
    """

    def __init__(self, folder: Path, *, seconds: float) -> None:
        self._path, self._seconds, self._last = folder / TENSORS_FILE, seconds, time.monotonic()

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return the tensors and the record that were saved last, or None when there are none."""
        from safetensors import safe_open

        if not self._path.exists():
            return None
        with safe_open(self._path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            return tensors, json.loads(file.metadata()["record"])

    def steps_done(self) -> int:
        """Return the step of the saved state, 0 when there is none; no tensor is read."""
        from safetensors import safe_open

        if not self._path.exists():
            return 0
        with safe_open(self._path, "pt") as file:
            return int(json.loads(file.metadata()["record"])["step"])

    def due(self) -> bool:
        """Tell whether the interval since the last checkpoint has passed, or a stop was requested."""
        return _stop.is_set() or time.monotonic() - self._last >= self._seconds

    def save(self, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Replace the checkpoint, whole or not at all; then raise Stopped if a stop was requested."""
        write_tensors(self._path, tensors, {"record": json.dumps(record)})
        self._last = time.monotonic()
        refuse_if_stopped()


class SharedCheckpoint:
    """The leader's checkpoint for all processes of a team: all resume from it, only the leader saves it.

    The state of a training is the same in all processes, so no states have to be merged.
    """

    def __init__(self, file: FileCheckpoint, processes: Processes) -> None:
        self._file, self._processes = file, processes

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return the tensors and the record that the leader saved last, or None when there are none."""
        from safetensors.torch import load

        loaded = self._file.load() if self._processes.leads else None
        data = self._processes.broadcast(b"" if loaded is None else _packed(*loaded))
        if not data:
            return None
        tensors = load(data)
        return tensors, json.loads(tensors.pop(RECORD_FILE).numpy().tobytes())

    def due(self) -> bool:
        """Tell whether this process is the leader and must save a checkpoint now."""
        return self._processes.leads and self._file.due()

    def save(self, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Replace the checkpoint, as the leader."""
        self._file.save(tensors, record)


def _packed(tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> bytes:
    import torch
    from safetensors.torch import save

    text = torch.frombuffer(bytearray(json.dumps(record).encode()), dtype=torch.uint8)
    return save({**tensors, RECORD_FILE: text})


class RowCheckpoint:
    """Saves how many rows of a memory-mapped array are on disk, every ``seconds``."""

    def __init__(self, folder: Path, *, seconds: float) -> None:
        self._path, self._seconds, self._last = folder / RECORD_FILE, seconds, time.monotonic()

    def load(self) -> int:
        """Return the number of rows on disk, 0 without a checkpoint."""
        return int(json.loads(self._path.read_text())["rows"]) if self._path.exists() else 0

    def offer(self, num_rows: int, flush: Callable[[], None]) -> None:
        """Call ``flush`` and save ``num_rows`` when that is due or a stop was requested; a stop then raises Stopped."""
        if _stop.is_set() or time.monotonic() - self._last >= self._seconds:
            flush()
            atomic_write_json(self._path, {"rows": num_rows})
            self._last = time.monotonic()
            refuse_if_stopped()
