"""Running stages in the order of the graph: a node is judged just before it runs, and published whole or not at all."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib import metadata
from io import StringIO
from typing import Any

from grappa.pipeline.config.schema import Config
from grappa.pipeline.engine.context import LeadersWork, StageContext
from grappa.pipeline.engine.fingerprints import RANGE, SOURCES, SOURCES_FILE, expected_fingerprint
from grappa.pipeline.engine.freshness import Problem, State, compare_fingerprints
from grappa.pipeline.engine.packages import refuse_missing_packages
from grappa.pipeline.engine.progress import Progress, duration
from grappa.pipeline.engine.status import Judge
from grappa.pipeline.engine.team import ALONE, Team, joined
from grappa.pipeline.graph.node import Node, RowRange
from grappa.pipeline.graph.stages import STAGES, find_stage, inputs_of, nodes
from grappa.pipeline.store.artifacts import Artifact, Fingerprint, RunFolder, damage_sentence, quoted
from grappa.pipeline.store.digests import forget_digests
from grappa.pipeline.store.provenance import provenance
from grappa.pipeline.store.ranges import (
    Joined,
    RangePlan,
    begin_joining,
    begin_plan,
    delete_ranges,
    how_made,
    ranges_folder,
    read_plan,
    remove_ranges,
)
from grappa.pipeline.store.work import Work, open_work, recover

Say = Callable[[str], None]
Reuse = Callable[[Node], bool]


class NotReadyError(ValueError):
    """The inputs of a selected stage are not fresh; the message names the reason and the command that helps."""


@dataclass(frozen=True)
class Selection:
    """The nodes to run: all, those of one stage (or one instance), or all up to a stage.

    ``force``: fresh ones too. ``verify``: every byte is read again first, so that damaged ones are made again.
    ``rows``: of the one node that is selected, only this range of its rows. ``keep_ranges``: ranges of rows that were
    made are joined also with ``force``, which drops them otherwise.
    """

    stage: str | None = None
    instance: str | None = None
    until: str | None = None
    force: bool = False
    verify: bool = False
    rows: RowRange | None = None
    keep_ranges: bool = False


@dataclass
class Report:
    """What was run: seconds by stage, in order. ``leads``: this process ran it, alone or as the leader of a team."""

    seconds: dict[str, float] = field(default_factory=dict)
    num_fresh: int = 0
    leads: bool = True


def run_stages(
    run: RunFolder, config: Config, selection: Selection, *, progress: Progress, say: Say, reuse: Reuse | None = None
) -> Report:
    """Run every selected node that is not fresh; ``say`` gets one line for each.

    ``reuse`` is called before a node is computed; it returns True when it has published a finished artifact of another
    run for the node. Several processes (see ``engine.team``) make the same call: the first leads, the others follow.

    Raises NotReadyError when one stage was selected and its inputs are not fresh, LockedError when another process is
    writing an artifact, ProcessesError when another process of the team failed, and any error that a stage raises.
    After an error finished artifacts stay, and the same call resumes unfinished work.
    """
    with joined() as team:
        if team.leads:
            return lead(run, config, selection, progress=progress, say=say, reuse=reuse, team=team)
        follow(run, team)
        return Report(leads=False)


def lead(
    run: RunFolder,
    config: Config,
    selection: Selection,
    *,
    progress: Progress,
    say: Say,
    reuse: Reuse | None = None,
    team: Team,
) -> Report:
    """Run the stages as ``run_stages`` does, as the leader of a team that exists already."""
    chosen = [replace(node, rows=selection.rows) for node in selected(config, selection)]
    for node in nodes(config):
        recover(run.artifact(node))
    if selection.verify:
        forget_digests()
    if selection.stage:
        _refuse_unready(run, Judge(run, config, verify=selection.verify), chosen, force=selection.force)
    before = Judge(run, config, verify=selection.verify)
    due = (node.stage for node in chosen if selection.force or before.state(node).kind != "fresh")
    refuse_missing_packages(config, due)
    judge, report = Judge(run, config, verify=selection.verify), Report()
    for node in chosen:
        if not selection.force and _is_made(run, judge, node):
            report.num_fresh += 1
            continue
        _refuse_unready(run, judge, [node], force=True)
        if not (reuse and reuse(node)):
            made = None if selection.force else _made_meanwhile(run, judge, node)
            drop = selection.force and not selection.keep_ranges
            seconds = execute(run, config, node, progress=progress, say=say, team=team, made=made, drop_ranges=drop)
            report.seconds[node.stage] = report.seconds.get(node.stage, 0.0) + seconds
        judge.forget(node)
    return report


def _is_made(run: RunFolder, judge: Judge, node: Node) -> bool:
    """Tell whether a node is fresh; a range need not be made either where the whole artifact is fresh."""
    if judge.state(node.whole).kind == "fresh":
        remove_ranges(ranges_folder(run, node))
        return True
    return node.rows is not None and judge.state(node).kind == "fresh"


def _made_meanwhile(run: RunFolder, judge: Judge, node: Node) -> Callable[[], bool]:
    """Return what tells whether a node, which was not fresh, has become fresh; to be asked under the node's lock."""

    def made() -> bool:
        judge.forget(node)
        judge.forget(node.whole)
        return _is_made(run, judge, node)

    return made


def follow(run: RunFolder, team: Team) -> None:
    """Compute the stages that the leader announces together with it, until the leader has finished."""
    for step in team.steps():
        node, config = Node.parse(step["node"]), Config.model_validate(step["config"])
        work = LeadersWork(run.artifact(node).path.with_name(step["folder"]), step["resumed"])
        context = StageContext(run, config, node, work, Progress(StringIO(), terminal=False), team=team)
        _compute(context)


def _compute(context: StageContext) -> str:
    """Call the stage's function; the stage's module, with all that it imports, is loaded only now."""
    compute = getattr(importlib.import_module(context.stage.module), context.stage.entry)
    sentence: str = compute(context)
    return sentence


def planned(run: RunFolder, config: Config, selection: Selection) -> list[tuple[str, State]]:
    """Return the nodes that ``run_stages`` would run now, with their states; nothing is changed.

    A node that is stale only because its inputs are stale may turn out to be fresh: its inputs may be made again with
    the same bytes.
    """
    if selection.verify:
        forget_digests()
    chosen, judge = selected(config, selection), Judge(run, config, verify=selection.verify)
    if selection.stage:
        _refuse_unready(run, judge, chosen, force=selection.force)
    found = [(node.name, judge.state(node)) for node in chosen]
    return [(name, state) for name, state in found if selection.force or state.kind != "fresh"]


def selected(config: Config, selection: Selection) -> list[Node]:
    """Return the selected nodes in the order of the graph; ValueError for names that do not exist."""
    if selection.stage and selection.until:
        raise ValueError("--stage and --until exclude each other: give one of them")
    if selection.instance and not selection.stage:
        raise ValueError("--instance needs --stage: it names one instance of that stage")
    names = [stage.name for stage in STAGES]
    if selection.until:
        names = names[: names.index(find_stage(selection.until).name) + 1]
    if selection.stage:
        names = [find_stage(selection.stage).name]
    chosen = [node for node in nodes(config) if node.stage in names]
    if selection.stage and not chosen:
        raise ValueError(f"nothing to run: {selection.stage} has no artifact with this configuration")
    if selection.instance is None:
        return chosen
    known = [node.instance for node in chosen if node.instance]
    if selection.instance not in known:
        listed = ", ".join(known) or "none"
        raise ValueError(f"{selection.stage} has no instance {selection.instance!r}; it has: {listed}")
    return [node for node in chosen if node.instance == selection.instance]


def execute(
    run: RunFolder,
    config: Config,
    node: Node,
    *,
    progress: Progress,
    say: Say,
    team: Team = ALONE,
    made: Callable[[], bool] | None = None,
    drop_ranges: bool = False,
) -> float:
    """Run one node whose inputs are fresh and publish its artifact; return the seconds it took.

    Where ranges of its rows were made, the missing ones are made first, and the node joins them; ``drop_ranges``: they
    are removed instead. ``made``: asked once the node is locked; nothing is computed where it says True.
    Raises LockedError while another process writes the artifact or one of its ranges.
    """
    job, expected = os.environ.get("SLURM_JOB_ID"), expected_fingerprint(run, config, node)
    started, start = datetime.now(UTC), time.monotonic()
    joins = team.size == 1 and not drop_ranges and not node.rows and read_plan(ranges_folder(run, node)) is not None
    if not joins:  # the inputs of ranges were checked when they were made
        _refuse_damaged_inputs(run, config, node)
    plan = _plan(run, node, expected.fingerprint)
    with open_work(run.artifact(node), expected.fingerprint, job=job) as work:
        if work.finished or (made and made()):
            shutil.rmtree(work.path)
            done = "finished, its interrupted publication is completed" if work.finished else "made meanwhile"
            say(f"{node}: was {done}")
            return 0.0
        if work.dropped:
            say(f"{node}: {work.dropped}; the unfinished work is begun again")
        if not node.rows:
            begin_joining(run, node, drop=drop_ranges)
        joined = _made_ranges(run, config, node, progress, say) if joins else Joined()
        if joins and not joined.folders:
            _refuse_damaged_inputs(run, config, node)
        context = _context(run, config, node, work, progress, team=team, plan=plan, joined=joined)
        begun = time.monotonic()
        sentence = _compute(context)
        taken = round(joined.seconds + time.monotonic() - begun, 3)
        _refuse_changed_inputs(run, config, node, work)
        _log_result(work, joined, sentence, taken)
        origin = provenance(started=started, device=context.resolved.get("device", "cpu"), job=job)
        origin |= {"processes": context.team.size, "seconds": taken, "resolved": context.resolved}
        work.publish({**origin, **expected.notes})
        if not node.rows:
            remove_ranges(ranges_folder(run, node))
    seconds = time.monotonic() - start
    say(f"{node}: {sentence} ({spent(seconds)})")
    return seconds


def _context(
    run: RunFolder,
    config: Config,
    node: Node,
    work: Work,
    progress: Progress,
    *,
    team: Team,
    plan: RangePlan | None,
    joined: Joined,
) -> StageContext:
    """Return what a stage gets, and tell the processes of the team that compute it too to begin."""
    team = team if find_stage(node.stage).parallel and not node.rows else ALONE
    step = {"node": node.name, "folder": work.path.name, "resumed": work.resumed}
    team.announce({**step, "config": config.model_dump(mode="json")})
    context = StageContext(run, config, node, work, progress, team=team, plan=plan, ranges=joined.folders)
    context.resolved.update(joined.resolved)
    return context


def _log_result(work: Work, joined: Joined, sentence: str, seconds: float) -> None:
    for record in joined.log_lines():
        work.log(record)
    work.log({"result": sentence, "seconds": seconds, "resumed": work.resumed})


def _plan(run: RunFolder, node: Node, fingerprint: Fingerprint) -> RangePlan | None:
    """Return what a range has in common with the other ranges of its artifact; None for a whole artifact."""
    return begin_plan(ranges_folder(run, node), node.rows.total, _shared(fingerprint)) if node.rows else None


def _shared(fingerprint: Fingerprint) -> Fingerprint:
    return {**fingerprint, "config": {name: each for name, each in fingerprint["config"].items() if name != RANGE}}


def _with_range(fingerprint: Fingerprint, node: Node) -> Fingerprint:
    assert node.rows
    return {**fingerprint, "config": {**fingerprint["config"], RANGE: node.rows.name}}


def _made_ranges(run: RunFolder, config: Config, node: Node, progress: Progress, say: Say) -> Joined:
    """Return the ranges that a node joins, all of them made; none where there are none with its fingerprint.

    Ranges that are missing or damaged are made now, one by one. Where others were made in another way than this process
    makes them (``store.ranges.how_made``), no range is made, and none is joined.
    """
    plan = read_plan(ranges_folder(run, node))
    if plan is None:
        return Joined()
    ranges = node.ranges(plan.total)
    expected = json.loads(json.dumps(expected_fingerprint(run, config, ranges[0]).fingerprint))
    if _shared(expected) != plan.shared:
        return Joined()

    def made() -> list[dict[str, Any] | None]:
        return [how_made(run.artifact(each), _with_range(expected, each)) for each in ranges]

    found = made()
    if not _all_alike(found):
        here = _how_here(config, plan)
        others = [how for how in found if how not in (None, here)]
        if others:
            say(f"{node}: ranges of {_differences(others[0], here)} are not joined; all rows are computed in one pass")
            return Joined()
        due = [each for each, how in zip(ranges, found, strict=True) if how is None]
        say(f"{node}: {len(ranges) - len(due)} of {len(ranges)} ranges are taken over, the others are computed now")
        for each in due:
            execute(run, config, each, progress=progress, say=say)
        found = made()
    return Joined.of([run.artifact(each) for each in ranges]) if _all_alike(found) else Joined()


def _all_alike(found: list[dict[str, Any] | None]) -> bool:
    return None not in found and all(each == found[0] for each in found)


def _differences(how: dict[str, Any], here: dict[str, Any]) -> str:
    """Return ``device cuda (here cpu)``, for each value in which a range differs from those made here."""
    names = [name for name in sorted({*how, *here}) if how.get(name) != here.get(name)]
    return ", ".join(f"{name} {how.get(name)} (here {here.get(name)})" for name in names)


def _how_here(config: Config, plan: RangePlan) -> dict[str, Any]:
    """Return how this process makes a range, as ``how_made`` tells it of a range that is made."""
    from grappa.core.devices import resolve_device

    kind = resolve_device(config.compute.device).type
    return {**plan.resolved(), "device": kind, "torch": metadata.version("torch")}


def _refuse_damaged_inputs(run: RunFolder, config: Config, node: Node) -> None:
    """Refuse inputs whose bytes are not those of their manifest, or a result would be made of damaged ones.

    A file that this process has written or read needs no reading again. A range reads only its share of the files of a
    folder, such as those of all pixels, so that all ranges together read each file once; where one finds damage, no
    range is trusted any more, for each may have read that file.
    """
    files: dict[Node, list[str]] = {}
    for each in inputs_of(node, config):
        files.setdefault(each.node, []).extend(each.files)
    if "sources" in find_stage(node.stage).externals:
        files[SOURCES] = [SOURCES_FILE]
    for source, names in files.items():
        artifact = run.artifact(source)
        problems = artifact.check(read=_share(artifact, names, node.rows) if node.rows else names)
        if problems and node.rows:
            delete_ranges(ranges_folder(run, node))
        if problems:
            raise NotReadyError(f"{node} cannot run: {damage_sentence(run, source.name, problems)}")


def _share(artifact: Artifact, names: list[str], rows: RowRange) -> list[str]:
    """Return the files that a range checks: those that are named, and of the files of folders each ``total``-th."""
    manifest = artifact.manifest()
    assert manifest is not None, "the inputs were judged to be fresh"
    folders = tuple(name for name in names if name.endswith("/"))
    inside = [file for file in sorted(manifest.outputs) if folders and file.startswith(folders)]
    return [name for name in names if name not in folders] + inside[rows.number - 1 :: rows.total]


def _refuse_changed_inputs(run: RunFolder, config: Config, node: Node, work: Work) -> None:
    """Refuse to publish a mixture: another process may have replaced an input while this process was reading it."""
    now = json.loads(json.dumps(expected_fingerprint(run, config, node).fingerprint))
    changes = compare_fingerprints(work.fingerprint, now)
    if changes:
        work.start_over()
        raise NotReadyError(f"{node}: {'; '.join(changes)} while it was made; give the command again")


def spent(seconds: float) -> str:
    """Return ``0.8 s`` or ``2:05``."""
    return f"{seconds:.1f} s" if seconds < 60 else duration(seconds)


def _refuse_unready(run: RunFolder, judge: Judge, chosen: list[Node], *, force: bool) -> None:
    """Refuse nodes whose inputs are not fresh, unless another chosen node makes these inputs."""
    for node in chosen:
        problems = [problem for problem in judge.upstream_problems(node) if problem.node not in chosen]
        if problems and (force or judge.state(node).kind != "fresh"):
            raise NotReadyError(f"{node} cannot run: {_advice(run, judge, problems[0])}")


def _advice(run: RunFolder, judge: Judge, problem: Problem) -> str:
    """Return the problem, its reason and the command that solves it."""
    if problem.text:
        return problem.text
    reasons = judge.state(problem.node).reasons
    why = f" ({'; '.join(reasons)})" if reasons else ""
    return f"{problem}{why}; run `grappa run {quoted(run.root)} --until {problem.node.stage}` first"
