"""What the command line makes of errors: one sentence, an exit code, no traceback."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import ParamSpec

import typer

from pipeline.explained import EXPECTED, explained

P = ParamSpec("P")
PIPE_CLOSED = 128 + 13  # what a shell tells of a command that SIGPIPE ended


def guarded(command: Callable[P, None]) -> Callable[P, None]:
    """Turn expected errors of a command into one sentence on stderr and an exit code; ``--debug`` shows them whole.

    Where whoever read the output has gone (``grappa status RUN | head``), the command ends as others do: silently.
    """

    @functools.wraps(command)
    def call(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
            sys.stdout.flush()
        except BrokenPipeError:
            _silence()
            raise typer.Exit(PIPE_CLOSED) from None
        except EXPECTED as error:
            sentence, code = explained(error)
            if sentence is None or "--debug" in sys.argv:
                raise
            print(f"grappa: {sentence}", file=sys.stderr, flush=True)
            raise typer.Exit(code) from None

    return call


def _silence() -> None:
    """Leave nothing that the interpreter would flush into a pipe that nobody reads."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
