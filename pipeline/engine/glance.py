"""The state of a run in one glance: each cause once, and how many artifacts follow from it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from grappa.pipeline.config.yaml_file import ConfigError
from grappa.pipeline.engine.status import NodeState, read_config, states
from grappa.pipeline.graph.node import Node
from grappa.pipeline.graph.stages import with_upstream
from grappa.pipeline.store.artifacts import RUN_FILE, RunFolder, quoted

MOST_NAMES = 4  # artifacts that are named in a line


def short_lines(found: Sequence[NodeState], notes: Mapping[str, str] | None = None) -> list[str]:
    """Return the text of `grappa status`; ``grappa.pipeline.engine.status.status_lines`` is that of `--long`.

    Artifacts with a note, such as that of a job, have a line of their own.
    """
    noted = [(each.name, each.state.kind, notes[each.name]) for each in found if notes and notes.get(each.name)]
    width = max((len(name) for name, _, _ in noted), default=0)
    lines = [f"{name:<{width}}  {kind:<8}{note}" for name, kind, note in noted]
    missing = [each for each in found if each.state.kind == "missing"]
    some = [f"{len(missing)} missing: {_stages(missing)}"] if 0 < len(missing) < len(found) else []
    return [*lines, *cause_lines(found), *some, counts_line(found)]


def cause_lines(found: Iterable[NodeState]) -> list[str]:
    """Return a line for each cause by which artifacts are stale or corrupt, and one for all that follow from them."""
    found = list(found)
    following = [each for each in found if each.state.follows]
    follow = "artifact follows" if len(following) == 1 else "artifacts follow"
    rest = [f"{len(following)} {follow} (`grappa status --long` names all): {_stages(following)}"] if following else []
    return _causes(found) + rest


def counts_line(found: Iterable[NodeState]) -> str:
    """Return ``35 artifacts: 20 fresh, 15 stale``."""
    counts = Counter(each.state.kind for each in found)
    return f"{counts.total()} artifacts: {', '.join(f'{number} {kind}' for kind, number in counts.items())}"


def stale_notice(root: Path, *names: str) -> str:
    """Return a sentence where one of the named artifacts of a run is not fresh, with the cause; else "".

    It is empty too for a folder that is no run, and for artifacts that are missing.
    """
    if not (root / RUN_FILE).exists():
        return ""
    run = RunFolder.open(root)
    try:
        config = read_config(run)
        found = {each.node: each for each in states(run, config)}
    except ConfigError as error:
        return f"whether {' and '.join(names)} of {root} are up to date is unknown: {error}"
    wanted = [found[node] for node in map(Node.parse, names) if node in found]
    stale = [each for each in wanted if each.state.kind in ("stale", "corrupt")]
    if not stale:
        return ""
    above = with_upstream([each.node for each in stale], config)
    causes = _causes(each for each in found.values() if each.node in above)
    cause = causes[0] if causes else "an artifact that it is made from is missing"
    return (
        f"{_names([each.name for each in stale])} not up to date: {cause}; `grappa run {quoted(root)}` brings "
        f"{'it' if len(stale) == 1 else 'them'} up to date"
    )


def _causes(found: Iterable[NodeState]) -> list[str]:
    causes: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for each in found:
        if each.state.causes:
            causes.setdefault((each.state.kind, each.state.causes), []).append(each.name)
    return [f"{_names(names)} {kind}: {'; '.join(reasons)}" for (kind, reasons), names in causes.items()]


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return f"{', '.join(names[:MOST_NAMES])}{more} {'is' if len(names) == 1 else 'are'}"


def _stages(found: Iterable[NodeState]) -> str:
    counts = Counter(each.node.stage for each in found)
    return ", ".join(stage if number == 1 else f"{stage} {number}" for stage, number in counts.items())
