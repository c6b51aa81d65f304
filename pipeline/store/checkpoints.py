"""Checkpoints of unfinished work in its partial folder: tensors as safetensors, the rest as JSON, never a pickle.

Each of them holds a digest of what it claims, and loading compares it: UntrustedError where the work is damaged.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grappa.core.atomic import write_whole
from grappa.core.notes import UntrustedError, check_claim, claim, read_note, write_note
from grappa.pipeline.store.storage import atomic_write_pieces, storage_errors

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from grappa.core.distributed import Processes, Sharded

TENSORS_FILE, RECORD_FILE = "checkpoint.safetensors", "checkpoint.json"
BLOCK_ROWS = 4096
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


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor | Sharded], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file whole or not at all; a full disk is an OSError (the writer of safetensors hides it).

    The bytes are those of safetensors' own `save`, which would hold them twice beside the tensors. What several
    processes hold in parts is never held whole.
    """
    atomic_write_pieces(path, _pieces(tensors, metadata))


def _pieces(
    tensors: Mapping[str, Tensor | Sharded], metadata: Mapping[str, str] | None = None
) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a safetensors file."""
    header = _header(tensors, metadata)
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in header:
        if name in tensors:
            yield from _values(tensors[name])


def _header(tensors: Mapping[str, Tensor | Sharded], metadata: Mapping[str, str] | None) -> dict[str, Any]:
    """Return what the file says of its tensors, in their order: safetensors' own header of empty ones, with sizes."""
    import torch
    from safetensors.torch import save

    empty = {name: torch.empty(0, dtype=value.dtype) for name, value in tensors.items()}
    whole = save(empty, dict(metadata) if metadata else None)
    header: dict[str, Any] = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])
    end = 0
    for name in [each for each in header if each in tensors]:
        start, end = end, end + math.prod(tensors[name].shape) * tensors[name].dtype.itemsize
        header[name].update(shape=list(tensors[name].shape), data_offsets=[start, end])
    return header


def _values(tensor: Tensor | Sharded) -> Iterator[memoryview]:
    """Yield the bytes of a tensor; of one that is held in parts, in blocks and to the first process only."""
    import torch

    for block in (tensor,) if isinstance(tensor, torch.Tensor) else tensor.blocks():
        yield block.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _digest(tensors: Mapping[str, Tensor | Sharded], record: str) -> str:
    """Return the sha256 of a record and of the names, types, shapes and values of tensors."""

    digest = hashlib.sha256(record.encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"\0{name} {value.dtype} {tuple(value.shape)}\0".encode())
        for piece in _values(value):
            digest.update(piece)
    return digest.hexdigest()


class FileCheckpoint:
    """Saves the newest state of a training in a folder; a checkpoint is due every ``seconds``.

    The record and the digest lie in the metadata of the safetensors file, so that one rename publishes everything.
    """

    def __init__(self, folder: Path, *, seconds: float) -> None:
        self.path, self._seconds, self._last = folder / TENSORS_FILE, seconds, time.monotonic()

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return the tensors and the record that were saved last, or None when there are none."""
        from safetensors import SafetensorError, safe_open

        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
                record, digest = (file.metadata()[name] for name in ("record", "sha256"))
        except (SafetensorError, OSError, KeyError, TypeError):
            raise UntrustedError(f"{self.path.name} is damaged") from None
        if digest != _digest(tensors, record):
            raise UntrustedError(f"{self.path.name} has other bytes than were saved")
        return tensors, json.loads(record)

    def steps_done(self) -> int:
        """Return the step of the saved state, 0 when there is none."""
        loaded = self.load()
        return int(loaded[1]["step"]) if loaded else 0

    def due(self) -> bool:
        """Tell whether the interval since the last checkpoint has passed, or a stop was requested."""
        return _stop.is_set() or time.monotonic() - self._last >= self._seconds

    def save(self, tensors: Mapping[str, Tensor | Sharded], record: Mapping[str, Any]) -> None:
        """Replace the checkpoint, whole or not at all; then raise Stopped if a stop was requested."""
        text = json.dumps(record)
        write_tensors(self.path, tensors, {"record": text, "sha256": _digest(tensors, text)})
        self._last = time.monotonic()
        refuse_if_stopped()

    @staticmethod
    def give(tensors: Mapping[str, Tensor | Sharded]) -> None:
        """Take part in the ``save`` of another process, which goes twice through what is held in parts: first comes the
        digest, then the values."""
        import torch

        parts = {name: value for name, value in tensors.items() if not isinstance(value, torch.Tensor)}
        _digest(parts, "")
        deque(_pieces(parts), maxlen=0)


class SharedCheckpoint:
    """The leader's checkpoint for all processes of a team: all resume from it, only the leader writes it.

    The file is that of a single process: what the processes hold in parts passes through the leader, in blocks. So any
    number of processes goes on from it.
    """

    def __init__(self, file: FileCheckpoint, processes: Processes) -> None:
        self._file, self._processes = file, processes

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return the tensors and the record that the leader saved last, or None when there are none."""
        loaded = self._file.load() if self._processes.leads else None
        told = self._processes.broadcast(b"" if loaded is None else json.dumps(loaded[1]).encode())
        if not told or self._processes.leads:
            return loaded
        found = self._file.load()
        if found is None or found[1] != json.loads(told):
            raise ValueError(
                f"{self._file.path} is not the checkpoint that the first process reads; "
                "give all processes one run folder on a file system that they share"
            )
        return found

    def due(self) -> bool:
        """Tell, in all processes, whether the leader's checkpoint is due."""
        return bool(self._processes.broadcast(b"due" if self._processes.leads and self._file.due() else b""))

    def save(self, tensors: Mapping[str, Tensor | Sharded], record: Mapping[str, Any]) -> None:
        """Replace the checkpoint; the leader writes, the others give it what they hold of tensors in parts."""
        if self._processes.leads:
            self._file.save(tensors, record)
        else:
            self._file.give(tensors)


class RowCheckpoint:
    """Saves how many rows of a memory-mapped array are on disk, with their digest, every ``seconds``."""

    def __init__(self, folder: Path, *, seconds: float) -> None:
        self.path, self._seconds, self._last = folder / RECORD_FILE, seconds, time.monotonic()
        self._num_rows, self._digest = 0, hashlib.sha256()

    def load(self, array: Path, shape: tuple[int, ...]) -> int:
        """Return the number of rows of a float32 array file that are on disk as they were saved; 0 where none are."""
        import numpy as np

        note = read_note(self.path)
        if note is None:
            return 0
        try:
            found = np.load(array, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError):
            raise UntrustedError(f"{array.name} is missing, cut off or damaged") from None
        if found.shape != shape or found.dtype != np.float32 or note["rows"] > len(found):
            raise UntrustedError(f"{array.name} is {found.dtype} {found.shape}, expected float32 {shape}")
        self._add(found, note["rows"])
        if self._digest.hexdigest() != note["sha256"]:
            self._num_rows, self._digest = 0, hashlib.sha256()
            raise UntrustedError(f"{array.name} has other bytes than were saved")
        return self._num_rows

    def offer(self, num_rows: int, out: np.memmap[Any, Any]) -> None:
        """Flush ``out`` and save ``num_rows`` when that is due or a stop was requested; a stop then raises Stopped."""
        if _stop.is_set() or time.monotonic() - self._last >= self._seconds:
            out.flush()
            self._add(out, num_rows)
            with storage_errors(self.path):
                write_note(self.path, {"rows": num_rows, "sha256": self._digest.hexdigest()})
            self._last = time.monotonic()
            refuse_if_stopped()

    def _add(self, array: NDArray[Any], num_rows: int) -> None:
        """Bring the digest up to the first ``num_rows`` rows."""
        for start in range(self._num_rows, num_rows, BLOCK_ROWS):
            self._digest.update(array[start : min(start + BLOCK_ROWS, num_rows)].tobytes())
        self._num_rows = num_rows


class ArrayCheckpoint:
    """An array that is saved as soon as it is known, so that a later try need not compute it again."""

    def __init__(self, file: Path) -> None:
        self._file, self.path = file, file.with_suffix(".json")

    def load(self) -> NDArray[Any] | None:
        """Return the array that was saved, or None when there is none."""
        import numpy as np

        note = read_note(self.path)
        if note is None:
            return None
        check_claim(self._file, note["array"])
        array: NDArray[Any] = np.load(self._file, allow_pickle=False)
        return array

    def save(self, array: NDArray[Any]) -> None:
        """Write the array, then the note of it."""
        import numpy as np

        with storage_errors(self._file):
            write_whole(self._file, lambda file: np.save(file, array, allow_pickle=False))
            write_note(self.path, {"array": claim(self._file)})
