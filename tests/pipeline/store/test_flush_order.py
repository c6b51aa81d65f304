"""What a note or a manifest claims was flushed to the disk before the note got its name."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grappa.images.caching.manifests import ShardManifests
from grappa.images.pixels import shard_file, write_shard_claimed
from grappa.pipeline.store.artifacts import RunFolder
from grappa.pipeline.store.checkpoints import ArrayCheckpoint, RowCheckpoint
from grappa.pipeline.store.work import open_work


class Disk:
    """Records which files have been flushed, and which were when a file got its name."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.flushed = set[int]()
        self.flushed_before: dict[str, set[int]] = {}
        fsync, flush = os.fsync, np.memmap.flush

        def recorded_fsync(descriptor: int) -> None:
            fsync(descriptor)
            self.flushed.add(os.fstat(descriptor).st_ino)

        def recorded_flush(array: np.memmap[Any, Any]) -> None:
            flush(array)
            self.flushed.add(os.stat(str(array.filename)).st_ino)

        monkeypatch.setattr(os, "fsync", recorded_fsync)
        monkeypatch.setattr(np.memmap, "flush", recorded_flush)
        for name in ("replace", "rename"):
            monkeypatch.setattr(os, name, self._naming(getattr(os, name)))

    def _naming(self, function: Callable[..., None]) -> Callable[..., None]:
        def named(source: str | Path, target: str | Path) -> None:
            needs_none = Path(source).is_dir() or ".lock" in str(source)  # a lock need not outlive the machine
            assert needs_none or os.stat(source).st_ino in self.flushed, f"{target} was named before it was flushed"
            function(source, target)
            self.flushed_before[Path(target).name] = set(self.flushed)

        return named

    def was_flushed(self, *files: Path, before: str) -> bool:
        return {os.stat(file).st_ino for file in files} <= self.flushed_before[before]


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def test_outputs_and_their_folders_are_flushed_before_the_manifest(tmp_path: Path, disk: Disk) -> None:
    artifact = RunFolder.create(tmp_path / "run").artifact("images")
    recipe = {"stage": "images", "instance": None, "version": 1, "config": {}, "inputs": {}}
    with open_work(artifact, recipe) as work:
        (work.path / "pixels").mkdir()
        for name in ("images.parquet", "pixels/00000.npy", "pixels/index.npy"):
            (work.path / name).write_text(name)
        work.log({"step": 1})
        work.publish({})
    made = [path for path in artifact.path.rglob("*") if path.name != "manifest.json"]
    assert len(made) == 5 and disk.was_flushed(*made, artifact.path, before="manifest.json")
    assert disk.was_flushed(*made, artifact.path / "manifest.json", before="images")


def test_rows_are_flushed_before_they_are_noted(tmp_path: Path, disk: Disk) -> None:
    out = np.lib.format.open_memmap(tmp_path / "features.npy", mode="w+", dtype=np.float32, shape=(8, 2))
    disk.flushed.clear()
    RowCheckpoint(tmp_path, seconds=0).offer(4, out)
    assert disk.was_flushed(tmp_path / "features.npy", before="checkpoint.json")


def test_boxes_are_flushed_before_they_are_noted(tmp_path: Path, disk: Disk) -> None:
    ArrayCheckpoint(tmp_path / "boxes.npy").save(np.eye(2))
    assert disk.was_flushed(tmp_path / "boxes.npy", before="boxes.json")


def test_pixels_are_flushed_before_they_are_noted(tmp_path: Path, disk: Disk) -> None:
    _, pixels = write_shard_claimed(tmp_path, 0, [np.zeros((2, 2, 3), np.uint8)])
    ShardManifests(tmp_path, tmp_path).write(0, "mark", pixels, [])
    assert disk.was_flushed(shard_file(tmp_path, 0), before="00000.json")


def test_the_values_that_work_began_with_are_flushed_before_it_goes_on(tmp_path: Path, disk: Disk) -> None:
    artifact = RunFolder.create(tmp_path / "run").artifact("features")
    with open_work(artifact, {"stage": "features"}) as work:
        assert work.kept("precision", "bfloat16") == "bfloat16"
        assert disk.was_flushed(work.path / "resolved.json", before="resolved.json")
