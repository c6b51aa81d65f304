"""Naming, merging and splitting the clusters of a run: one explorer at a time may, and writes every change at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from grappa.pipeline.store.artifacts import RunFolder
from grappa.pipeline.store.edits import Edits, clustering_of, passed_over, read_edits, write_edits
from grappa.pipeline.store.locks import LockedError, LockLostError, acquire
from grappa.pipeline.store.storage import StorageError

LOCK_FILE = "explore.lock"
MAX_UNDO = 100


class ReadOnlyError(ValueError):
    """Clusters cannot be edited here; the message says why in a sentence."""


class Editor:
    """The edits of a run; ``reason``: why they cannot be changed, or "". Close it to let another explorer edit."""

    def __init__(self, run: RunFolder, granularities: Sequence[str]) -> None:
        self._run, self._mutex, self._stack = run, threading.Lock(), ExitStack()
        known = read_edits(run)
        empty = {name: Edits(granularity=name, assignments=clustering_of(run, name)) for name in granularities}
        self._edits = empty | {name: each for name, each in known.items() if name in empty}
        self._undo: list[tuple[str, Edits]] = []
        self.passed_over = passed_over(run)
        self.reason = ""
        try:
            self._file_lock = self._stack.enter_context(acquire(run.root / LOCK_FILE, what="the names of clusters"))
        except LockedError as error:
            holder = str(error).removeprefix("the names of clusters is being written by ").partition(" (last sign")[0]
            self.reason = f"another explorer has this run open ({holder}): clusters cannot be edited here"
        except StorageError as error:
            self.reason = f"clusters cannot be edited: {error}"

    def close(self) -> None:
        self._stack.close()

    def edits(self, granularity: str) -> Edits:
        """Return the edits of a granularity, empty ones where there are none."""
        return self._edits[granularity]

    @property
    def can_undo(self) -> bool:
        return bool(self._undo)

    def change(self, granularity: str, make: Callable[[Edits], Edits]) -> None:
        """Change the edits of a granularity and write them; ReadOnlyError where this explorer may not."""
        with self._mutex:
            before = self.edits(granularity)
            self._write(make(before))
            self._undo = [*self._undo[-MAX_UNDO:], (granularity, before)]

    def undo(self) -> str | None:
        """Take the last change of this explorer back; return its granularity, or None where there is nothing."""
        with self._mutex:
            if not self._undo:
                return None
            granularity, before = self._undo[-1]
            self._write(before)
            self._undo.pop()
            return granularity

    def _write(self, edits: Edits) -> None:
        if self.reason:
            raise ReadOnlyError(self.reason)
        try:
            self._file_lock.check()
        except LockLostError:
            self.reason = f"another process took {LOCK_FILE} over: clusters cannot be edited here any more"
            raise ReadOnlyError(self.reason) from None
        present = clustering_of(self._run, edits.granularity)
        if edits.assignments != present:
            raise ReadOnlyError(
                f"{edits.granularity} was clustered again; start the explorer again to edit its clusters"
            )
        write_edits(self._run, {edits.granularity: edits})
        self._edits[edits.granularity] = edits
