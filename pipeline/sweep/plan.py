"""What a sweep would compute and what it would take over, known before anything is computed.

The recipe of an artifact is known only when its inputs are there. Until then its *key* stands for it: a digest of its
stage's version, its settings and the keys of its inputs. Equal keys mean equal recipes; unequal ones may still turn
out to be equal, when inputs come out with the same bytes, so that less is computed than planned.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grappa.pipeline.config.schema import Config, identity_settings
from grappa.pipeline.config.yaml_file import ConfigError
from grappa.pipeline.engine.execution import Selection, selected
from grappa.pipeline.engine.externals import MissingInputError, detector_digests, weights_digest
from grappa.pipeline.engine.sources import same_listing
from grappa.pipeline.engine.status import Judge, read_config
from grappa.pipeline.graph.stages import find_stage, inputs_of, nodes
from grappa.pipeline.store.artifacts import RUN_FILE, RunFolder
from grappa.pipeline.sweep.runs import Sweep, SweepRun

Keys = dict[str, str]


@dataclass
class Planned:
    """The artifacts of one run: fresh already, to be taken over (by the run that has them first), to be computed."""

    name: str
    fresh: list[str] = field(default_factory=list)
    taken: dict[str, list[str]] = field(default_factory=dict)
    computed: list[str] = field(default_factory=list)

    @property
    def num_taken(self) -> int:
        return sum(map(len, self.taken.values()))

    def lines(self) -> Iterator[str]:
        """Yield a line for what is computed, and one for each run that something is taken over from."""
        if self.computed:
            yield f"{self.name}: would compute {braced(self.computed)}"
        for source, names in self.taken.items():
            yield f"{self.name}: would take over from {source} {braced(names)}"
        if not self.computed and not self.taken:
            yield f"{self.name}: nothing to do, all is fresh"


def plan(sweep: Sweep) -> list[Planned]:
    """Return what each run would do, one after the other, as things are now; nothing is changed."""
    weights = _Weights()
    there = {run.name: _fresh_keys(_open(run.root), run, weights) for run in sweep.runs}
    other = {str(sweep.other.root): _fresh_keys(sweep.other, sweep.runs[0], weights)} if sweep.other else {}
    found = {key: name for name, keys in reversed((other | there).items()) for key in keys.values()}
    return [_plan_one(run, sweep.file.until, there[run.name], found, weights) for run in sweep.runs]


def braced(names: Iterable[str]) -> str:
    """Return ``backbone, clusters/{k00004,k00008}``: artifacts of one stage are named together."""
    stages: dict[str, list[str]] = {}
    for name in names:
        stage, _, instance = name.partition("/")
        stages.setdefault(stage, []).extend([instance] if instance else [])
    several = {
        stage: f"/{{{','.join(each)}}}" if len(each) > 1 else f"/{each[0]}" for stage, each in stages.items() if each
    }
    return ", ".join(f"{stage}{several.get(stage, '')}" for stage in stages)


def _plan_one(run: SweepRun, until: str, mine: Keys, found: dict[str, str], weights: _Weights) -> Planned:
    planned, wanted = Planned(run.name), _keys(run.config, _listed(run), weights)
    for node in selected(run.config, Selection(until=until)):
        name = node.name
        key = wanted[name]
        if mine.get(name) == key:
            planned.fresh.append(name)
        elif key in found:
            planned.taken.setdefault(found[key], []).append(name)
        else:
            planned.computed.append(name)
        found.setdefault(key, run.name)
    return planned


def _listed(run: SweepRun) -> str:
    """Return what stands for the images listed now."""
    return f"listed now from {list(run.config.images.sources)}"


def _open(root: Path) -> RunFolder | None:
    return RunFolder.open(root) if (root / RUN_FILE).exists() else None


def _fresh_keys(folder: RunFolder | None, run: SweepRun, weights: _Weights) -> Keys:
    """Return the keys of what is fresh in a folder by the configuration that it has; its images may be the run's."""
    if folder is None:
        return {}
    try:
        config = read_config(folder)
    except ConfigError:
        return {}
    listed = _listed(run) if same_listing(folder, run.listing) else f"listed in {folder.root}"
    keys, judge = _keys(config, listed, weights), Judge(folder, config)
    return {node.name: keys[node.name] for node in nodes(config) if judge.state(node).kind == "fresh"}


def _keys(config: Config, listed: str, weights: _Weights) -> Keys:
    """Return the key of every instance by the artifact's name."""
    keys: Keys = {}
    for node in nodes(config):
        name, stage = node.name, find_stage(node.stage)
        inputs = [[each.node.name, list(each.files), keys[each.node.name]] for each in inputs_of(node, config)]
        outside = {"sources": listed, "originals": listed, "weights": weights.digest(config)}
        outside["detector"] = weights.detector(config)
        parts: list[Any] = [name, stage.version, identity_settings(config, stage.settings(node.instance)), inputs]
        parts += [outside[external] for external in stage.externals]
        keys[name] = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    return keys


class _Weights:
    """Digests of weights, each file read once; the path stands for a file that is gone."""

    def __init__(self) -> None:
        self._known: dict[str, str] = {}

    def digest(self, config: Config) -> str:
        path = config.backbone.weights
        if path is None:
            return f"hub {config.backbone.name}"
        if path not in self._known:
            try:
                self._known[path] = weights_digest(Path(path))["sha256"]
            except MissingInputError:
                self._known[path] = path
        return self._known[path]

    def detector(self, config: Config) -> str:
        model = str(config.objects.model)
        if config.objects.provider != "grounding_dino" or model in self._known:
            return self._known.get(model, "")
        try:
            self._known[model] = json.dumps(detector_digests(config, None)[0])
        except MissingInputError:
            self._known[model] = model
        return self._known[model]
