"""Starting several processes as torchrun does, never by fork, each with a time limit; run as a script, one of them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
SECONDS = 300.0


@dataclass(frozen=True)
class Ended:
    """How one process ended: its exit code (-9: killed) and all that it printed."""

    code: int
    text: str


def start(size: int, *arguments: str) -> list[Ended]:
    """Run ``python ARGUMENTS`` as ``size`` processes of one run; whoever is left after five minutes is killed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    running = []
    for rank in range(size):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        environment = {**os.environ, **address, **{name: str(value) for name, value in place.items()}}
        command = [sys.executable, *arguments]
        running.append(
            subprocess.Popen(
                command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
        )
    end = time.monotonic() + SECONDS
    try:
        texts = [process.communicate(timeout=max(0.1, end - time.monotonic()))[0] for process in running]
    finally:
        for process in running:
            process.kill()
    return [Ended(process.returncode, text) for process, text in zip(running, texts, strict=True)]
