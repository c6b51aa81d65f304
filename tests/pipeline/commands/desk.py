"""A run to be, and what is made of it: shared by the tests of `grappa init`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from grappa.pipeline.commands.init import Request, initialize
from grappa.pipeline.config.schema import Config
from grappa.pipeline.config.yaml_file import load_config
from grappa.pipeline.engine.sources import published_listing
from grappa.pipeline.engine.status import states
from grappa.pipeline.store.artifacts import RunFolder
from tests.helpers.fake_stages import FakeStages, fake_stages


class Desk:
    """A folder of listed files (nothing is decoded here) and a run to be."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.root, self.images = folder, folder / "run", folder / "images"
        self.said: list[str] = []
        for domain, count in {"birds": 6, "cars": 10}.items():
            for number in range(count):
                self.add(f"{domain}/class/{number}.png")

    def add(self, path: str) -> None:
        file = self.images / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(path.encode())

    def init(self, root: Path | None = None, **request: Any) -> Config:
        self.said.clear()
        return initialize(root or self.root, Request(**request), say=self.said.append)

    def new(self, *assignments: str) -> Config:
        return self.init(images=[str(self.images)], assignments=assignments)

    def listing(self) -> pd.DataFrame:
        listing = published_listing(RunFolder.open(self.root))
        assert listing is not None
        return listing

    def states(self) -> dict[str, str]:
        return {each.name: str(each.state) for each in states(RunFolder.open(self.root), self.config)}

    @property
    def config(self) -> Config:
        return load_config(self.root / "config.yaml")

    @property
    def digest(self) -> str:
        manifest = RunFolder.open(self.root).artifact("sources").manifest()
        assert manifest
        return manifest.outputs["sources.parquet"]["sha256"]


def made(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> FakeStages:
    """Make a complete run at ``desk.root`` with fake stages."""
    fakes = fake_stages(desk.folder / "spare", monkeypatch)
    desk.new(f"backbone.weights={desk.folder / 'weights.safetensors'}", "clusters.num_clusters=[2, 4]")
    fakes.root, fakes.run = desk.root, RunFolder.open(desk.root)
    fakes.settings = desk.config.model_dump(mode="json")
    fakes.execute()
    return fakes
