"""``grappa.run``: ``grappa init`` and ``grappa run`` as one call in Python."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from grappa.core.home import expanded
from grappa.core.printing import printable
from grappa.pipeline.commands.init import Request, initialize
from grappa.pipeline.commands.run import run_and_report
from grappa.pipeline.engine.execution import Selection, run_stages
from grappa.pipeline.engine.progress import Progress
from grappa.pipeline.engine.status import read_config
from grappa.pipeline.engine.team import place
from grappa.pipeline.open_run import Run, open_run
from grappa.pipeline.store.artifacts import RUN_FILE, RunFolder

Source = str | os.PathLike[str]
Changes = Mapping[str, Any] | Sequence[str]


def run(
    folder: str | Path,
    *,
    images: Source | Sequence[Source] = (),
    config: Source | None = None,
    settings: Changes = (),
    stage: str | None = None,
    until: str | None = None,
    progress: bool = True,
) -> Run:
    """Make or change a run folder, run the stages that are not fresh, and return the run; the same call resumes work.

    Args:
        folder: the run folder, made if it is not there.
        images: folders or tables (.csv, .parquet), one or several; empty keeps the images of the run.
        config: a preset such as ``small`` or ``grappa``, or a YAML file; None keeps the configuration of the run.
        settings: settings to change: ``{"fusion.learning_rate": 0.001}``, ``{"fusion": {"learning_rate": 0.001}}`` or
            ``["fusion.learning_rate=0.001"]``.
        stage: run only this stage; ``until``: run all stages up to this one.
        progress: whether to print the progress, with speed and time left, and at the end the result table.

    Raises:
        ValueError: wrong images, settings or names; the message is the sentence that the command line prints.
    """
    root = Path(expanded(folder))
    say = _print if progress else _silent
    changes = Request(_sources(images), None if config is None else os.fspath(config), assignments(settings))
    if changes != Request() or not (root / RUN_FILE).exists():
        _refuse_several_processes(root)
        initialize(root, changes, say=say)
    opened, selection = RunFolder.open(root, writable=True), Selection(stage=stage, until=until)
    if progress:
        run_and_report(opened, selection, progress=Progress(), say=say)
    else:
        silent = Progress(StringIO(), terminal=False)
        run_stages(opened, read_config(opened), selection, progress=silent, say=say)
    return open_run(root)


def _refuse_several_processes(root: Path) -> None:
    """Several processes share the work of a run; only one may make the run or change it."""
    if place()[1] > 1:
        raise ValueError(
            f"{root} would be made or changed by several processes at once; make it by one process first "
            '(`grappa init`, or `grappa.run(..., until="backbone")`), then start them with the folder alone'
        )


def assignments(settings: Changes) -> tuple[str, ...]:
    """Return settings as ``section.key=value`` texts."""
    if isinstance(settings, str):
        raise ValueError(f"settings is {settings!r}; give a dict, or a list of section.key=value texts")
    if not isinstance(settings, Mapping):
        return tuple(settings)
    return tuple(f"{name}={_text(value)}" for name, value in _fields(settings))


def _fields(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if "." not in name and isinstance(value, Mapping):
            yield from ((f"{name}.{key}", inner) for key, inner in value.items())
        else:
            yield name, value


def _text(value: Any) -> str:
    """Return a value as JSON, which is valid YAML; a text or a path stays as it is, because fields for text take it."""
    if isinstance(value, str | os.PathLike):
        return os.fspath(value)
    return json.dumps(value, default=lambda other: other.item() if hasattr(other, "item") else os.fspath(other))


def _sources(images: Source | Sequence[Source]) -> tuple[str, ...]:
    several = (images,) if isinstance(images, str | os.PathLike) else images
    return tuple(os.fspath(each) for each in several)


def _print(line: str) -> None:
    print(printable(line))


def _silent(line: str) -> None:
    """Say nothing."""
