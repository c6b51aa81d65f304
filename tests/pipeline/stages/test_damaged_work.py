"""Unfinished work that was damaged is never used: the same command says so and ends with the right bytes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grappa.core.notes import UntrustedError, read_note
from grappa.images.caching.manifests import ShardManifests
from grappa.pipeline.store.artifacts import RunFolder
from grappa.pipeline.store.checkpoints import ArrayCheckpoint, FileCheckpoint, RowCheckpoint
from tests.helpers.tiny import digests, draw_images, make_run, run_all, split_of, write_table, write_weights

CHANGES = {"compute__checkpoint_seconds": 0.000001, "compute__inference_batch_size": 16}
Damage = Callable[[bytes], bytes]
DAMAGES: dict[str, Damage] = {
    "cut": lambda content: content[: len(content) // 2],
    "flipped": lambda content: (
        content[: len(content) // 2] + bytes([content[len(content) // 2] ^ 1]) + content[len(content) // 2 + 1 :]
    ),
    "emptied": lambda content: b"",
    "other JSON": lambda content: b'{"rows": 48, "step": 7}\n',
    "a list": lambda content: b"[1]\n",
    "nested": lambda content: b"[" * 100_000,
}
STAGES = {
    "images": ("images", ShardManifests, "write", 2),
    "features": ("features", RowCheckpoint, "offer", 2),
    "adaptors": ("adaptors/k00004", FileCheckpoint, "save", 3),
}


class Stopped(Exception):
    """The work is interrupted here."""


def make(folder: Path) -> RunFolder:
    material = folder.parent / "material"
    if not material.exists():
        draw_images(material / "images")
        write_weights(material / "weights.safetensors")
        write_table(material / "images", material / "table.csv", split=split_of)
    return make_run(folder, [material / "table.csv"], material / "weights.safetensors", **CHANGES)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    run = make(tmp_path_factory.mktemp("damaged_work") / "whole")
    run_all(run, until="adaptors")
    return run


@pytest.fixture(scope="module", params=STAGES)
def interrupted(request: pytest.FixtureRequest, whole: RunFolder) -> tuple[RunFolder, str]:
    """A run that was interrupted in the middle of one artifact, and the artifact's name."""
    name, owner, function, number = STAGES[request.param]
    run = RunFolder.open(Path(shutil.copytree(whole.root, whole.root.with_name(request.param))))
    shutil.rmtree(run.root / name)
    real, left = getattr(owner, function), number

    def stop(*arguments: Any) -> None:
        nonlocal left
        real(*arguments)
        left -= 1
        if left == 0:
            raise Stopped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, function, stop)
        with pytest.raises(Stopped):
            run_all(run, until=request.param)
    return run, name


def unfinished(run: RunFolder, name: str) -> Path:
    return run.artifact(name).partial


@pytest.mark.parametrize("damage", ["cut", "flipped", "other JSON"])
def test_damaged_work_is_done_again_to_the_same_bytes(
    interrupted: tuple[RunFolder, str],
    whole: RunFolder,
    tmp_path: Path,
    damage: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, name = interrupted
    partial = unfinished(run, name)
    files = sorted(path.relative_to(partial) for path in partial.rglob("*") if path.is_file())
    assert len(files) >= 4
    for number, file in enumerate(files):
        copy = RunFolder.open(Path(shutil.copytree(run.root, tmp_path / str(number))))
        path = unfinished(copy, name) / file
        path.write_bytes(DAMAGES[damage](path.read_bytes()))
        capsys.readouterr()
        lines = run_all(copy, until=name.partition("/")[0])
        assert digests(copy) == digests(whole), f"{file} was used although it was {damage}"
        said = capsys.readouterr().err + "\n".join(lines)
        if file.suffix == ".json" and file.name != "recipe.json":
            assert f"{name}: {file.name} is damaged" in said
        shutil.rmtree(copy.root)


def test_undamaged_work_is_resumed(
    interrupted: tuple[RunFolder, str], whole: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, name = interrupted
    copy = RunFolder.open(Path(shutil.copytree(run.root, tmp_path / "copy")))
    capsys.readouterr()
    run_all(copy, until=name.partition("/")[0])
    assert digests(copy) == digests(whole) and "damaged" not in capsys.readouterr().err
    log = [json.loads(line) for line in (copy.root / name / "log.jsonl").read_text().splitlines()]
    assert log[-1]["resumed"]
    assert name == "images" or any(0 < each["new"] < each["total"] for each in log if "new" in each)


def test_rows_that_are_not_there_are_not_claimed(tmp_path: Path) -> None:
    """As a hand-written note beside an array that was cut: numpy itself would fill the missing rows with zeros."""
    out = np.lib.format.open_memmap(tmp_path / "a.npy", mode="w+", dtype=np.float32, shape=(200, 3))
    out[:] = np.arange(600).reshape(200, 3)
    RowCheckpoint(tmp_path, seconds=0).offer(128, out)
    del out
    assert RowCheckpoint(tmp_path, seconds=0).load(tmp_path / "a.npy", (200, 3)) == 128
    content = (tmp_path / "a.npy").read_bytes()
    for rest in (content[:300], content[:128] + bytes(len(content) - 128), b""):
        (tmp_path / "a.npy").write_bytes(rest)
        with pytest.raises(UntrustedError, match=r"^a.npy "):
            RowCheckpoint(tmp_path, seconds=0).load(tmp_path / "a.npy", (200, 3))
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(UntrustedError, match=r"a.npy is float32 \(200, 3\), expected float32 \(201, 3\)"):
        RowCheckpoint(tmp_path, seconds=0).load(tmp_path / "a.npy", (201, 3))
    (tmp_path / "checkpoint.json").write_text('{"rows": 128}')
    with pytest.raises(UntrustedError, match="checkpoint.json is damaged"):
        RowCheckpoint(tmp_path, seconds=0).load(tmp_path / "a.npy", (200, 3))


def test_a_saved_array_is_used_only_as_it_was_saved(tmp_path: Path) -> None:
    kept = ArrayCheckpoint(tmp_path / "boxes.npy")
    assert kept.load() is None
    kept.save(np.eye(3))
    np.testing.assert_array_equal(ArrayCheckpoint(tmp_path / "boxes.npy").load(), np.eye(3))
    for damage in ("cut", "flipped", "emptied"):
        content = (tmp_path / "boxes.npy").read_bytes()
        (tmp_path / "boxes.npy").write_bytes(DAMAGES[damage](content))
        with pytest.raises(UntrustedError, match="boxes.npy has other bytes than its note says"):
            kept.load()
        (tmp_path / "boxes.npy").write_bytes(content)
    (tmp_path / "boxes.npy").unlink()
    with pytest.raises(UntrustedError, match="boxes.npy: No such file"):
        kept.load()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_note_is_told_from_none(tmp_path: Path, damage: str) -> None:
    assert read_note(tmp_path / "none.json") is None
    kept = ArrayCheckpoint(tmp_path / "boxes.npy")
    kept.save(np.eye(3))
    note = tmp_path / "boxes.json"
    note.write_bytes(DAMAGES[damage](note.read_bytes()))
    with pytest.raises(UntrustedError, match="boxes.json is damaged"):
        read_note(note)
