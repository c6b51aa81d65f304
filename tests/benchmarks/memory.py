"""Peak memory of a piece of work: in a process of its own, above what the process held before."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_growth(prepare: Callable[..., Callable[[], object]], *arguments: Any) -> float:
    """Return the bytes by which the resident memory of a fresh process grows at most during ``prepare(...)()``.

    ``prepare`` is a function of a module (it is started in a spawned process); what it allocates does not count.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(sender, prepare, arguments))
    process.start()
    sender.close()
    try:
        return float(receiver.recv())
    finally:
        process.join()


def _measure(sender: Connection, prepare: Callable[..., Callable[[], object]], arguments: tuple[Any, ...]) -> None:
    work = prepare(*arguments)
    CLEAR.write_text("5")  # the peak starts anew at what is resident now
    before = _status("VmRSS")
    work()
    sender.send(_status("VmHWM") - before)


def _status(name: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024
