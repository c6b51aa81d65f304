"""`grappa sweep`: several configurations from one file; each becomes an ordinary run, and no artifact is made twice.

A fingerprint identifies an artifact. Before an artifact is computed, it is looked for in all other runs of the sweep.
So it is computed once, whatever the order of the runs is.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterable
from dataclasses import dataclass, field

from grappa.pipeline.commands.init import write_run
from grappa.pipeline.commands.listed import say_images
from grappa.pipeline.commands.run import print_rows, times_line
from grappa.pipeline.config.yaml_file import ConfigError, field_names, flow, load_config
from grappa.pipeline.engine.execution import Say, Selection, run_stages
from grappa.pipeline.engine.progress import Progress
from grappa.pipeline.engine.reuse import reuse_artifact
from grappa.pipeline.errors import sentence_and_code
from grappa.pipeline.graph.node import Node
from grappa.pipeline.store.artifacts import RunFolder, quoted
from grappa.pipeline.store.storage import is_disk_full
from grappa.pipeline.sweep.comparison import CSV_FILE, SweepTable, compact, setting
from grappa.pipeline.sweep.runs import Sweep, SweepRequest, SweepRun, prepare


class SweepFailed(ValueError):
    """Some runs of a sweep failed; the others are finished."""


def say_sweep(request: SweepRequest, *, say: Say) -> None:
    """Check the whole sweep, say which runs it has and what they change; nothing on disk is changed."""
    sweep = prepare(request)
    for run in sweep.runs:
        say(f"{run.name}: {', '.join(f'{key}={flow(value)}' for key, value in run.changes.items()) or 'the base'}")
    say(f"{len(sweep.runs)} runs in {sweep.out}, up to {sweep.file.until}")


def run_sweep(request: SweepRequest, *, progress: Progress, say: Say) -> None:
    """Run the stages that are not fresh in every run, write the table after each run and print it at the end.

    A run that fails does not stop the others, unless the disk is full. At the end SweepFailed names the failed runs.
    """
    sweep = prepare(request)
    _write_runs(sweep, say)
    table, failures = SweepTable(sweep), dict[str, str]()
    for number, run in enumerate(sweep.runs, start=1):
        say(f"[{number}/{len(sweep.runs)}] {run.name}")
        try:
            _run_one(sweep, run, progress=progress, say=say)
        except Exception as error:
            if isinstance(error, OSError) and is_disk_full(error):
                raise
            failures[run.name] = _sentence(error)
            say(f"{run.name} failed: {failures[run.name]}")
        table.update(run)
    _print(sweep, table, say)
    if failures:
        reasons = "; ".join(f"{name}: {sentence}" for name, sentence in failures.items())
        raise SweepFailed(f"{len(failures)} of {len(sweep.runs)} runs failed, the same command tries again: {reasons}")


def _write_runs(sweep: Sweep, say: Say) -> None:
    """Make all run folders with listing and configuration; say how the configurations of existing runs change."""
    for run in sweep.runs:
        RunFolder.create(run.root)
    said: set[tuple[str, ...]] = set()
    for run in sweep.runs:
        for line in _changes(run):
            say(f"{run.name}: {line}")
        _, former = write_run(run.root, run.config, run.listing)
        if run.config.images.sources not in said:
            say_images(run.listing, former, say)
            said.add(run.config.images.sources)


def _changes(run: SweepRun) -> list[str]:
    if not run.folder.config_path.exists():
        return []
    try:
        former = load_config(run.folder.config_path)
    except ConfigError as error:
        return [f"config.yaml is written anew ({error})"]
    pairs = [(key, setting(former, key), setting(run.config, key)) for key in field_names()]
    return [f"config {key}: {before} -> {now}" for key, before, now in pairs if before != now]


def _run_one(sweep: Sweep, run: SweepRun, *, progress: Progress, say: Say) -> None:
    others = {sweep.other: str(sweep.other.root)} if sweep.other else {}
    others |= {each.folder: each.name for each in sweep.runs if each is not run}
    reuser, selection = _Reuser(others, run, say), Selection(until=sweep.file.until)
    try:
        report = run_stages(run.folder, run.config, selection, progress=progress, say=say, reuse=reuser)
    finally:
        reuser.flush()
    if report.seconds:
        say(times_line(report.seconds))
    elif not reuser.any:
        say("all is fresh")


@dataclass
class _Reuser:
    """Reuses artifacts of other runs, and says so before the next artifact is computed: a line for each other run."""

    others: dict[RunFolder, str]
    run: SweepRun
    say: Say
    reused: dict[str, list[str]] = field(default_factory=dict)
    any: bool = False

    def __call__(self, node: Node) -> bool:
        source = reuse_artifact(self.others, self.run.folder, self.run.config, node, say=self.say)
        if source is None:
            self.flush()
            return False
        self.any = True
        self.reused.setdefault(self.others[source], []).append(node.name)
        return True

    def flush(self) -> None:
        for source, names in self.reused.items():
            self.say(f"reused from {source}: {braced(names)}")
        self.reused.clear()


def braced(names: Iterable[str]) -> str:
    """Return ``backbone, clusters/{k00004,k00008}``: the artifacts of one stage stand together."""
    stages: dict[str, list[str]] = {}
    for name in names:
        stage, slash, instance = name.partition("/")
        stages.setdefault(f"{stage}{slash}", []).append(instance)
    return ", ".join(
        f"{stage}{{{','.join(found)}}}" if len(found) > 1 else f"{stage}{found[0]}" for stage, found in stages.items()
    )


def _print(sweep: Sweep, table: SweepTable, say: Say) -> None:
    """Print the table of variants by models and say where the whole table lies."""
    if not sweep.has_table:
        say(f"no table: `until: {sweep.file.until}` leaves the evaluation out")
        return
    print_rows(*compact(table.rows, list(dict.fromkeys(run.variant for run in sweep.runs))))
    say(f"{table.rows['run'].nunique()} of {len(sweep.runs)} runs in {quoted(sweep.out / CSV_FILE)}")


def _sentence(error: Exception) -> str:
    """Return the sentence that reports a failed run; the traceback of an unexpected error is printed as well."""
    sentence, _ = sentence_and_code(error)
    if sentence is None:
        traceback.print_exception(error, file=sys.stderr)
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return sentence
