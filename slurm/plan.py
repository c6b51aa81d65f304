"""The graph as jobs: what is not fresh and not on its way, which stages share a job, which job waits for which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from grappa.pipeline.config.schema import Config, identity_settings
from grappa.pipeline.config.yaml_file import load_config
from grappa.pipeline.engine.execution import NotReadyError, Selection, Step, selected
from grappa.pipeline.engine.fingerprints import expected_recipe
from grappa.pipeline.engine.packages import refuse_missing_packages
from grappa.pipeline.engine.status import Judge
from grappa.pipeline.graph.stages import artifact_name, find_stage
from grappa.pipeline.store.artifacts import RunFolder, quoted
from grappa.slurm.profiles import Profile, Resources
from grappa.slurm.records import PINNED_CONFIG, Pin, Task


@dataclass(frozen=True)
class PlannedJob:
    """One call of sbatch; more than one task: an array. ``needs``: artifacts that other jobs make first."""

    stages: tuple[str, ...]
    tasks: tuple[tuple[Pin, ...], ...]
    reasons: Mapping[str, str]
    needs: tuple[str, ...]
    resources: Resources

    @property
    def artifacts(self) -> tuple[str, ...]:
        return tuple(pin.name for pins in self.tasks for pin in pins)

    @property
    def title(self) -> str:
        """Return ``clusters (array of 8)`` or ``backbone+images``."""
        array = f" (array of {len(self.tasks)})" if len(self.tasks) > 1 else ""
        return "+".join(self.stages) + array


def plan(
    run: RunFolder, config: Config, selection: Selection, profile: Profile, live: Mapping[str, Task]
) -> list[PlannedJob]:
    """Return the jobs to submit, in the order of the graph.

    ``live``: the tasks that are queued or running, by the artifacts they make; these are not planned again.
    Raises NotReadyError when a stage was selected whose inputs are neither fresh nor on their way.
    """
    judge = Judge(run, config)
    steps = [step for step in selected(config, selection) if selection.force or judge.state(*step).kind != "fresh"]
    refuse_missing_packages(config, (stage.name for stage, _ in steps))
    _refuse_other_settings(config, steps, live, run)
    steps = [step for step in steps if _name(step) not in live]
    coming = {*map(_name, steps), *live}
    for step in steps:
        _refuse_unready(run, judge, step, coming)
    groups: dict[tuple[tuple[str, ...], bool], list[Step]] = {}
    for step in steps:
        group = profile.group_of(step[0].name)
        late = len(group) == 1 and _reads_own_stage(config, step, coming)
        groups.setdefault((group, late), []).append(step)
    return [
        _job(run, config, judge, members, coming, selection.force, profile.resources(group))
        for (group, _), members in groups.items()
    ]


def _reads_own_stage(config: Config, step: Step, coming: set[str]) -> bool:
    """Tell whether an instance waits for others of its own stage (concat): it gets a job after the array of these."""
    return any(name in coming and name.startswith(f"{step[0].name}/") for name in _inputs(config, step))


def _job(
    run: RunFolder,
    config: Config,
    judge: Judge,
    steps: Sequence[Step],
    coming: set[str],
    force: bool,
    resources: Resources,
) -> PlannedJob:
    names = tuple(dict.fromkeys(stage.name for stage, _ in steps))
    own = set(map(_name, steps))
    pins = [_pin(run, config, step, coming, force) for step in steps]
    needs = (name for step in steps for name in _inputs(config, step) if name in coming - own)
    reasons = {_name(step): "forced" if force else str(judge.state(*step)) for step in steps}
    # The instances of one stage run side by side, stages that share a job one after another.
    apart = len(names) == 1 and not any(name in own for step in steps for name in _inputs(config, step))
    tasks = tuple((pin,) for pin in pins) if apart else (tuple(pins),)
    return PlannedJob(names, tasks, reasons, tuple(dict.fromkeys(needs)), resources)


def _pin(run: RunFolder, config: Config, step: Step, coming: set[str], force: bool) -> Pin:
    stage, instance = step
    known = not coming.intersection(_inputs(config, step))
    recipe = expected_recipe(run, config, stage, instance).recipe if known else None
    return Pin(_name(step), stage.version, force, recipe)


def _name(step: Step) -> str:
    return artifact_name(step[0].name, step[1])


def _inputs(config: Config, step: Step) -> list[str]:
    stage, instance = step
    return list(dict.fromkeys(each.name for each in stage.inputs(config, instance)))


def _refuse_unready(run: RunFolder, judge: Judge, step: Step, coming: set[str]) -> None:
    for problem in judge.upstream_problems(*step):
        name = problem.removeprefix("upstream ").partition(" is ")[0]
        if name in coming:
            continue
        advice = f"; submit it too: grappa submit {quoted(run.root)} --until {name.partition('/')[0]}"
        raise NotReadyError(
            f"{_name(step)} cannot be submitted: {problem}{'' if name.startswith(('sources', 'images.')) else advice}"
        )


def _refuse_other_settings(config: Config, steps: Sequence[Step], live: Mapping[str, Task], run: RunFolder) -> None:
    """Refuse to leave a job in the queue that will refuse to start: its settings were edited since it was submitted."""
    for stage, instance in steps:
        task = live.get(artifact_name(stage.name, instance))
        if task is None:
            continue
        pinned = load_config(task.submission / PINNED_CONFIG)
        names = find_stage(stage.name).settings(instance)
        old, new = identity_settings(pinned, names), identity_settings(config, names)
        changed = [f"{key}: {old[key]} -> {new[key]}" for key in new if old[key] != new[key]]
        if changed:
            raise NotReadyError(
                f"{artifact_name(stage.name, instance)} is on its way as job {task.id} with other settings "
                f"({'; '.join(changed)}); first `grappa cancel {quoted(run.root)} {stage.name}`"
            )
