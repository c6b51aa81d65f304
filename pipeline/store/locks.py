"""Lock files, so that one process at a time writes an artifact; a process that died loses its lock.

The lock file appears whole (it is a hard link of a finished draft: atomic, also between hosts), and its content does
not change while the lock is held. A heartbeat renews its modification time, which needs no disk space. The time since
the last heartbeat is measured against the modification time of a file just written to the same folder, so the clocks
of hosts need not agree. Where a file system takes the times from the hosts, a time stamp may lie in the future: whoever
finds it sets it to the present, and a living holder sets it again.

A process that slept for too long finds its lock taken over when it wakes up. The lock alone cannot stop its next step:
therefore the holder's ``token`` is a part of the name of the folder that it publishes by rename (``store.work``).
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

from grappa.pipeline.store.storage import storage_errors

HEARTBEAT_SECONDS = 10.0
SILENCE_SECONDS = 120.0


class LockedError(RuntimeError):
    """A living process holds the lock; the message says which process and since when."""


class LockLostError(RuntimeError):
    """This process has lost its lock: it gave no heartbeat for too long, and another process took the lock over."""


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock, with the facts that show whether it still lives."""

    token: str
    host: str
    pid_namespace: str
    pid: int
    process_start: str
    job: str | None
    since: str

    def __str__(self) -> str:
        job = f" (Slurm job {self.job})" if self.job else ""
        return f"process {self.pid} on {self.host}{job} since {self.since}"


@dataclass(frozen=True)
class _Found:
    """A lock file as it was read: bytes, modification time, holder (None when the bytes cannot be parsed)."""

    raw: bytes
    touched: float
    holder: Holder | None


class Lock:
    """A lock that this process holds; a daemon thread renews it until `release`. Also a context manager."""

    def __init__(self, path: Path, raw: bytes) -> None:
        self._path, self._raw, self._pid = path, raw, os.getpid()
        self.token = str(json.loads(raw)["token"])
        self._stop = threading.Event()
        threading.Thread(target=self._beat, name=f"heartbeat {path.name}", daemon=True).start()

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            with suppress(OSError):  # the file system may fail for a moment: the next beat may succeed
                if not self.is_held():
                    return
                os.utime(self._path)

    def is_held(self) -> bool:
        """Tell whether this process still holds the lock."""
        found = _read(self._path)
        return found is not None and found.raw == self._raw

    def check(self) -> None:
        """Raise LockLostError when another process took the lock over."""
        if not self.is_held():
            raise self.lost()

    def lost(self) -> LockLostError:
        """Return the error of a process that has lost this lock."""
        return LockLostError(
            f"The lock {self._path} was taken over or removed while this process was silent; nothing was published."
        )

    def release(self) -> None:
        """Remove the lock file; nothing happens in a forked child, or where the lock is lost or released already."""
        self._stop.set()
        with suppress(OSError):  # if the file cannot be removed, the next writer takes it over after this process
            if os.getpid() == self._pid and self.is_held():
                self._remove()

    def _remove(self) -> None:
        """Take the file away, and put it back if it is the lock of the next holder: this process may have slept."""
        away = self._path.with_name(f"{self._path.name}.{self.token}.tmp")
        os.rename(self._path, away)
        try:
            if away.read_bytes() != self._raw:
                os.link(away, self._path)
        finally:
            away.unlink()

    def __enter__(self) -> Lock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def acquire(path: Path, *, what: str, job: str | None = None) -> Lock:
    """Take the lock file `path` for `what` (named in errors), also from a dead holder.

    Raises LockedError when a living process holds it, StorageError when the folder cannot be written.
    """
    raw = json.dumps(asdict(_myself(job))).encode()
    draft = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    with storage_errors(path.parent):
        try:
            draft.write_bytes(raw)
            while not _claim(path, draft, raw, what, job):
                pass
            _sweep(path, path.stat().st_mtime)
        finally:
            with suppress(OSError):
                draft.unlink(missing_ok=True)
    return Lock(path, raw)


def read_holder(path: Path) -> Holder | None:
    """Return the process that holds the lock file now, alive or dead; None when there is no holder."""
    found = _read(path)
    return found.holder if found else None


def _claim(path: Path, draft: Path, raw: bytes, what: str, job: str | None) -> bool:
    """Try once: True when this process has the lock, False to try again, LockedError when a living process has it."""
    try:
        os.link(draft, path)
        return True
    except FileExistsError:
        found = _read(path)
    if found is None:
        return False
    if found.raw == raw:  # a network file system may repeat a link that succeeded
        return True
    silence = _now(draft) - found.touched
    if silence < -HEARTBEAT_SECONDS:  # by the clock of a host that is ahead: its silence counts from now on
        with suppress(OSError):
            os.utime(path)
    if not _is_dead(found.holder, silence):
        raise LockedError(_refusal(what, found.holder, silence))
    return _take_over(path, draft, found.raw, what, job)


def _take_over(path: Path, draft: Path, dead: bytes, what: str, job: str | None) -> bool:
    """Replace the lock of a dead holder.

    A second lock protects this step: of several processes that try, only the first one finds the dead lock unchanged.
    """
    with acquire(path.with_name(path.name + ".take"), what=what, job=job):
        found = _read(path)
        if found is None or found.raw != dead:
            return False
        os.replace(draft, path)
        return True


def _now(draft: Path) -> float:
    """Return the time by the clock of the folder's file system, in seconds."""
    os.utime(draft)
    return draft.stat().st_mtime


def remains(path: Path) -> bool:
    """Tell whether there is a lock, held or left by a dead process, or a draft of one."""
    return path.parent.exists() and any(path.parent.glob(f"{path.name}*"))


def _sweep(path: Path, now: float) -> None:
    """Remove the drafts that dead processes left beside the lock; nobody else gives a file the name of a draft."""
    for entry in path.parent.glob(f"{path.name}.*"):
        with suppress(OSError):
            found = _read(entry)
            silence = now - found.touched if found else 0.0
            own_name = entry.suffix == ".tmp"
            if found and (_is_dead(found.holder, silence) if own_name else silence > SILENCE_SECONDS):
                entry.unlink()


def _refusal(what: str, holder: Holder | None, silence: float) -> str:
    who = holder or "an unknown process"
    return (
        f"{what} is being written by {who} (last sign of life {max(silence, 0):.0f} s ago); wait until it has finished "
        f"or end it (on another host a dead one is replaced after {SILENCE_SECONDS:.0f} s of silence)."
    )


def _read(path: Path) -> _Found | None:
    try:
        with path.open("rb") as file:
            raw, touched = file.read(), os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return None
    return _Found(raw, touched, _parse(raw))


def _parse(raw: bytes) -> Holder | None:
    try:
        holder = Holder(**json.loads(raw))
    except (ValueError, TypeError):
        return None
    return holder if isinstance(holder.pid, int) and holder.pid > 0 else None


def _myself(job: str | None) -> Holder:
    since = datetime.now(UTC).isoformat(timespec="seconds")
    pid = os.getpid()
    start = _process_start(pid) or ""
    return Holder(secrets.token_hex(8), socket.gethostname(), _pid_namespace(), pid, start, job, since)


def _is_dead(holder: Holder | None, silence: float) -> bool:
    """Tell whether a holder is dead: on its own host by its process number, on other hosts by ``silence`` (seconds)."""
    here = (socket.gethostname(), _pid_namespace())
    if holder is None or (holder.host, holder.pid_namespace) != here:
        return silence > SILENCE_SECONDS
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    start = _process_start(holder.pid)
    return start is not None and start != holder.process_start


def _process_start(pid: int) -> str | None:
    """Return the boot id and clock tick of a process's start; "" for a zombie, None where /proc does not say it."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return "" if fields[0] in "ZX" else f"{boot}:{fields[19]}"
    except (OSError, IndexError):
        return None


def _pid_namespace() -> str:
    """Return the namespace of process numbers: containers may have the host's name but count processes separately."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
