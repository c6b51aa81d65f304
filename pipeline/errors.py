"""Errors as users of the command line see them: one sentence and an exit code, no traceback."""

from __future__ import annotations

import errno
import functools
import gc
import os
import resource
import sys
from collections.abc import Callable
from typing import ParamSpec

import typer

from grappa.core import interrupts
from grappa.core.atomic import too_long
from grappa.core.extras import missing_sentence
from grappa.core.printing import printable, sentence

P = ParamSpec("P")
PIPE_CLOSED = 128 + 13  # the exit code that a shell reports for a command that SIGPIPE ended


def one_sentence_errors(command: Callable[P, None]) -> Callable[P, None]:
    """Turn the expected errors of a command into one sentence on stderr and an exit code.

    With ``--debug`` the traceback is shown instead. When the reader of the output has gone
    (``grappa status RUN | head``), the command ends silently, as other commands do.
    """

    @functools.wraps(command)
    def call(*args: P.args, **kwargs: P.kwargs) -> None:
        interrupts.begin()
        if not gc.isenabled():  # what was made before is no garbage
            gc.freeze()
            gc.enable()
        try:
            command(*args, **kwargs)
            sys.stdout.flush()
        except BrokenPipeError:
            _silence()
            raise typer.Exit(PIPE_CLOSED) from None
        except (KeyboardInterrupt, Exception) as error:
            if interrupts.was_interrupted():  # its sentence is printed; a package may have made another error of it
                raise typer.Exit(interrupts.EXIT_CODE) from None
            words, code = sentence_and_code(error)
            if words is None or "--debug" in sys.argv:
                raise
            print(f"grappa: {words}", file=sys.stderr, flush=True)
            raise typer.Exit(code) from None

    return call


def _silence() -> None:
    """Redirect stdout, so that the interpreter does not flush it into a pipe that nobody reads."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


EXPECTED = (
    ValueError,
    FloatingPointError,
    OSError,
    RuntimeError,
    MemoryError,
    KeyboardInterrupt,
    ModuleNotFoundError,
)


def sentence_and_code(error: BaseException) -> tuple[str | None, int]:
    """Return an error's sentence, one printable line, and exit code.

    The sentence is None for an error that deserves a traceback: an unexpected error, a RuntimeError that is neither a
    lost race for a lock nor a lack of memory, and a missing module that no extra of the distribution installs.
    """
    words, code = _words_and_code(error)
    return (None if words is None else printable(" ".join(words.split()))), code


def _words_and_code(error: BaseException) -> tuple[str | None, int]:
    if isinstance(error, ModuleNotFoundError):
        return missing_sentence(error.name), 1
    if isinstance(error, KeyboardInterrupt):
        return interrupts.SENTENCE, interrupts.EXIT_CODE
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        detail = (str(error).strip().splitlines() or ["no more memory"])[0]
        return f"out of memory ({detail}); lower the stage's batch_size or compute.inference_batch_size", 1
    if not isinstance(error, EXPECTED) or (isinstance(error, RuntimeError) and not _lost_race(error)):
        return None, 1
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        name = error.filename if isinstance(error.filename, str | bytes) else ""
        return f"{sentence(os.fsdecode(name), limit=100)}: {too_long(name)}; choose a shorter one", 1
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return f"too many open files (this process may have {allowed}); raise `ulimit -n`", 1
    if (
        isinstance(error, OSError)
        and isinstance(error.filename, str | bytes)
        and error.strerror
        and str(error).startswith("[Errno")
    ):
        return f"{os.fsdecode(error.filename)}: {error.strerror}", 1
    return str(error).strip() or type(error).__name__, 1


def _lost_race(error: RuntimeError) -> bool:
    from grappa.pipeline.store.locks import LockedError, LockLostError

    return isinstance(error, LockedError | LockLostError)
