"""An artifact that is made by ranges of its rows: the folder of the ranges beside it, and what they agree on.

Each range is an artifact like any other (``features.ranges/03-of-16``, with its own lock, unfinished work and
manifest), so that any number of machines make ranges at the same time, and a range that was interrupted goes on alone.
Beside the ranges lies a *plan*: how many there are, the fingerprint that they share, and the values that settings
``auto`` stand for, which the first range to settle one gives to all. When all rows are joined, the folder goes.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from grappa.core.notes import UntrustedError, read_note, write_note
from grappa.pipeline.graph.node import RANGES, Node
from grappa.pipeline.store.artifacts import LOG_FILE, Artifact, CorruptManifest, Fingerprint, RunFolder
from grappa.pipeline.store.locks import SILENCE_SECONDS, LockedError, acquire
from grappa.pipeline.store.storage import read_json_lines, storage_errors

T = TypeVar("T")
PLAN_FILE = "plan.json"
LOCK_SECONDS = SILENCE_SECONDS + 30.0  # by then the lock of a dead process was taken over


def ranges_folder(run: RunFolder, node: Node) -> Path:
    """Return the folder that holds the ranges of an artifact."""
    path = run.artifact(node.whole).path
    return path.with_name(path.name + RANGES)


@dataclass(frozen=True)
class RangePlan:
    """What the ranges of an artifact agree on; ``shared``: the fingerprint of a range without its range."""

    folder: Path
    total: int
    shared: Fingerprint

    def settle(self, name: str, value: T) -> T:
        """Return the value (JSON) on which the ranges agreed: ``value``, if no range has settled this name before."""
        with _alone(self.folder):
            resolved = _resolved(self)
            if resolved is None:  # the plan is that of newer ranges
                return value
            if name not in resolved:
                resolved[name] = value
                _write(self, resolved)
            agreed: T = resolved[name]
            return agreed

    def resolved(self) -> dict[str, Any]:
        """Return the values that were settled so far, by the names of the settings."""
        return _resolved(self) or {}


def read_plan(folder: Path) -> RangePlan | None:
    """Return the plan of the ranges in a folder; None where there is none, or a damaged one."""
    note = _read(folder)
    return RangePlan(folder, note["total"], note["recipe"]) if note else None


def begin_plan(folder: Path, total: int, shared: Fingerprint) -> RangePlan:
    """Return the plan for these ranges: the one that is there, or a new one where that is of other ranges."""
    plan = RangePlan(folder, total, json.loads(json.dumps(shared)))
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        if _resolved(plan) is None:
            _write(plan, {})
    return plan


@dataclass(frozen=True)
class Joined:
    """Ranges, all of them made and made alike, whose rows an artifact takes over; without folders there are none.

    ``folders``: their folders, in order. ``resolved``: what settings ``auto`` stood for. ``seconds``: what all took.
    """

    folders: tuple[Path, ...] = ()
    resolved: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    @classmethod
    def of(cls, ranges: Sequence[Artifact]) -> Joined:
        """Return what is known of ranges that are made."""
        made = [found.provenance for found in (each.manifest() for each in ranges) if found]
        seconds = sum(float(each["seconds"]) for each in made)
        return cls(tuple(each.home for each in ranges), dict(made[0]["resolved"]), seconds)

    def log_lines(self) -> Iterator[dict[str, Any]]:
        """Yield what the ranges have logged, such as times and speeds, with the name of the range."""
        for folder in self.folders:
            yield from ({"range": folder.name, **record} for record in read_json_lines(folder / LOG_FILE))


def how_made(artifact: Artifact, fingerprint: Fingerprint) -> dict[str, Any] | None:
    """Return what rows of a range must have in common to be joined: kind of device, torch's version, settled values.

    None where no range with this fingerprint was published, or where its files are damaged: all bytes are read.
    """
    try:
        manifest = artifact.manifest()
    except CorruptManifest:
        return None
    if manifest is None or manifest.fingerprint != fingerprint or artifact.check(verify=True):
        return None
    settled = dict(manifest.provenance.get("resolved", {}))
    kind = str(settled.pop("device", "")).partition(":")[0]
    return {**settled, "device": kind, "torch": manifest.provenance.get("packages", {}).get("torch")}


def remove_ranges(folder: Path) -> None:
    """Remove the ranges of an artifact that is made; nothing happens while a living process works at one of them."""
    if not folder.exists():
        return
    with suppress(LockedError), ExitStack() as held:
        for lock in folder.glob("*.lock"):
            held.enter_context(acquire(lock, what=str(folder)))
        delete_ranges(folder)


def begin_joining(run: RunFolder, node: Node, *, drop: bool = False) -> None:
    """Raise LockedError while a living process makes a range of an artifact; ``drop``: then remove all ranges.

    The caller holds the lock of the artifact, so that no other process joins these ranges.
    """
    folder = ranges_folder(run, node)
    for lock in sorted(folder.glob("*-of-*.lock")):
        acquire(lock, what=f"{node.whole.name}{RANGES}/{lock.stem}").release()
    if drop:
        delete_ranges(folder)


def drop_ranges(run: RunFolder, node: Node) -> None:
    """Remove all ranges of an artifact; LockedError while a living process writes the artifact or one of them."""
    if ranges_folder(run, node).exists():
        with acquire(run.artifact(node.whole).lock, what=node.whole.name):
            begin_joining(run, node, drop=True)


def delete_ranges(folder: Path) -> None:
    """Remove all ranges of an artifact; a living process that makes one loses its lock, so it cannot publish it."""
    with suppress(OSError):  # what a network file system keeps is removed the next time
        (folder / PLAN_FILE).unlink(missing_ok=True)
        shutil.rmtree(folder)


def _resolved(plan: RangePlan) -> dict[str, Any] | None:
    note = _read(plan.folder)
    mine = note is not None and (note["total"], note["recipe"]) == (plan.total, plan.shared)
    return dict(note["resolved"]) if note is not None and mine else None


def _read(folder: Path) -> dict[str, Any] | None:
    try:
        return read_note(folder / PLAN_FILE)
    except UntrustedError:
        return None


def _write(plan: RangePlan, resolved: dict[str, Any]) -> None:
    with storage_errors(plan.folder):
        note = {"total": plan.total, "recipe": plan.shared, "resolved": resolved}
        write_note(plan.folder / PLAN_FILE, note)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the lock of the plan; another process holds it for a moment only."""
    end = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            lock = acquire(folder / "plan.lock", what=f"the plan in {folder}")
            break
        except LockedError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)
    with lock:
        yield
