"""A board on which the processes of a run post notes for each other, and by which each sees that the others live.

The board is a torch.distributed store, kept by the first process (or by torchrun). A thread of every process renews its
sign of life and looks for a failure of another one; whoever waits or reports progress raises it, and a process that
does neither (it waits inside a collective that will never end) is ended by that thread after a while: no rank hangs.

torchrun and `srun --kill-on-bad-exit=1` also end all processes when one fails, and the next submit resumes: tried on a
Slurm cluster, with and without the signs of life. Without them `grappa status` shows `FAILED 9:0` and no rank, as it
does with them if Slurm's KillWait is as short as BROKEN_SECONDS. So they stay, and jobs do not set the flag: processes
started without such a launcher (RANK and WORLD_SIZE set by hand) would otherwise hang or end without a reason.
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
SILENCE_SECONDS = 120.0  # a process without a sign of life for so long is given up
BROKEN_SECONDS = 5.0  # the same, once a connection between the processes is known to be broken
GRACE_SECONDS = 30.0  # for a process to end in order when another one failed
HEARD_SECONDS = 10.0  # for the others to have read the last note before the board goes

ALIKE = {each.__name__: each for each in (LockedError, Stopped)}  # how one of them ends, all of them end


class ProcessesError(ConnectionError):
    """Another process of this run failed, was stopped or fell silent; the message says which and why."""


@dataclass(frozen=True)
class Failure:
    """Why a process ended, and by which exception; ``error`` is what the others raise."""

    sentence: str
    kind: str = ""

    def error(self) -> Exception:
        """Return the same exception for what befalls all of them (a held lock, a stop), ProcessesError for the rest."""
        kind: type[Exception] = ALIKE.get(self.kind, ProcessesError)
        return kind(self.sentence)


class Board:
    """Notes by key, JSON values. ``check`` and ``read`` raise what ended another process."""

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
        """Put up a note for all."""
        with self._reached():
            self._store.set(key, json.dumps(value))

    def read(self, key: str) -> Any:
        """Return a note as soon as it is up."""
        pause = 0.001
        while not self._is_up(key):
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
        """Tell all why this process ends; the first such note stays."""
        with suppress(RuntimeError):  # no board, no one to tell
            self._post_failure(self.rank, f" on {socket.gethostname()}", reason, kind)

    def broken(self, error: Exception) -> Exception:
        """Return the reason behind a broken connection: the note of the process that failed, or who fell silent."""
        self._silence = BROKEN_SECONDS
        if not self._known.wait(3 * BROKEN_SECONDS):
            self.fail(str(error))
        return self._failure.error() if self._failure else ProcessesError(str(error))

    def close(self) -> None:
        """End the watch; the first process, with which the board may go, first lets the others read a failure."""
        with suppress(RuntimeError):
            if self.rank == 0 and self._store.check(["failed"]):
                self._wait_until_heard()
        self._closed.set()
        self._thread.join(HEARD_SECONDS)  # a thread inside torch when the interpreter ends would abort the process

    def _wait_until_heard(self) -> None:
        end = time.monotonic() + HEARD_SECONDS
        keys = [f"heard/{other}" for other in range(1, self.size) if other not in self._lost]
        while time.monotonic() < end and not self._store.check(keys):
            time.sleep(0.05)

    def _is_up(self, key: str) -> bool:
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
        """Give a sign of life, look for those of others; return what ended one, or None."""
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
