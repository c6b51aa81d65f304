"""The context that a stage's ``run(context)`` gets: settings, folders of inputs and outputs, progress, processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from grappa.core.notes import Claim, UntrustedError
from grappa.pipeline.config.schema import Config
from grappa.pipeline.engine.fingerprints import image_roots
from grappa.pipeline.engine.memory_limit import require_memory
from grappa.pipeline.engine.progress import Advance, Progress
from grappa.pipeline.engine.team import ALONE, Team
from grappa.pipeline.graph.node import Node
from grappa.pipeline.graph.stages import Stage, find_stage, upstream
from grappa.pipeline.store.artifacts import RunFolder
from grappa.pipeline.store.ranges import RangePlan
from grappa.pipeline.store.work import Work

if TYPE_CHECKING:
    from grappa.core.distributed import Processes

T = TypeVar("T")


@dataclass(frozen=True)
class LeadersWork:
    """The unfinished artifact as a follower sees it. The leader holds the lock, writes the log and publishes."""

    path: Path
    resumed: bool


@dataclass(frozen=True)
class StageContext:
    """One instance of a stage at work. A stage reads the inputs that it declares, and writes below ``path``.

    Where several processes compute the stage (``team``), only the process that ``leads`` writes; the others return when
    they have computed their part.

    Where ``node`` is a range of rows, ``plan`` is what all ranges agree on. ``ranges``: the folders of all ranges, in
    order, where they are made already and the stage only joins their rows; else empty.
    """

    run: RunFolder
    config: Config
    node: Node
    work: Work | LeadersWork
    progress: Progress
    resolved: dict[str, Any] = field(default_factory=dict)
    team: Team = ALONE
    plan: RangePlan | None = None
    ranges: tuple[Path, ...] = ()

    @property
    def name(self) -> str:
        """The artifact's name, such as ``clusters/k00256``."""
        return self.node.name

    @property
    def stage(self) -> Stage:
        """The stage, as the graph declares it."""
        return find_stage(self.node.stage)

    @property
    def instance(self) -> str | None:
        """The instance's name, such as ``k00256``; None where the stage has only one."""
        return self.node.instance

    @property
    def path(self) -> Path:
        """The folder for the outputs; each file below it is published."""
        return self.work.path

    @property
    def resumed(self) -> bool:
        """Whether ``path`` holds unfinished work with the same fingerprint."""
        return self.work.resumed

    @property
    def leads(self) -> bool:
        """Whether this process writes the outputs: the only process, or the first of several."""
        return self.team.leads

    @property
    def processes(self) -> Processes:
        """The processes that compute this stage together."""
        return self.team.processes

    @property
    def num_threads(self) -> int:
        """CPU threads to compute with (``compute.num_threads``)."""
        return self.config.compute.num_threads or num_cores()

    @property
    def num_workers(self) -> int:
        """Threads to decode and crop with (``compute.num_workers``)."""
        return self.config.compute.num_workers or num_cores()

    def input(self, stage: str, instance: str | None = None) -> Path:
        """Return the published folder of a declared upstream artifact."""
        wanted, declared = Node(stage, instance), upstream(self.node, self.config)
        assert wanted in declared, f"{self.name} reads {wanted}, but the graph declares {[*map(str, declared)]}"
        return self.run.artifact(wanted).home

    def sources(self) -> tuple[Path, list[str]]:
        """Return the table of the listed images and the root folders that its column ``root`` numbers."""
        assert "sources" in self.stage.externals, (
            f"{self.name} does not declare `sources` in grappa.pipeline.graph.stages"
        )
        return self.run.artifact("sources").home / "sources.parquet", image_roots(self.run)

    def originals(self) -> list[str]:
        """Return the root folders that the image table's column ``root`` numbers."""
        assert "originals" in self.stage.externals, (
            f"{self.name} does not declare `originals` in grappa.pipeline.graph.stages"
        )
        return image_roots(self.run)

    @contextmanager
    def task(self, description: str, total: int, unit: str = "images", *, done: int = 0) -> Iterator[Advance]:
        """Show progress: call the yielded ``advance(n)`` with the items newly done; the speed goes to ``log.jsonl``.

        ``advance`` also raises the failure of another process of the team.
        """
        with self.progress.task(description, total, artifact=self.name, unit=unit, done=done) as (show, meter):

            def advance(number: int) -> None:
                show(number)
                self.team.check()

            yield advance
        speed = {"seconds": round(meter.seconds, 3), "per_second": round(meter.speed, 3)}
        self.log({"task": description, "unit": unit, "total": total, "new": meter.new, **speed})

    def written(self, file: Path, claim: Claim) -> None:
        """Note the digest of a whole output that was summed when it was written: publishing does not read it again."""
        if isinstance(self.work, Work):
            self.work.written(file, claim)

    def need_memory(self, needed: int) -> None:
        """Note the bytes that the work will take at its peak, and refuse to start where fewer are free."""
        require_memory(self.name, needed)
        self.log({"needed_memory_bytes": needed})

    def log(self, record: Mapping[str, Any]) -> None:
        """Append times and speeds to ``log.jsonl``; the file is published but is no part of the artifact's identity."""
        if isinstance(self.work, Work):
            self.work.log(record)

    def resolve(self, name: str, value: T) -> T:
        """Note the value that a setting ``auto`` stands for, in the provenance; return the value to use.

        Resumed work gets the value that it began with. All processes of a team get the leader's value, and all ranges
        of an artifact that of the first, except for the device.
        """
        kept = value
        if name != "device":
            value = self.plan.settle(name, value) if self.plan else value
            kept = self.team.agree(name, self.work.kept(name, value) if isinstance(self.work, Work) else value)
        if self.resolved.get(name) != kept:
            self.resolved[name] = kept
            self.log({"resolved": {name: kept}})
        return kept

    def trusted(self, note: Path, read: Callable[[], T], otherwise: T) -> T:
        """Return what ``read`` finds of earlier work; where that is damaged, say so, delete ``note``, go on without."""
        try:
            return read()
        except UntrustedError as error:
            note.unlink(missing_ok=True)
            self.say_dropped(f"{error}; this part of the work is done again")
            return otherwise

    def say_dropped(self, sentence: str) -> None:
        """Say, and log, that unfinished work is damaged and not used."""
        self.progress.say(f"{self.name}: {sentence}")
        self.log({"dropped": sentence})


def num_cores() -> int:
    """Return the number of CPU cores for this process: its share, where several processes of a host see all cores."""
    everything = os.cpu_count() or 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else everything
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if cores == everything else 1
    return max(1, cores // beside)
