"""The state of every instance of every stage, and why: what `grappa status` prints and `grappa run` acts upon."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from grappa.pipeline.config.schema import Config
from grappa.pipeline.config.yaml_file import ConfigError, load_config
from grappa.pipeline.engine.externals import MissingInputError
from grappa.pipeline.engine.fingerprints import expected_recipe, read_manifest
from grappa.pipeline.engine.freshness import State, artifact_state
from grappa.pipeline.graph.stages import STAGES, Stage, artifact_name, find_stage
from grappa.pipeline.store.artifacts import RunFolder, quoted


@dataclass(frozen=True)
class InstanceState:
    """One instance (None: the stage's only one) and its state."""

    stage: str
    instance: str | None
    state: State

    @property
    def name(self) -> str:
        return artifact_name(self.stage, self.instance)

    def to_json(self) -> dict[str, Any]:
        """Return what `grappa status --json` lists."""
        return {
            "stage": self.stage,
            "instance": self.instance,
            "state": self.state.kind,
            "reasons": list(self.state.reasons),
        }


def read_config(run: RunFolder) -> Config:
    """Return the configuration of a run; a sentence when it has none or one that cannot be used."""
    if not run.config_path.exists():
        raise ConfigError(f"{run.config_path} is missing; write one by `grappa init {quoted(run.root)} --images ...`")
    return load_config(run.config_path)


def instances(config: Config) -> Iterator[tuple[Stage, str | None]]:
    """Yield every instance of every stage in the order of the graph."""
    for stage in STAGES:
        for instance in stage.instances(config):
            yield stage, instance


class Judge:
    """Judges instances on demand and remembers: each artifact is looked at once, whatever hangs on it."""

    def __init__(self, run: RunFolder, config: Config, *, verify: bool = False) -> None:
        self._run, self._config, self._verify = run, config, verify
        self._states: dict[str, State] = {}

    def state(self, stage: Stage, instance: str | None) -> State:
        """Return the state of an instance; what it reads is judged first."""
        name = artifact_name(stage.name, instance)
        if name not in self._states:
            self._states[name] = self._judge(stage, instance)
        return self._states[name]

    def forget(self, stage: Stage, instance: str | None) -> None:
        """Look at an instance again when asked the next time; those that read it must not have been judged yet."""
        self._states.pop(artifact_name(stage.name, instance), None)

    def upstream_problems(self, stage: Stage, instance: str | None) -> list[str]:
        """Return a line for each thing that an instance reads and that is not fresh."""
        lines = self._sources_problems() if "sources" in stage.externals else []
        for each in dict.fromkeys((x.stage, x.instance) for x in stage.inputs(self._config, instance)):
            kind = self.state(find_stage(each[0]), each[1]).kind
            if kind != "fresh":
                lines.append(f"upstream {artifact_name(*each)} is {kind}")
        return lines

    def _judge(self, stage: Stage, instance: str | None) -> State:
        problems = self.upstream_problems(stage, instance)
        recipe = None
        try:
            recipe = expected_recipe(self._run, self._config, stage, instance).recipe
        except MissingInputError as error:
            problems += [] if problems else [str(error)]
        return artifact_state(self._run.artifact(stage.name, instance), recipe, problems, self._verify)

    def _sources_problems(self) -> list[str]:
        manifest = read_manifest(self._run, "sources")
        advice = f"run `grappa init {quoted(self._run.root)}`"
        sources = self._run.artifact("sources")
        if not sources.home.exists():
            return [f"upstream sources is missing: {advice}"]
        problems = [f"upstream sources is corrupt: {line}; {advice}" for line in sources.check(self._verify)]
        if manifest and manifest.provenance.get("sources") != list(self._config.images.sources):
            problems.append(f"images.sources was edited since the images were listed: {advice}")
        if self._verify and not problems:
            problems += self._changed_images(advice)
        return problems

    def _changed_images(self, advice: str) -> list[str]:
        from grappa.pipeline.engine.sources import changed_files

        changed = changed_files(self._run)
        if not changed:
            return []
        return [f"images changed since init: {len(changed)} files, first {changed[0]}; {advice}"]


def states(run: RunFolder, config: Config, *, verify: bool = False) -> list[InstanceState]:
    """Return the state of every instance in the order of the graph; ``verify`` re-hashes outputs, re-sizes images."""
    judge = Judge(run, config, verify=verify)
    return [InstanceState(stage.name, instance, judge.state(stage, instance)) for stage, instance in instances(config)]


def status_lines(found: list[InstanceState], notes: Mapping[str, str] | None = None) -> list[str]:
    """Return the text of `grappa status`: a line an instance, with its note if any, a line below for each reason."""
    width = max(len(each.name) for each in found)
    lines = []
    for each in found:
        note = (notes or {}).get(each.name, "")
        lines.append(f"{each.name:<{width}}  {each.state.kind:<{8 if note else 0}}{note}")
        lines += [f"{'':<{width}}    {reason}" for reason in each.state.reasons]
    return lines
