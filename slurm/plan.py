"""The plan of the jobs: the artifacts to make, the stages that share a job, and the jobs that wait for others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from grappa.pipeline.config.schema import Config
from grappa.pipeline.config.yaml_file import load_config
from grappa.pipeline.engine.execution import NotReadyError, Selection, selected
from grappa.pipeline.engine.fingerprints import expected_fingerprint
from grappa.pipeline.engine.packages import refuse_missing_packages
from grappa.pipeline.engine.status import Judge
from grappa.pipeline.graph.node import Node
from grappa.pipeline.graph.stages import by_ranges, find_stage, settings_of, upstream
from grappa.pipeline.store.artifacts import RunFolder, quoted
from grappa.slurm.profiles import Profile, Resources
from grappa.slurm.records import PINNED_CONFIG, Pin, Task


@dataclass(frozen=True)
class PlannedJob:
    """One call of sbatch; several tasks are an array.

    ``needs``: artifacts that other jobs must make first. ``joins``: ranges of rows whose jobs must have ended first,
    whether they made them or not. ``by_ranges``: the tasks make ranges of rows.
    """

    stages: tuple[str, ...]
    tasks: tuple[tuple[Pin, ...], ...]
    reasons: Mapping[str, str]
    needs: tuple[str, ...]
    resources: Resources
    joins: tuple[str, ...] = ()
    by_ranges: bool = False

    @property
    def artifacts(self) -> tuple[str, ...]:
        return tuple(pin.name for pins in self.tasks for pin in pins)

    @property
    def name(self) -> str:
        """Return ``clusters``, ``backbone+images``, or ``features ranges``."""
        return "+".join(self.stages) + (" ranges" if self.by_ranges else "")

    @property
    def title(self) -> str:
        """Return the name, for an array with its length: ``clusters (array of 8)``."""
        return self.name + (f" (array of {len(self.tasks)})" if len(self.tasks) > 1 else "")


def plan(
    run: RunFolder, config: Config, selection: Selection, profile: Profile, live: Mapping[str, Task]
) -> list[PlannedJob]:
    """Return the jobs to submit, in the order of the graph.

    ``live``: the tasks that are queued or running, by the artifacts that they make; these artifacts are not planned
    again. Raises NotReadyError when the inputs of a selected stage are neither fresh nor made by a job.
    """
    judge = Judge(run, config)
    due = [node for node in selected(config, selection) if selection.force or judge.state(node).kind != "fresh"]
    refuse_missing_packages(config, (node.stage for node in due))
    ranges = {node: _ranges(config, node, profile) for node in due}
    _refuse_other_settings(config, [*due, *(each for node in due for each in ranges[node])], live, run)
    due = [node for node in due if node.name not in live]
    coming = {*due, *(node for node in map(Node.parse, live) if not node.rows)}
    for node in due:
        _refuse_unready(run, judge, node, coming)
    groups: dict[tuple[tuple[str, ...], bool, bool], list[Node]] = {}
    for node in due:
        group = profile.group_of(node.stage)
        late = len(group) == 1 and _reads_own_stage(config, node, coming)
        groups.setdefault((group, late, bool(ranges[node])), []).append(node)
    jobs: list[PlannedJob] = []
    for (group, _, _), members in groups.items():
        job = _job(run, config, judge, members, coming, selection.force, profile.resources(group))
        apart = {node: ranges[node] for node in members}
        jobs += _by_ranges(run, config, judge, job, apart, coming, live)
    return jobs


def _ranges(config: Config, node: Node, profile: Profile) -> list[Node]:
    """Return the ranges of a node's rows that the profile asks for; empty where it asks for none."""
    total = profile.resources((node.stage,)).ranges
    return node.ranges(total) if total > 1 and by_ranges(node, config) else []


def _by_ranges(
    run: RunFolder,
    config: Config,
    judge: Judge,
    job: PlannedJob,
    ranges: Mapping[Node, Sequence[Node]],
    coming: set[Node],
    live: Mapping[str, Task],
) -> list[PlannedJob]:
    """Return a job, and before it the array of those ranges that it joins that are neither made nor on their way."""
    force = any(pin.force for pins in job.tasks for pin in pins)
    missing = {
        node: [each for each in some if each.name not in live and (force or judge.state(each).kind != "fresh")]
        for node, some in ranges.items()
    }
    tasks = tuple((_pin(run, config, each, coming, force),) for some in missing.values() for each in some)
    known = [each.name for some in ranges.values() for each in some if each.name in live]
    joining = replace(job, joins=(*known, *(pin.name for (pin,) in tasks)))
    if not tasks:
        return [joining]
    reasons = {node.name: f"{len(some)} of {len(ranges[node])} ranges" for node, some in missing.items() if some}
    return [replace(job, tasks=tasks, reasons=reasons, by_ranges=True), joining]


def _reads_own_stage(config: Config, node: Node, coming: set[Node]) -> bool:
    """Tell whether a node reads nodes of its own stage, as concat does: its job follows the array of these nodes."""
    return any(each in coming and each.stage == node.stage for each in upstream(node, config))


def _job(
    run: RunFolder,
    config: Config,
    judge: Judge,
    members: Sequence[Node],
    coming: set[Node],
    force: bool,
    resources: Resources,
) -> PlannedJob:
    names = tuple(dict.fromkeys(node.stage for node in members))
    own, read = set(members), [each for node in members for each in upstream(node, config)]
    pins = [_pin(run, config, node, coming, force) for node in members]
    needs = dict.fromkeys(each.name for each in read if each in coming - own)
    reasons = {node.name: "forced" if force else str(judge.state(node)) for node in members}
    # The instances of one stage run at the same time; stages that share a job run one after another.
    apart = len(names) == 1 and own.isdisjoint(read)
    tasks = tuple((pin,) for pin in pins) if apart else (tuple(pins),)
    return PlannedJob(names, tasks, reasons, tuple(needs), resources)


def _pin(run: RunFolder, config: Config, node: Node, coming: set[Node], force: bool) -> Pin:
    known = coming.isdisjoint(upstream(node, config))
    fingerprint = expected_fingerprint(run, config, node).fingerprint if known else None
    return Pin(node.name, find_stage(node.stage).version, force, fingerprint)


def _refuse_unready(run: RunFolder, judge: Judge, node: Node, coming: set[Node]) -> None:
    for problem in judge.upstream_problems(node):
        if problem.node in coming:
            continue
        advice = f"; submit it too: grappa submit {quoted(run.root)} --until {problem.node.stage}"
        raise NotReadyError(f"{node} cannot be submitted: {problem}{'' if problem.text else advice}")


def _refuse_other_settings(config: Config, due: Sequence[Node], live: Mapping[str, Task], run: RunFolder) -> None:
    """Raise NotReadyError for a queued job whose settings were edited since its submission: it would refuse to run."""
    for node in due:
        task = live.get(node.name)
        if task is None:
            continue
        pinned = load_config(task.submission / PINNED_CONFIG)
        old, new = settings_of(node, pinned), settings_of(node, config)
        keys = dict.fromkeys((*new, *old))  # a setting that is as before it was there has no key
        changed = [f"{key}: {old.get(key)} -> {new.get(key)}" for key in keys if old.get(key) != new.get(key)]
        if changed:
            raise NotReadyError(
                f"{node} is on its way as job {task.id} with other settings ({'; '.join(changed)}); "
                f"first `grappa cancel {quoted(run.root)} {node.stage}`"
            )
