"""Rows that are computed by ranges, each apart from the others: the bytes are those of one pass, whatever is lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from grappa.backbone import features as library
from grappa.pipeline.commands.init import Request, initialize
from grappa.pipeline.engine import execution
from grappa.pipeline.engine.execution import NotReadyError
from grappa.pipeline.engine.status import read_config
from grappa.pipeline.graph.node import Node, RowRange
from grappa.pipeline.pages.report.costs import cost_of
from grappa.pipeline.stages import features
from grappa.pipeline.store.artifacts import RunFolder
from grappa.pipeline.store.locks import LockedError, acquire
from grappa.pipeline.store.ranges import remove_ranges
from grappa.pipeline.store.work import Work, open_work
from tests.helpers.tiny import digests, draw_images, make_run, run_all, write_weights

BATCH, TOTAL, COPIES = 8, 3, 14
CHANGES: dict[str, object] = {
    "compute__inference_batch_size": BATCH,
    "compute__checkpoint_seconds": 0.000001,
    "objects__provider": "random",
    "clusters__num_clusters": "[4]",
    "model__source": "single",
    "adaptors__num_epochs": 1,
}
Made = list[tuple[str, int]]


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run up to its embeddings, of 60 images and 14 copies of one of them: the last of 10 batches has 2 images."""
    folder = tmp_path_factory.mktemp("ranges")
    images = draw_images(folder / "images")
    for number in range(COPIES):
        shutil.copy(images / "discs" / "class_0" / "0.png", images / "checks" / "class_1" / f"copy{number}.png")
    run = make_run(folder / "whole", [images], write_weights(folder / "weights.safetensors"), **CHANGES)
    run_all(run, until="embeddings")
    return folder


@pytest.fixture
def run(material: Path, tmp_path: Path) -> RunFolder:
    """The run before its features."""
    return without(material, tmp_path, "features")


def without(material: Path, folder: Path, name: str) -> RunFolder:
    """Return a copy of the whole run in which an artifact is missing."""
    shutil.copytree(material / "whole", folder / "run")
    shutil.rmtree(folder / "run" / name)
    return RunFolder.open(folder / "run")


def make_range(run: RunFolder, number: int, total: int = TOTAL, name: str = "features") -> list[str]:
    node = Node.parse(name)
    return run_all(run, stage=node.stage, instance=node.instance, rows=RowRange(number, total))


def join(run: RunFolder, name: str = "features") -> list[str]:
    node = Node.parse(name)
    return run_all(run, stage=node.stage, instance=node.instance)


def again(run: RunFolder, *settings: str, more: Sequence[str] = ()) -> None:
    """Change settings, or list more images."""
    sources = [*read_config(run).images.sources, *more] if more else []
    initialize(run.root, Request(sources, None, settings, None), say=lambda line: None)


def assert_whole(run: RunFolder, material: Path, name: str = "features") -> None:
    """Check that an artifact has bytes, fingerprint and settled values of one pass, and that no range is left."""
    wanted = RunFolder.open(material / "whole")
    assert digests(run) == digests(wanted)
    ours, theirs = (each.artifact(name).manifest() for each in (run, wanted))
    assert ours and theirs and ours.fingerprint == theirs.fingerprint
    assert ours.provenance["resolved"] == theirs.provenance["resolved"]
    assert not run.artifact(name).path.with_name(f"{Path(name).name}.ranges").exists()


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Made:
    """What each extraction embeds: the number of its first image's batch, and how many images from there on."""
    found: Made = []
    real = library.extract_features

    def extract(backbone: object, cache: Any, *arguments: Any, **named: Any) -> None:
        found.append((named["start"], len(cache)))
        real(backbone, cache, *arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(features, "extract_features", extract)
    return found


@pytest.mark.parametrize("num_rows", [0, 1, 8, 74, 80])
@pytest.mark.parametrize("total", [1, 3, 7, 16])
def test_ranges_are_whole_batches_and_cover_all_rows(num_rows: int, total: int) -> None:
    bounds = [RowRange(number, total).bounds(num_rows, BATCH) for number in range(1, total + 1)]
    assert [first for first, _ in bounds] == [0, *(end for _, end in bounds[:-1])]
    assert bounds[-1][1] == num_rows
    assert all(first % BATCH == 0 or first == num_rows for first, _ in bounds)
    lengths = [end - first for first, end in bounds[:-1]]
    assert not lengths or max(lengths) - min(lengths) <= BATCH


@pytest.mark.parametrize("name", ["0-of-3", "4-of-3", "1-of-16", "01-of-3", "x", "1-of-3/.."])
def test_other_names_are_no_ranges(name: str) -> None:
    with pytest.raises(ValueError, match="is no range of rows, expected a name such as 03-of-16"):
        Node.parse(f"features.ranges/{name}")
    assert Node.parse("embeddings/k00004.ranges/03-of-16") == Node("embeddings", "k00004", RowRange(3, 16))


@pytest.mark.parametrize("name", ["features", "object_features", "embeddings/k00004"])
def test_the_bytes_are_those_of_one_pass(material: Path, tmp_path: Path, counted: Made, name: str) -> None:
    run = without(material, tmp_path, name)
    for number in (3, 1, 2):
        assert make_range(run, number, name=name)[0].startswith(f"{name}.ranges/{number}-of-3: ")
    assert [length for _, length in counted] == [26, 24, 24]
    (line,) = join(run, name)
    assert "joined from 3 ranges" in line and len(counted) == 3
    assert_whole(run, material, name)
    logged = [json.loads(text) for text in (run.artifact(name).path / "log.jsonl").read_text().splitlines()]
    embedded = [(each["range"], each["new"]) for each in logged if each.get("task") == "embedding"]
    assert embedded == [("1-of-3", 24), ("2-of-3", 24), ("3-of-3", 26)]
    cost, manifest = cost_of(run, Node.parse(name)), run.artifact(name).manifest()
    own = [each["seconds"] for each in logged if "result" in each]
    assert cost and manifest and cost.seconds == own[-1] >= sum(own[:3]) > 0


def test_more_ranges_than_batches_leave_some_empty(material: Path, run: RunFolder) -> None:
    for number in range(1, 14):
        make_range(run, number, 13)
    join(run)
    assert_whole(run, material)


def test_a_missing_range_costs_only_its_own_rows(material: Path, run: RunFolder, counted: Made) -> None:
    make_range(run, 1)
    make_range(run, 3)
    said = join(run)
    assert said[0] == "features: 2 of 3 ranges are taken over, the others are computed now"
    assert counted == [(0, 24), (0, 26), (0, 24)]
    assert_whole(run, material)


def test_a_range_that_was_killed_goes_on_at_its_checkpoint(material: Path, run: RunFolder, counted: Made) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "embed", _killed_at(2))
        with pytest.raises(KeyboardInterrupt):
            make_range(run, 2)
    make_range(run, 2)
    assert counted == [(0, 24), (8, 24)]
    join(run)
    assert_whole(run, material)


def _killed_at(batch: int) -> Callable[..., torch.Tensor]:
    """Return ``embed``, killed at a batch (from 1)."""
    calls = []

    def embed(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == batch:
            raise KeyboardInterrupt
        return library.embed(*arguments)

    return embed


def test_ranges_with_another_fingerprint_are_not_taken_over(material: Path, run: RunFolder, counted: Made) -> None:
    for number in (1, 2):
        make_range(run, number)
    again(run, "features.precision=float32")
    make_range(run, 3)
    join(run)
    assert [length for _, length in counted] == [24, 24, 26, 24, 24]
    assert not (run.root / "features.ranges").exists()
    again(run, "features.precision=auto")
    join(run)
    assert len(counted) == 6, "one pass: the ranges are gone"
    assert_whole(run, material)


def test_ranges_of_other_batches_or_of_another_number_are_not_taken_over(
    material: Path, run: RunFolder, counted: Made
) -> None:
    make_range(run, 1, 2)
    make_range(run, 1)
    again(run, "compute.inference_batch_size=4")
    assert "joined" not in join(run)[0]
    shutil.rmtree(run.root / "features")
    again(run, "compute.inference_batch_size=8")
    counted.clear()
    join(run)
    assert counted == [(0, 74)]
    assert_whole(run, material)


@pytest.mark.parametrize("change", ["bytes", "manifest"])
def test_a_damaged_range_is_made_again(material: Path, run: RunFolder, counted: Made, change: str) -> None:
    for number in (1, 2, 3):
        make_range(run, number)
    folder = run.root / "features.ranges" / "2-of-3"
    if change == "bytes":
        data = bytearray((folder / "features.npy").read_bytes())
        data[-1] ^= 1
        (folder / "features.npy").write_bytes(data)
    else:
        (folder / "manifest.json").write_text("{")
    counted.clear()
    join(run)
    assert counted == [(0, 24)]
    assert_whole(run, material)


@pytest.mark.parametrize(("change", "words"), [("torch", "torch 0.1 (here "), ("device", "device cuda (here cpu)")])
def test_ranges_made_in_another_way_are_neither_joined_nor_written_over(
    material: Path, run: RunFolder, counted: Made, monkeypatch: pytest.MonkeyPatch, change: str, words: str
) -> None:
    found = []
    for number in (1, 2):
        make_range(run, number)
        manifest = run.root / "features.ranges" / f"{number}-of-3" / "manifest.json"
        content = json.loads(manifest.read_text())
        if change == "torch":
            content["provenance"]["packages"]["torch"] = "0.1"
        else:
            content["provenance"]["resolved"]["device"] = f"cuda:{number}"
        manifest.write_text(json.dumps(content))

    def remove(folder: Path) -> None:
        found.append({each.name: (each / "manifest.json").read_text() for each in folder.glob("*-of-3")})
        remove_ranges(folder)

    before = {each.name: (each / "manifest.json").read_text() for each in (run.root / "features.ranges").glob("*-of-3")}
    counted.clear()
    monkeypatch.setattr(execution, "remove_ranges", remove)
    said = join(run)
    assert words in said[0] and said[0].endswith("are not joined; all rows are computed in one pass")
    assert counted == [(0, 74)] and found == [before]
    assert_whole(run, material)


def test_of_two_joins_at_a_time_one_finds_the_work_of_the_other(
    material: Path, run: RunFolder, counted: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (1, 2, 3):
        make_range(run, number)
    counted.clear()

    def wait_for_the_other(*arguments: Any, **named: Any) -> Work:
        monkeypatch.setattr(execution, "open_work", open_work)
        assert "joined from 3 ranges" in join(run)[0]
        return open_work(*arguments, **named)

    monkeypatch.setattr(execution, "open_work", wait_for_the_other)
    assert join(run) == ["features: was made meanwhile"] and not counted
    assert not (run.root / "features.partial").exists()
    assert_whole(run, material)


def test_force_drops_what_ranges_have_left(material: Path, run: RunFolder, counted: Made) -> None:
    for number in (1, 2, 3):
        make_range(run, number)
    counted.clear()
    assert "joined" not in run_all(run, stage="features", force=True)[0]
    assert counted == [(0, 74)]
    assert_whole(run, material)


def test_ranges_made_elsewhere_are_joined_here_without_their_kind_of_device(run: RunFolder, counted: Made) -> None:
    for number in (1, 2, 3):
        make_range(run, number)
        manifest = run.root / "features.ranges" / f"{number}-of-3" / "manifest.json"
        manifest.write_text(manifest.read_text().replace('"device": "cpu"', f'"device": "cuda:{number}"'))
    counted.clear()
    join(run)
    made = run.artifact("features").manifest()
    assert not counted and made and made.provenance["resolved"]["device"] == "cuda:1"


def test_all_ranges_have_the_values_that_the_first_settled(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for number, precision in ((2, "float32"), (1, "bfloat16")):
        monkeypatch.setattr("grappa.pipeline.opening.resolve_precision", lambda requested, device, p=precision: p)
        make_range(run, number)
        manifest = run.artifact(f"features.ranges/{number}-of-3").manifest()
        found.append(manifest and manifest.provenance["resolved"]["precision"])
    assert found == ["float32", "float32"]


def test_copies_on_both_sides_of_a_border_have_the_same_bits(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def embed(backbone: Any, images: torch.Tensor, adaptation: Any) -> torch.Tensor:
        return library.embed(backbone, images, adaptation) + torch.arange(len(images))[:, None] / 64

    monkeypatch.setattr(features, "embed", embed)
    found = []
    for total in (1, 10, 4):
        run = without(material, tmp_path / str(total), "features")
        for number in range(1, total + 1) if total > 1 else ():
            make_range(run, number, total)
        join(run)
        found.append(np.load(run.root / "features" / "features.npy"))
    rows, counts = np.unique(found[0], axis=0, return_counts=True)
    assert counts.max() == COPIES + 1 and len(rows) == 60
    assert all(np.array_equal(found[0], other) for other in found[1:])


def test_a_range_of_a_fresh_artifact_is_not_made_and_what_is_left_of_ranges_goes(
    material: Path, run: RunFolder, counted: Made
) -> None:
    make_range(run, 1)
    shutil.copytree(run.root / "features.ranges", run.root / "kept")
    join(run)
    (run.root / "kept").rename(run.root / "features.ranges")
    counted.clear()
    assert make_range(run, 2) == [] and not counted
    assert_whole(run, material)


@pytest.mark.parametrize("force", [False, True])
def test_a_range_that_another_process_makes_is_waited_for_before_any_other_is_made(
    run: RunFolder, counted: Made, force: bool
) -> None:
    make_range(run, 1)
    counted.clear()
    with (
        acquire(run.root / "features.ranges" / "3-of-3.lock", what="features.ranges/3-of-3"),
        pytest.raises(LockedError, match=r"features.ranges/3-of-3 is being written by process"),
    ):
        run_all(run, stage="features", force=force)
    assert not counted and (run.root / "features.ranges" / "1-of-3").exists()


def test_damaged_pixels_that_one_range_finds_drop_all_ranges(material: Path, run: RunFolder) -> None:
    damaged = run.root / "images" / "pixels" / "00001.npy"
    data = damaged.read_bytes()
    damaged.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    make_range(run, 1)
    with pytest.raises(
        NotReadyError, match=r"features.ranges/2-of-3 cannot run: .* \(pixels/00001.npy: sha256 differs\)"
    ):
        join(run)
    assert not (run.root / "features.ranges").exists(), "the first range may have read the damaged file"
    damaged.write_bytes(data)
    join(run)
    assert_whole(run, material)


def test_a_collection_that_grows_takes_rows_over_from_a_joined_result(material: Path, run: RunFolder) -> None:
    for number in (1, 2, 3):
        make_range(run, number)
    join(run)
    more = draw_images(run.root.parent / "more", num_classes=1, seed=5)
    again(run, more=[str(more)])
    lines = run_all(run, until="features")
    if "other bits" in (run.artifact("features").path / "log.jsonl").read_text():
        pytest.skip("this machine rounds a row by its place in the batch")
    assert any("of them taken over" in line for line in lines if line.startswith("features: "))
