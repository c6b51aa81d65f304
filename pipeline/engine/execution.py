"""Running stages: in the order of the graph, each judged just before, each published whole or not at all."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from io import StringIO

from grappa.pipeline.config.schema import Config
from grappa.pipeline.engine.context import LeadersWork, StageContext
from grappa.pipeline.engine.fingerprints import expected_recipe
from grappa.pipeline.engine.freshness import State, compare_recipes
from grappa.pipeline.engine.packages import refuse_missing_packages
from grappa.pipeline.engine.progress import Progress, duration
from grappa.pipeline.engine.status import Judge, instances
from grappa.pipeline.engine.team import ALONE, Team, joined
from grappa.pipeline.graph.stages import STAGES, Stage, artifact_name, find_stage
from grappa.pipeline.store.artifacts import RunFolder, quoted
from grappa.pipeline.store.provenance import provenance
from grappa.pipeline.store.work import Work, open_work, recover

Step = tuple[Stage, str | None]
Say = Callable[[str], None]
Take = Callable[[Stage, str | None], bool]


class NotReadyError(ValueError):
    """A stage was asked for whose inputs are not fresh; the message names the reason and the command."""


@dataclass(frozen=True)
class Selection:
    """What to run: everything, one stage (instance), or all up to a stage; ``force``: also what is fresh."""

    stage: str | None = None
    instance: str | None = None
    until: str | None = None
    force: bool = False


@dataclass
class Report:
    """What was run: seconds a stage, in order; ``leads``: by this process, which is no other one's follower."""

    seconds: dict[str, float] = field(default_factory=dict)
    num_fresh: int = 0
    leads: bool = True


def run_stages(
    run: RunFolder, config: Config, selection: Selection, *, progress: Progress, say: Say, take: Take | None = None
) -> Report:
    """Run every selected instance that is not fresh; ``say`` gets one line for each.

    ``take`` is asked before an instance is computed; True means that it has put a finished artifact in its place.
    Several processes (see ``engine.team``) make the same call: the first runs the stages, the others help it.

    Raises NotReadyError when one stage was selected and what it reads is not fresh, LockedError when another process
    is writing an artifact, ProcessesError when another process of the team failed, and whatever a stage raises:
    finished artifacts stay, and unfinished work is resumed by the same call.
    """
    with joined() as team:
        if team.leads:
            return lead(run, config, selection, progress=progress, say=say, take=take, team=team)
        follow(run, team)
        return Report(leads=False)


def lead(
    run: RunFolder,
    config: Config,
    selection: Selection,
    *,
    progress: Progress,
    say: Say,
    take: Take | None = None,
    team: Team,
) -> Report:
    """Run the stages as ``run_stages`` does, as the first process of a team that exists already."""
    steps = selected(config, selection)
    for stage, instance in instances(config):
        recover(run.artifact(stage.name, instance))
    if selection.stage:
        _refuse_unready(run, Judge(run, config), steps, force=selection.force)
    judge = Judge(run, config)
    due = (stage.name for stage, instance in steps if selection.force or judge.state(stage, instance).kind != "fresh")
    refuse_missing_packages(config, due)
    judge, report = Judge(run, config), Report()
    for stage, instance in steps:
        if judge.state(stage, instance).kind == "fresh" and not selection.force:
            report.num_fresh += 1
            continue
        _refuse_unready(run, judge, [(stage, instance)], force=True)
        if not (take and take(stage, instance)):
            seconds = execute(run, config, stage, instance, progress=progress, say=say, team=team)
            report.seconds[stage.name] = report.seconds.get(stage.name, 0.0) + seconds
        judge.forget(stage, instance)
    return report


def follow(run: RunFolder, team: Team) -> None:
    """Take part in the stages that the leader announces, until it has finished."""
    for step in team.steps():
        stage, config = find_stage(step["stage"]), Config.model_validate(step["config"])
        work = LeadersWork(run.artifact(stage.name, step["instance"]).partial, step["resumed"])
        silent = Progress(StringIO(), terminal=False)
        context = StageContext(run, config, stage, step["instance"], work, silent, team=team)
        importlib.import_module(stage.module).run(context)


def planned(run: RunFolder, config: Config, selection: Selection) -> list[tuple[str, State]]:
    """Return the instances that ``run_stages`` would run as things are now, with their states; nothing is changed.

    What only has stale inputs may turn out to be fresh, when these come out with the same bytes.
    """
    steps, judge = selected(config, selection), Judge(run, config)
    if selection.stage:
        _refuse_unready(run, judge, steps, force=selection.force)
    found = [(artifact_name(stage.name, instance), judge.state(stage, instance)) for stage, instance in steps]
    return [(name, state) for name, state in found if selection.force or state.kind != "fresh"]


def selected(config: Config, selection: Selection) -> list[Step]:
    """Return the selected instances in the order of the graph; ValueError for names that do not exist."""
    if selection.stage and selection.until:
        raise ValueError("--stage and --until exclude each other: give one of them")
    if selection.instance and not selection.stage:
        raise ValueError("--instance needs --stage: it names one instance of that stage")
    names = [stage.name for stage in STAGES]
    if selection.until:
        names = names[: names.index(find_stage(selection.until).name) + 1]
    if selection.stage:
        names = [find_stage(selection.stage).name]
    steps = [(stage, instance) for stage, instance in instances(config) if stage.name in names]
    if selection.stage and not steps:
        raise ValueError(f"nothing to run: {selection.stage} has no artifact with this configuration")
    if selection.instance is None:
        return steps
    known = [str(instance) for _, instance in steps if instance]
    if selection.instance not in known:
        listed = ", ".join(known) or "none"
        raise ValueError(f"{selection.stage} has no instance {selection.instance!r}; it has: {listed}")
    return [(stage, instance) for stage, instance in steps if instance == selection.instance]


def execute(
    run: RunFolder,
    config: Config,
    stage: Stage,
    instance: str | None,
    *,
    progress: Progress,
    say: Say,
    team: Team = ALONE,
) -> float:
    """Run one instance whose inputs are fresh and publish its artifact; return the seconds it took."""
    name, job = artifact_name(stage.name, instance), os.environ.get("SLURM_JOB_ID")
    expected = expected_recipe(run, config, stage, instance)
    started, start = datetime.now(UTC), time.monotonic()
    with open_work(run.artifact(stage.name, instance), expected.recipe, job=job) as work:
        if work.finished:
            shutil.rmtree(work.path)
            say(f"{name}: was finished, its interrupted publication is completed")
            return 0.0
        team = team if stage.parallel else ALONE
        settings = config.model_dump(mode="json")
        team.announce({"stage": stage.name, "instance": instance, "config": settings, "resumed": work.resumed})
        context = StageContext(run, config, stage, instance, work, progress, team=team)
        sentence: str = importlib.import_module(stage.module).run(context)
        seconds = time.monotonic() - start
        _refuse_changed_inputs(run, config, stage, instance, work)
        work.log({"result": sentence, "seconds": round(seconds, 3), "resumed": work.resumed})
        origin = provenance(started=started, device=context.resolved.get("device", "cpu"), job=job)
        origin["processes"] = team.size
        work.publish({**origin, "seconds": round(seconds, 3), "resolved": context.resolved, **expected.notes})
    say(f"{name}: {sentence} ({spent(seconds)})")
    return seconds


def _refuse_changed_inputs(run: RunFolder, config: Config, stage: Stage, instance: str | None, work: Work) -> None:
    """Another process may have published an input while this one was read: such a mixture is never published."""
    now = json.loads(json.dumps(expected_recipe(run, config, stage, instance).recipe))
    changes = compare_recipes(work.recipe, now)
    if changes:
        work.start_over()
        raise NotReadyError(
            f"{artifact_name(stage.name, instance)}: {'; '.join(changes)} while it was made; give the command again"
        )


def spent(seconds: float) -> str:
    """Return ``0.8 s`` or ``2:05``."""
    return f"{seconds:.1f} s" if seconds < 60 else duration(seconds)


def _refuse_unready(run: RunFolder, judge: Judge, steps: list[Step], *, force: bool) -> None:
    """Refuse steps that read what is not fresh, unless another of the steps makes it."""
    made = {artifact_name(stage.name, instance) for stage, instance in steps}
    for stage, instance in steps:
        problems = [line for line in judge.upstream_problems(stage, instance) if _upstream_name(line) not in made]
        if problems and (force or judge.state(stage, instance).kind != "fresh"):
            raise NotReadyError(f"{artifact_name(stage.name, instance)} cannot run: {_advice(run, judge, problems)}")


def _upstream_name(problem: str) -> str | None:
    """Return ``clusters/k00004`` of ``upstream clusters/k00004 is stale``; None for a line that is no such."""
    if not problem.startswith("upstream ") or " is " not in problem or "sources" in problem:
        return None
    return problem.removeprefix("upstream ").partition(" is ")[0]


def _advice(run: RunFolder, judge: Judge, problems: list[str]) -> str:
    """Return the first problem, the reason behind it and the command that mends it."""
    first = problems[0]
    name = _upstream_name(first)
    if name is None:
        return first
    stage, _, instance = name.partition("/")
    reasons = judge.state(find_stage(stage), instance or None).reasons
    why = f" ({'; '.join(reasons)})" if reasons else ""
    return f"{first}{why}; run `grappa run {quoted(run.root)} --until {stage}` first"
