"""R13: what the command line costs before it does anything."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.benchmarks.core import Gate, Options, Pair, Side
from tests.helpers import tiny

IMPORTS = [sys.executable, "-c", "import pydantic, typer, rich"]
GRAPPA = [sys.executable, "-m", "grappa"]


def _side(command: list[str], compiled: str) -> Side:
    """CPU seconds of a process whose modules, as those of an installed package, are compiled already."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = compiled

    def spent() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True, capture_output=True, env=environment)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    return spent


def _pair(folder: str, *arguments: str) -> Pair:
    setup = "python -c 'import pydantic, typer, rich'; CPU time of both as processes, started in turn"
    compiled = f"{folder}/compiled"
    return Pair(_side([*GRAPPA, *arguments], compiled), _side(IMPORTS, compiled), setup, repeats=15)


@contextmanager
def help_text(options: Options) -> Iterator[Pair]:
    """``grappa --help``."""
    with tempfile.TemporaryDirectory() as folder:
        yield _pair(folder, "--help")


@contextmanager
def status(options: Options) -> Iterator[Pair]:
    """``grappa status`` of a finished run."""
    with tempfile.TemporaryDirectory() as folder:
        yield _pair(folder, "status", _finished(Path(folder)))


@contextmanager
def no_op(options: Options) -> Iterator[Pair]:
    """``grappa run`` of a finished run."""
    with tempfile.TemporaryDirectory() as folder:
        yield _pair(folder, "run", _finished(Path(folder)))


def _finished(folder: Path) -> str:
    images = tiny.draw_images(folder / "images")
    run = tiny.make_run(folder / "run", [images], tiny.write_weights(folder / "vit.safetensors"))
    tiny.run_all(run)
    return str(folder / "run")


GATES = [
    Gate("R13 help", "`grappa --help` / three imports", 2.0, help_text),
    Gate("R13 status", "`grappa status` / three imports", 2.0, status),
    Gate("R13 no-op", "`grappa run` with all fresh / three imports", 8.0, no_op),
]
