"""What the commands share: the argument of a run, lines that are printed at once, warnings on stderr."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from grappa.core.printing import printable

Run = Annotated[Path, typer.Argument(metavar="RUN", help="the run folder")]


def say(line: str) -> None:
    """Print a line at once; names in it are printed, not obeyed."""
    print(printable(line), flush=True)


def warn_if_stale(run: Path, *names: str) -> None:
    """Warn on stderr where artifacts of a run that a command reads are not what its configuration asks for."""
    from grappa.pipeline.engine.glance import stale_notice

    warn(stale_notice(run, *names))


def warn_of_additions(run: Path) -> None:
    """Warn on stderr where images were added or removed that a command does not take into account yet."""
    from grappa.pipeline.engine.live.additions import additions_notice

    warn(additions_notice(run))


def warn(notice: str | None) -> None:
    """Print a warning on stderr, if there is one."""
    if notice:
        print(f"grappa: warning: {printable(notice)}", file=sys.stderr, flush=True)
