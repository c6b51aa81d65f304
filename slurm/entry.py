"""Where a job begins: submitit's entry, with files of calls that nobody but their owner can have written.

submitit hands a call to its job in a file of Python objects (a pickle) in the run folder; whoever can write this file
can run anything as the owner of the job. So such files are written with access for the owner alone, whatever the umask;
a job loads one only if it is its user's own and nobody else can write it; and when the call is over they are removed.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from submitit import JobEnvironment
from submitit.core import submission, utils

from grappa.core.printing import printable

FAILED = 1  # the exit code of a call that ended with an error; with any other code the job may start again
_load, _dump = utils.pickle_load, utils.cloudpickle_dump


class ForeignFileError(ValueError):
    """Another user owns the file of a call, or can write it; the message names the file and what to do."""


def load_own(filename: str | Path) -> Any:
    """Load a file of submitit; ForeignFileError unless it is a regular file that only this user can write."""
    descriptor = os.open(filename, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        _refuse_foreign(filename, os.fstat(descriptor))
        return _load(f"/proc/self/fd/{descriptor}")  # the file that was checked, whatever has its name by now
    finally:
        os.close(descriptor)


def write_private(obj: Any, filename: str | Path) -> None:
    """Write a file of submitit that only this user can read and write."""
    descriptor = os.open(filename, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        os.fchmod(descriptor, 0o600)
    finally:
        os.close(descriptor)
    _dump(obj, filename)


def _refuse_foreign(file: str | Path, status: os.stat_result) -> None:
    found = None
    if not stat.S_ISREG(status.st_mode):
        found = "is no regular file"
    elif status.st_uid != os.geteuid():
        found = f"belongs to user {status.st_uid}, this job is of user {os.geteuid()}"
    elif status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        found = f"can be written by others (mode {stat.S_IMODE(status.st_mode):o})"
    if found:
        raise ForeignFileError(f"{file} {found}, so it is not loaded; look who changed it, then submit again")


@contextmanager
def private_files() -> Iterator[None]:
    """Let submitit load and write its files by :func:`load_own` and :func:`write_private`."""
    utils.pickle_load, utils.cloudpickle_dump = load_own, write_private
    try:
        yield
    finally:
        utils.pickle_load, utils.cloudpickle_dump = _load, _dump


def command(python: str, folder: str) -> str:
    """Return the command of a job, for a shell; both arguments are quoted already.

    ``python -m`` takes modules from the working folder first, which may be a run folder. A job does so only if this
    process does (``python -m grappa``, a checkout that is not installed).
    """
    return f"{python} -u {'' if trusts_working_folder() else '-P '}-m {__name__} {folder}"


def trusts_working_folder() -> bool:
    """Tell whether this process takes modules from its working folder."""
    return os.getcwd() in map(os.path.abspath, sys.path)


@contextmanager
def safe_path() -> Iterator[None]:
    """Let processes that are started meanwhile take modules from the working folder only if this process does."""
    former = dict(os.environ)
    os.environ |= {} if trusts_working_folder() else {"PYTHONSAFEPATH": "1"}
    try:
        yield
    finally:
        os.environ.pop("PYTHONSAFEPATH", None)
        os.environ |= former


def main(folder: str) -> None:
    """Run the call that was submitted in ``folder`` for this job, and remove its files when it is over."""
    try:
        with private_files():
            submission.process_job(folder)
    except ForeignFileError as error:
        sys.exit(f"grappa: {printable(str(error))}")
    except SystemExit as leaving:
        if leaving.code == FAILED:
            _remove_own()
        raise
    except Exception:
        _remove_own()
        raise
    _remove_own()


def _remove_own() -> None:
    """Remove the files of this task; the call's own file belongs to all tasks, the first removes it."""
    job = JobEnvironment()
    done = [job.paths.result_pickle, *([job.paths.submitted_pickle] if job.global_rank == 0 else [])]
    for file in done:
        with suppress(OSError):
            file.unlink()


def remove_left_over(jobs: Path, live: Collection[str]) -> None:
    """Remove the files of jobs that were killed before they could do so; ``live``: ids of jobs that may still start."""
    alive = tuple(f"{job}_" for job in live)
    for file in jobs.glob("*/*.pkl"):
        if not file.name.startswith(alive):
            with suppress(OSError):
                file.unlink()


if __name__ == "__main__":
    main(sys.argv[1])
