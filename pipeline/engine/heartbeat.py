"""Values that the processes of a run share, and signs of life by which they notice that a process has failed.

The values lie in a torch.distributed store, which the first process (or torchrun) serves. In every process a thread
renews the process's sign of life and looks for failures of other processes. A process that waits for a value or reports
progress raises such a failure. A process that does neither (it waits inside a collective that will never end) is ended
by its thread after a while. So no rank hangs.

torchrun and `srun --kill-on-bad-exit=1` also end all processes when one fails, and the next submission resumes the
work: this was tried on a Slurm cluster, with and without the signs of life. Without them `grappa status` shows
`FAILED 9:0` and names no rank; with them it shows the same if Slurm's KillWait is as short as BROKEN_SECONDS. So the
signs of life stay, and jobs do not set the flag. Processes that were started without such a launcher (RANK and
WORLD_SIZE set by hand) would otherwise hang, or end without a reason.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any

from grappa.pipeline.store.checkpoints import Stopped
from grappa.pipeline.store.locks import LockedError

BEAT_SECONDS = 1.0
SILENCE_SECONDS = 120.0  # a process without a sign of life for so long counts as failed
BROKEN_SECONDS = 5.0  # the same limit, once a connection between the processes is known to be broken
GRACE_SECONDS = 30.0  # the time a process has to end in order after another process failed
HEARD_SECONDS = 10.0  # the time the other processes have to read a failure before the first process closes the store

# Exceptions that concern the whole run: when one process ends with one of them, all processes raise the same one.
SHARED_ERRORS = {each.__name__: each for each in (LockedError, Stopped)}


class ProcessesError(ConnectionError):
    """Another process of this run failed, was stopped or gave no sign of life; the message says which one and why."""


@dataclass(frozen=True)
class Failure:
    """Why a process ended: a sentence, and ``kind``, the name of its exception, or ""."""

    sentence: str
    kind: str = ""

    def error(self) -> Exception:
        """Return the exception that the other processes raise: one of ``SHARED_ERRORS``, else ProcessesError."""
        kind: type[Exception] = SHARED_ERRORS.get(self.kind, ProcessesError)
        return kind(self.sentence)


class WatchedStore:
    """JSON values by key that all processes see. ``check`` and ``read`` raise the failure of another process."""

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self._store, self._silence = store, SILENCE_SECONDS
        self._failure: Failure | None = None
        self._lost: set[int] = set()
        self._closed, self._known = threading.Event(), threading.Event()
        now = time.monotonic()
        self._seen = dict.fromkeys(range(1, size) if rank == 0 else (0,), (b"", now))
        self._thread = threading.Thread(target=self._watch, name="signs of life", daemon=True)
        self._thread.start()

    def post(self, key: str, value: object) -> None:
        """Set a value that all processes can read."""
        with self._reached():
            self._store.set(key, json.dumps(value))

    def read(self, key: str) -> Any:
        """Return a value; wait until a process has posted it."""
        pause = 0.001
        while not self._is_posted(key):
            self.check()
            time.sleep(pause)
            pause = min(2 * pause, 0.2)
        with self._reached():
            return json.loads(self._store.get(key))

    def check(self) -> None:
        """Raise ProcessesError (or LockedError, Stopped) when another process failed."""
        if self._failure:
            raise self._failure.error()

    def fail(self, reason: str, kind: str = "") -> None:
        """Post why this process ends, for all processes to read; the first failure that is posted stays."""
        with suppress(RuntimeError):  # the store is gone, and with it every reader
            self._post_failure(self.rank, f" on {socket.gethostname()}", reason, kind)

    def broken(self, error: Exception) -> Exception:
        """Return the reason of a broken connection: the failure that a process posted, or which one shows no life."""
        self._silence = BROKEN_SECONDS
        if not self._known.wait(3 * BROKEN_SECONDS):
            self.fail(str(error))
        return self._failure.error() if self._failure else ProcessesError(str(error))

    def close(self) -> None:
        """End the watch; the first process, which may serve the store, first lets the others read a failure."""
        with suppress(RuntimeError):
            if self.rank == 0 and self._store.check(["failed"]):
                self._wait_until_heard()
        self._closed.set()
        self._thread.join(HEARD_SECONDS)  # a thread that is inside torch when the interpreter ends aborts the process

    def _wait_until_heard(self) -> None:
        end = time.monotonic() + HEARD_SECONDS
        keys = [f"heard/{other}" for other in range(1, self.size) if other not in self._lost]
        while time.monotonic() < end and not self._store.check(keys):
            time.sleep(0.05)

    def _is_posted(self, key: str) -> bool:
        with self._reached():
            return bool(self._store.check([key]))

    @contextmanager
    def _reached(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise (self._failure or self._unreachable()).error() from error

    def _unreachable(self) -> Failure:
        return Failure(f"rank 0 of {self.size} has ended or cannot be reached")

    def _post_failure(self, rank: int, where: str, reason: str, kind: str = "") -> None:
        failure = Failure(f"rank {rank} of {self.size}{where}: {reason}", kind)
        self._store.compare_set("failed", "", json.dumps(asdict(failure)))

    # ---------------------------------------------------------------- the watching thread

    def _watch(self) -> None:
        number = 0
        while not self._closed.wait(BEAT_SECONDS):
            number += 1
            try:
                self._failure = self._look(number)
            except RuntimeError:
                self._failure = self._unreachable()
            if self._failure:
                self._known.set()
                self._insist(self._failure)
                return

    def _look(self, number: int) -> Failure | None:
        """Give a sign of life and look for those of the other processes; return the failure of a process, or None."""
        self._store.set(f"alive/{self.rank}", str(number))
        if not self._store.check(["failed"]):
            for other in self._silent_ones():
                self._lost.add(other)
                self._post_failure(other, "", f"no sign of life for {self._silence:.0f} s")
        if not self._store.check(["failed"]):
            return None
        self._store.set(f"heard/{self.rank}", "1")
        return Failure(**json.loads(self._store.get("failed")))

    def _silent_ones(self) -> Iterator[int]:
        for other, (before, since) in self._seen.items():
            key = f"alive/{other}"
            sign = self._store.get(key) if self._store.check([key]) else b""
            if sign != before:
                self._seen[other] = (sign, time.monotonic())
            elif time.monotonic() - since > self._silence:
                yield other

    def _insist(self, failure: Failure) -> None:
        if not self._closed.wait(GRACE_SECONDS):
            print(f"grappa: {failure.sentence}", file=sys.stderr, flush=True)
            os._exit(1)
