"""Expected errors in one sentence: what the command line prints instead of a traceback."""

from __future__ import annotations

import os

EXPECTED = (ValueError, FloatingPointError, OSError, RuntimeError, MemoryError, KeyboardInterrupt)


def explained(error: BaseException) -> tuple[str | None, int]:
    """Return an error's sentence and exit code.

    The sentence is None for what deserves a traceback: what is not expected, and a RuntimeError that is neither a lost
    race for a lock nor lack of memory.
    """
    if isinstance(error, KeyboardInterrupt):
        return "stopped; the same command resumes", 130
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        detail = (str(error).strip().splitlines() or ["no more memory"])[0]
        return f"out of memory ({detail}); lower the stage's batch_size or compute.inference_batch_size", 1
    if not isinstance(error, EXPECTED) or (isinstance(error, RuntimeError) and not _lost_race(error)):
        return None, 1
    if isinstance(error, OSError) and error.filename and error.strerror and str(error).startswith("[Errno"):
        return f"{os.fsdecode(error.filename)}: {error.strerror}", 1
    return " ".join(str(error).split()) or type(error).__name__, 1


def _lost_race(error: RuntimeError) -> bool:
    from pipeline.locks import LockedError, LockLostError

    return isinstance(error, LockedError | LockLostError)
