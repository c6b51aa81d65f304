"""The state of every node of the graph, with reasons: `grappa status` prints it, `grappa run` acts upon it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from grappa.pipeline.config.schema import Config
from grappa.pipeline.config.yaml_file import ConfigError, load_config
from grappa.pipeline.engine.externals import MissingInputError
from grappa.pipeline.engine.fingerprints import SOURCES, expected_fingerprint, read_manifest
from grappa.pipeline.engine.freshness import Problem, State, artifact_state
from grappa.pipeline.graph.node import Node
from grappa.pipeline.graph.stages import find_stage, nodes, upstream
from grappa.pipeline.store.artifacts import Manifest, RunFolder, quoted, repair_command
from grappa.pipeline.store.digests import forget_digests


@dataclass(frozen=True)
class NodeState:
    """A node and the state of its artifact."""

    node: Node
    state: State

    @property
    def name(self) -> str:
        return self.node.name

    def to_json(self) -> dict[str, Any]:
        """Return the entry of this node in `grappa status --json`."""
        return {
            "stage": self.node.stage,
            "instance": self.node.instance,
            "state": self.state.kind,
            "reasons": list(self.state.reasons),
        }


def read_config(run: RunFolder) -> Config:
    """Return the configuration of a run; ConfigError when it is missing or cannot be used."""
    if not run.config_path.exists():
        raise ConfigError(f"{run.config_path} is missing; write one by `grappa init {quoted(run.root)} --images ...`")
    config = load_config(run.config_path)
    for name in ("cache_size", "cache"):
        if getattr(config.images, name) == "auto":
            raise ConfigError(f"images.{name} is still `auto`; `grappa init {quoted(run.root)}` resolves it")
    return config


class Judge:
    """Judges nodes on demand and remembers their states: every manifest is read once, however many nodes ask for it."""

    def __init__(self, run: RunFolder, config: Config, *, verify: bool = False) -> None:
        self._run, self._config, self._verify = run, config, verify
        self._states: dict[Node, State] = {}
        self._manifests: dict[Node, Manifest | None] = {}

    def state(self, node: Node) -> State:
        """Return the state of a node; the nodes that it reads are judged first."""
        if node not in self._states:
            self._states[node] = self._judge(node)
        return self._states[node]

    def forget(self, node: Node) -> None:
        """Judge a node again at the next call of ``state``; no node that reads it may have been judged yet."""
        self._states.pop(node, None)
        self._manifests.clear()

    def upstream_problems(self, node: Node) -> list[Problem]:
        """Return a problem for every artifact that a node reads and that is not fresh."""
        problems = self._sources_problems() if "sources" in find_stage(node.stage).externals else []
        kinds = {each: self.state(each).kind for each in upstream(node, self._config)}
        return problems + [Problem(each, kind) for each, kind in kinds.items() if kind != "fresh"]

    def _manifest(self, node: Node) -> Manifest | None:
        if node not in self._manifests:
            self._manifests[node] = read_manifest(self._run, node)
        return self._manifests[node]

    def _judge(self, node: Node) -> State:
        found = self.upstream_problems(node)
        problems, above = [str(each) for each in found], {str(each) for each in found if not each.text}
        fingerprint = None
        try:
            fingerprint = expected_fingerprint(self._run, self._config, node, self._manifest).fingerprint
        except MissingInputError as error:
            problems = problems or [str(error)]
        state = artifact_state(self._run.artifact(node), fingerprint, problems, self._verify)
        return replace(state, causes=tuple(reason for reason in state.reasons if reason not in above))

    def _sources_problems(self) -> list[Problem]:
        """Return the problems of the listed images; `grappa init` solves them."""
        advice = f"run `grappa init {quoted(self._run.root)}`"
        manifest, sources = self._manifest(SOURCES), self._run.artifact(SOURCES)
        if not sources.home.exists():
            return [Problem(SOURCES, "missing", f"upstream sources is missing: {advice}")]
        problems = [
            Problem(SOURCES, "corrupt", f"upstream sources is corrupt: {line}; {advice}")
            for line in sources.check(self._verify)
        ]
        wanted, known = self._config.images.listed_by, manifest.provenance if manifest else {}
        edited = [name for name, value in wanted.items() if name in known and known[name] != value]
        if edited:
            text = f"images.{edited[0]} was edited since the images were listed: {advice}"
            problems.append(Problem(SOURCES, "stale", text))
        if self._verify and not problems:
            problems += self._changed_images(advice)
        return problems

    def _changed_images(self, advice: str) -> list[Problem]:
        from grappa.pipeline.engine.sources import changed_files

        changed = changed_files(self._run)
        if not changed:
            return []
        text = f"images changed since init: {len(changed)} files, first {changed[0]}; {advice}"
        return [Problem(SOURCES, "stale", text)]


def states(run: RunFolder, config: Config, *, verify: bool = False) -> list[NodeState]:
    """Return the state of every node in the order of the graph; ``verify`` hashes outputs and images again."""
    if verify:
        forget_digests()
    judge = Judge(run, config, verify=verify)
    return [NodeState(node, judge.state(node)) for node in nodes(config)]


def cure_lines(run: RunFolder, found: Sequence[NodeState]) -> list[str]:
    """Return a line for each command that repairs what is damaged, and how much it repairs; empty without damage."""
    reasons = [reason for each in found for reason in each.state.reasons]
    damaged = [SOURCES.name] if any(reason.startswith(f"upstream {SOURCES} is corrupt") for reason in reasons) else []
    damaged += [each.name for each in found if each.state.kind == "corrupt"]
    commands: dict[str, list[str]] = {}
    for name in damaged:
        commands.setdefault(repair_command(run, name), []).append(name)
    return [f"{', '.join(names)}: damaged; repair by `{command}`" for command, names in commands.items()]


def status_lines(found: Sequence[NodeState], notes: Mapping[str, str] | None = None) -> list[str]:
    """Return the text of `grappa status`: a line for a node, with its note, and a line below for each reason."""
    width = max(len(each.name) for each in found)
    lines = []
    for each in found:
        note = (notes or {}).get(each.name, "")
        lines.append(f"{each.name:<{width}}  {each.state.kind:<{8 if note else 0}}{note}")
        lines += [f"{'':<{width}}    {reason}" for reason in each.state.reasons]
    return lines
