"""Peak memory of a piece of work: in a process of its own, above what the process held before."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_growth(prepare: Callable[..., Callable[[], object]], *arguments: Any) -> float:
    """Return the bytes by which the resident memory of a fresh process grows at most during ``prepare(...)()``.

    ``prepare`` is a function of a module (it is started in a spawned process); what it allocates does not count.
    """
    return cost(prepare, *arguments)[1]


def cost(prepare: Callable[..., Callable[[], object]], *arguments: Any) -> tuple[float, float]:
    """Return the CPU seconds that the work takes in a fresh process, and what ``peak_growth`` does."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(sender, prepare, arguments))
    process.start()
    sender.close()
    try:
        seconds, size = receiver.recv()
        return float(seconds), float(size)
    finally:
        process.join()


def _measure(sender: Connection, prepare: Callable[..., Callable[[], object]], arguments: tuple[Any, ...]) -> None:
    work = prepare(*arguments)
    _give_back_free_memory()
    CLEAR.write_text("5")  # the peak starts anew at what is resident now
    before, start = _status("VmRSS"), time.process_time()
    work()
    sender.send((time.process_time() - start, _status("VmHWM") - before))


def _give_back_free_memory() -> None:
    """Let the C library return what ``prepare`` has freed; else the work may take that instead of growing."""
    gc.collect()
    with suppress(OSError, AttributeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)


def _status(name: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


@dataclass(frozen=True)
class Cost:
    """What a piece of work took: seconds of wall clock and of CPU, bytes of resident memory of the process at most
    (mapped files count, which the page cache can take back), and of these without files, seen ten times a second."""

    wall_seconds: float
    cpu_seconds: float
    peak_bytes: int
    own_bytes: int


def measured(work: Callable[[], object]) -> Cost:
    """Do a piece of work in this process, and return what it took."""
    _give_back_free_memory()
    CLEAR.write_text("5")
    ended, seen = threading.Event(), [_status("RssAnon")]

    def watch() -> None:
        while not ended.wait(0.1):
            seen.append(max(seen.pop(), _status("RssAnon")))

    watcher = threading.Thread(target=watch)
    watcher.start()
    start, cpu = time.monotonic(), time.process_time()
    try:
        work()
    finally:
        wall, cpu = time.monotonic() - start, time.process_time() - cpu
        ended.set()
        watcher.join()
    return Cost(wall, cpu, _status("VmHWM"), seen[0])
