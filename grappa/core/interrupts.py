"""Ctrl-C of a command, wherever it hits: one sentence, exit code 130, no traceback.

Until the command begins nothing has to be undone: the process ends at once. Then Ctrl-C raises KeyboardInterrupt, so
that locks and drafts are removed on the way out; a second one ends the process at once, which loses nothing either.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from types import FrameType

SENTENCE, EXIT_CODE = "stopped; the same command resumes", 130

_said = False


def was_interrupted() -> bool:
    """Tell whether Ctrl-C was pressed, and the sentence printed, since ``start``."""
    return _said


def start() -> None:
    """Let Ctrl-C end this process at once, with the sentence; nothing is changed where it is ignored."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)
        sys.unraisablehook = _unraisable


def begin() -> None:
    """Let Ctrl-C raise KeyboardInterrupt from now on, after ``start``."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, _interrupt)


def end() -> None:
    """Let Ctrl-C end the process silently from now on: the command has finished."""
    if signal.getsignal(signal.SIGINT) in (_leave, _interrupt):
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def _say() -> None:
    global _said
    _said = True
    with suppress(OSError):
        os.write(2, f"grappa: {SENTENCE}\n".encode())


def _leave(number: int, frame: FrameType | None) -> None:
    _say()
    os._exit(EXIT_CODE)


def _interrupt(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    _say()
    raise KeyboardInterrupt


def _unraisable(failure: sys.UnraisableHookArgs) -> None:
    """End the process where Python would print and forget a KeyboardInterrupt, such as in a destructor."""
    if isinstance(failure.exc_value, KeyboardInterrupt):
        os._exit(EXIT_CODE)
    sys.__unraisablehook__(failure)
