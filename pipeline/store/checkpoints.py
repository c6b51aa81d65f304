"""Checkpoints of unfinished work in its partial folder: tensors as safetensors, the rest as JSON, never a pickle.

Each of them holds a digest of what it claims, and loading compares it: UntrustedError where the work is damaged.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grappa.core.atomic import write_whole
from grappa.core.notes import UntrustedError, check_claim, claim, read_note, write_note
from grappa.pipeline.store.storage import atomic_write_pieces, storage_errors

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from grappa.core.distributed import Processes

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


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file whole or not at all; a full disk is an OSError (the writer of safetensors hides it).

    The bytes are those of safetensors' own `save`, which would hold them twice beside the tensors.
    """
    plain = _plain(tensors)
    header = _header(plain, metadata)
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    names = [name for name in header if name in plain]
    atomic_write_pieces(path, [len(text).to_bytes(8, "little"), text, *(_bytes(plain[name]) for name in names)])


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None) -> dict[str, Any]:
    """Return what the file says of its tensors, in their order: safetensors' own header of empty ones, with sizes."""
    from safetensors.torch import save

    whole = save({name: value.new_empty(0) for name, value in tensors.items()}, dict(metadata) if metadata else None)
    header: dict[str, Any] = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])
    end = 0
    for name in [each for each in header if each in tensors]:
        start, end = end, end + tensors[name].nbytes
        header[name].update(shape=list(tensors[name].shape), data_offsets=[start, end])
    return header


def _bytes(tensor: Tensor) -> memoryview:
    import torch

    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous() for name, value in tensors.items()}


def _digest(tensors: Mapping[str, Tensor], record: str) -> str:
    """Return the sha256 of a record and of the names, types, shapes and values of tensors on the CPU."""

    digest = hashlib.sha256(record.encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"\0{name} {value.dtype} {tuple(value.shape)}\0".encode())
        digest.update(_bytes(value))
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

    def save(self, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Replace the checkpoint, whole or not at all; then raise Stopped if a stop was requested."""
        plain, text = _plain(tensors), json.dumps(record)
        write_tensors(self.path, plain, {"record": text, "sha256": _digest(plain, text)})
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
