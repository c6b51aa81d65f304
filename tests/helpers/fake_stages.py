"""Runs whose stages are small functions: the graph is the real one, the files are a few bytes and need no torch.

Each fake stage writes every file that some other stage reads from it; the bytes depend on its settings and inputs.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from grappa.pipeline.config.schema import Config, identity_settings
from grappa.pipeline.config.yaml_file import dump_config, parse_settings
from grappa.pipeline.engine.context import StageContext
from grappa.pipeline.engine.execution import Report, Selection, run_stages
from grappa.pipeline.engine.fingerprints import SOURCES_FILE, SOURCES_FINGERPRINT
from grappa.pipeline.engine.progress import Progress
from grappa.pipeline.engine.status import states
from grappa.pipeline.graph.stages import STAGES, inputs_of, nodes
from grappa.pipeline.store.artifacts import RunFolder
from grappa.pipeline.store.work import open_work

Hook = Callable[[StageContext], None]

VERDICT = {"verdict": "helped", "choice": "fused", "images": "test", "num_images": 8, "models": []}


class FakeStages:
    """A run folder and what happens in it; ``ran`` lists the artifacts made since the last ``clear``."""

    def __init__(self, root: Path) -> None:
        self.root, self.ran, self.said = root, list[str](), list[str]()
        self.same_bytes: set[str] = set()
        self.hooks: dict[str, Hook] = {}
        (root.parent / "weights.safetensors").write_bytes(b"weights")
        self.settings: dict[str, dict[str, Any]] = {
            "images": {"sources": ["/images"], "cache_size": 256, "cache": "raw"},
            "backbone": {"weights": str(root.parent / "weights.safetensors")},
            "clusters": {"num_clusters": [2, 4]},
        }
        self.run = RunFolder.create(root)
        self.publish_sources("birds/a.png")
        self.configure()

    @property
    def config(self) -> Config:
        return parse_settings(self.settings, "test")

    def configure(self, **changes: dict[str, Any]) -> None:
        """Change settings, section by section, and write config.yaml."""
        for section, fields in changes.items():
            self.settings.setdefault(section, {}).update(fields)
        self.run.config_path.write_text(dump_config(self.config))

    def publish_sources(self, name: str) -> None:
        """Publish a listing of one image of that name."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        with open_work(self.run.artifact("sources"), SOURCES_FINGERPRINT) as work:
            pq.write_table(pa.table({"path": [name], "root": [0], "size": [1]}), work.path / SOURCES_FILE)
            work.publish({"roots": ["/no such folder"], "sources": self.settings["images"]["sources"]})

    def execute(self, **selection: Any) -> Report:
        """Call ``run_stages``; ``ran`` and ``said`` then hold what this call did."""
        self.ran.clear()
        self.said.clear()
        progress = Progress(StringIO(), terminal=False)
        return run_stages(self.run, self.config, Selection(**selection), progress=progress, say=self.said.append)

    def states(self, *, verify: bool = False) -> dict[str, str]:
        """Return every artifact's state as text, such as ``stale: config clusters.seed: 0 -> 1``."""
        return {each.name: str(each.state) for each in states(self.run, self.config, verify=verify)}

    def not_fresh(self, *, verify: bool = False) -> dict[str, str]:
        return {name: state for name, state in self.states(verify=verify).items() if state != "fresh"}

    def stage(self, context: StageContext) -> str:
        self.ran.append(context.name)
        if context.name in self.hooks:
            self.hooks[context.name](context)
        names = output_names(context.config, context.stage.name)
        content = b"the same" if context.name in self.same_bytes else content_of(context)
        for name in names:
            path = context.path / (f"{name}00000.npy" if name.endswith("/") else name)
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(name.encode() + content)
            if name == "images.parquet":
                _write_table(path, content)
            if name == "verdict.json":
                path.write_text(json.dumps(VERDICT | {"evidence": content.hex()}))
        return f"{len(names)} files"


def _write_table(path: Path, content: bytes) -> None:
    """The one output that something beside the stages reads: `status --verify` compares the files' digests."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    empty = {name: pa.array([], pa.string()) for name in ("path", "root", "sha256", content.hex())}
    pq.write_table(pa.table(empty), path)


def output_names(config: Config, stage: str) -> list[str]:
    """Return the files that other stages read from a stage (at least one)."""
    inputs = [each for node in nodes(config) for each in inputs_of(node, config)]
    names = {name for each in inputs if each.stage == stage for name in each.files}
    return sorted(names) or ["result.bin"]


def content_of(context: StageContext) -> bytes:
    """Return bytes that depend on the settings and on the bytes of all declared inputs."""
    digest = hashlib.sha256(repr(identity_settings(context.config, context.stage.settings(context.instance))).encode())
    for each in inputs_of(context.node, context.config):
        folder = context.input(each.stage, each.instance)
        for name in each.files:
            digest.update((folder / (f"{name}00000.npy" if name.endswith("/") else name)).read_bytes())
    return digest.digest()


def fake_stages(root: Path, monkeypatch: pytest.MonkeyPatch) -> FakeStages:
    """Return a run with fake stages in place of the real ones, without what only costs time here."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr("grappa.pipeline.engine.execution.provenance", lambda **origin: {"device": origin["device"]})
    fakes = FakeStages(root)
    entries = {stage.entry: fakes.stage for stage in STAGES}
    for stage in STAGES:
        monkeypatch.setitem(sys.modules, stage.module, SimpleNamespace(**entries))
    return fakes
