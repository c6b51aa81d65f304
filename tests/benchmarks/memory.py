"""Peak memory of a piece of work: in a process of its own, above what the process held before."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import time
from collections.abc import Callable
from contextlib import suppress
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
