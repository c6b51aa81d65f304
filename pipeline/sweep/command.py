"""`grappa sweep`: several configurations from one file, each an ordinary run, nothing computed twice.

A fingerprint identifies an artifact. Before an artifact is computed, all sibling runs are asked for it: whatever the
order of the runs, it is computed once.
"""

from __future__ import annotations

import sys
import traceback
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from grappa.pipeline.commands.init import say_images, write_run
from grappa.pipeline.commands.run import print_rows, times_line
from grappa.pipeline.config.schema import Config
from grappa.pipeline.config.yaml_file import ConfigError, field_names, load_config
from grappa.pipeline.engine.execution import Say, Selection, run_stages
from grappa.pipeline.engine.progress import Progress
from grappa.pipeline.engine.reuse import take_over_one
from grappa.pipeline.errors import explained
from grappa.pipeline.graph.node import Node
from grappa.pipeline.store.artifacts import RunFolder, quoted
from grappa.pipeline.store.storage import is_disk_full
from grappa.pipeline.sweep.comparison import CSV_FILE, compact, result_rows, setting, write_table
from grappa.pipeline.sweep.plan import braced, plan
from grappa.pipeline.sweep.runs import Sweep, SweepRequest, SweepRun, prepare
from grappa.pipeline.sweep.spec import varied

if TYPE_CHECKING:
    import pandas as pd


class SweepFailed(ValueError):
    """Some runs of a sweep failed; the others are finished."""


def say_sweep_plan(request: SweepRequest, *, say: Say) -> None:
    """Say what each run would compute and take over, and check everything; nothing on disk is changed."""
    sweep = prepare(request)
    planned = plan(sweep)
    for line in (line for each in planned for line in each.lines()):
        say(line)
    computed, taken = (sum(counts) for counts in zip(*((len(p.computed), p.num_taken) for p in planned), strict=True))
    say(f"{len(planned)} runs in {sweep.out}: {computed} artifacts to compute, {taken} to take over")


def run_sweep(request: SweepRequest, *, progress: Progress, say: Say) -> None:
    """Run what is not fresh in every run, write the table after each and print it at the end.

    A run that fails does not stop the others, unless the disk is full. Raises SweepFailed at the end when one did.
    """
    sweep = prepare(request)
    folders = _write_runs(sweep, say)
    table, failures = _Table(sweep, folders), dict[str, str]()
    for number, run in enumerate(sweep.runs, start=1):
        say(f"[{number}/{len(sweep.runs)}] {run.name}")
        try:
            _run_one(sweep, run, folders, progress=progress, say=say)
        except Exception as error:
            if isinstance(error, OSError) and is_disk_full(error):
                raise
            failures[run.name] = _sentence(error)
            say(f"{run.name} failed: {failures[run.name]}")
        table.add(run)
    table.print(say)
    if failures:
        reasons = "; ".join(f"{name}: {sentence}" for name, sentence in failures.items())
        raise SweepFailed(f"{len(failures)} of {len(sweep.runs)} runs failed, the same command tries again: {reasons}")


def _write_runs(sweep: Sweep, say: Say) -> dict[str, RunFolder]:
    """Make all run folders, with listing and configuration; say which existing configuration is changed, and how."""
    folders = {run.name: RunFolder.create(run.root) for run in sweep.runs}
    said: set[tuple[str, ...]] = set()
    for run in sweep.runs:
        for line in _changes(folders[run.name], run.config):
            say(f"{run.name}: {line}")
        _, former = write_run(run.root, run.config, run.listing)
        if run.config.images.sources not in said:
            say_images(run.listing, former, say)
            said.add(run.config.images.sources)
    return folders


def _changes(folder: RunFolder, config: Config) -> list[str]:
    if not folder.config_path.exists():
        return []
    try:
        former = load_config(folder.config_path)
    except ConfigError as error:
        return [f"config.yaml is written anew ({error})"]
    pairs = [(key, setting(former, key), setting(config, key)) for key in field_names()]
    return [f"config {key}: {before} -> {now}" for key, before, now in pairs if before != now]


def _run_one(sweep: Sweep, run: SweepRun, folders: dict[str, RunFolder], *, progress: Progress, say: Say) -> None:
    others = {str(sweep.other.root): sweep.other} if sweep.other else {}
    others |= {name: folder for name, folder in folders.items() if name != run.name}
    taker = _Taker(others, folders[run.name], run.config, say)
    selection = Selection(until=sweep.file.until)
    try:
        report = run_stages(folders[run.name], run.config, selection, progress=progress, say=say, take=taker)
    finally:
        taker.flush()
    if report.seconds:
        say(times_line(report.seconds))
    elif not taker.any:
        say("all is fresh")


@dataclass
class _Taker:
    """Takes over what a sibling has; says so before the next artifact is computed, one line a sibling."""

    others: dict[str, RunFolder]
    folder: RunFolder
    config: Config
    say: Say
    taken: dict[str, list[str]] = field(default_factory=dict)
    any: bool = False

    def __call__(self, node: Node) -> bool:
        source = take_over_one(self.others.values(), self.folder, self.config, node)
        if source is None:
            self.flush()
            return False
        name = next(name for name, folder in self.others.items() if folder == source)
        self.any = True
        self.taken.setdefault(name, []).append(node.name)
        return True

    def flush(self) -> None:
        for source, names in self.taken.items():
            self.say(f"taken over from {source}: {braced(names)}")
        self.taken.clear()


class _Table:
    """The result table of the runs that are finished, on disk after each."""

    def __init__(self, sweep: Sweep, folders: dict[str, RunFolder]) -> None:
        self._sweep, self._folders = sweep, folders
        found = {run.name: self._rows(run) for run in sweep.runs} if sweep.has_table else {}
        self._parts = {name: rows for name, rows in found.items() if rows is not None}
        self._write()

    def add(self, run: SweepRun) -> None:
        """Take in what a run has now."""
        rows = self._rows(run) if self._sweep.has_table else None
        if rows is not None:
            self._parts[run.name] = rows
            self._write()

    def print(self, say: Say) -> None:
        """Print variants by models and say where the whole table lies."""
        if not self._sweep.has_table:
            say(f"no table: `until: {self._sweep.file.until}` leaves the evaluation out")
            return
        variants = list(dict.fromkeys(run.variant for run in self._sweep.runs))
        print_rows(*compact(self._table, variants))
        say(f"{len(self._parts)} of {len(self._sweep.runs)} runs in {quoted(self._sweep.out / CSV_FILE)}")

    def _write(self) -> None:
        parts = [self._parts[run.name] for run in self._sweep.runs if run.name in self._parts]
        if self._sweep.has_table:
            self._table = write_table(self._sweep.out, parts)

    def _rows(self, run: SweepRun) -> pd.DataFrame | None:
        file, folder = self._sweep.file, self._folders[run.name]
        settings = {key: setting(run.config, key) for key in varied(file)}
        return result_rows(folder, run.config, file, {"run": run.name, "variant": run.variant, **settings})


def _sentence(error: Exception) -> str:
    """Return what a failed run is reported with; what nobody expected shows its traceback as well."""
    sentence, _ = explained(error)
    if sentence is None:
        traceback.print_exception(error, file=sys.stderr)
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return sentence
