"""A collection that grew: features of images that were there before are taken over, and the bytes are those of a whole
computation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from grappa.backbone import features
from grappa.pipeline.commands.init import Request, initialize
from grappa.pipeline.engine.live import row_reuse
from grappa.pipeline.engine.live.row_reuse import DIGESTS_FILE
from grappa.pipeline.store.artifacts import RunFolder
from tests.helpers.tiny import draw_images, make_run, run_all, write_weights

BATCH = {"compute__inference_batch_size": 8}


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 60 images up to its features, a run of the same and 15 more, and these images; copies on both sides."""
    folder = tmp_path_factory.mktemp("rows")
    images, more = draw_images(folder / "images"), draw_images(folder / "more", num_classes=1, seed=5)
    for number in range(3):
        shutil.copy(images / "discs" / "class_0" / "0.png", images / "discs" / "class_1" / f"copy{number}.png")
        shutil.copy(images / "checks" / "class_0" / "0.png", more / "discs" / "class_0" / f"copy{number}.png")
    weights = write_weights(folder / "weights.safetensors")
    run_all(make_run(folder / "run", [images], weights, **BATCH), until="features")
    run_all(make_run(folder / "whole", [images, more], weights, **BATCH), until="features")
    return folder


@pytest.fixture
def run(material: Path, tmp_path: Path) -> RunFolder:
    shutil.copytree(material / "run", tmp_path / "run")
    return RunFolder.open(tmp_path / "run")


def grow(run: RunFolder, material: Path, *settings: str) -> str:
    """List the grown collection, run up to the features, and return what the stage said."""
    sources = [str(material / "images"), str(material / "more")]
    initialize(run.root, Request(sources, None, settings, None), say=lambda line: None)
    (line,) = [line for line in run_all(run, until="features") if line.startswith("features: ")]
    return line


def skip_where_places_matter(run: RunFolder) -> None:
    """Skip the rest of a test where known rows got other bits in other places, which the stage found out and noted."""
    if "other bits" in (run.artifact("features").path / "log.jsonl").read_text():
        pytest.skip("this machine rounds a row by its place in the batch")


def made(run: RunFolder) -> bytes:
    return (run.artifact("features").path / "features.npy").read_bytes()


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list to which each extraction adds how many images it embeds."""
    numbers: list[int] = []
    real = features.extract_features

    def extract(backbone: object, cache: list[object], *arguments: object, **named: object) -> None:
        numbers.append(len(cache))
        real(backbone, cache, *arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr("grappa.pipeline.stages.features.extract_features", extract)
    return numbers


def test_rows_are_taken_over_and_the_bytes_are_those_of_a_whole_computation(
    material: Path, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = counted(monkeypatch)
    line = grow(run, material)
    assert made(run) == made(RunFolder.open(material / "whole"))
    skip_where_places_matter(run)
    assert "81 features of 32 dimensions, " in line and "of them taken over" in line
    (number,) = numbers
    assert 18 < number < 50
    assert sorted(path.name for path in run.artifact("features").path.iterdir()) == [
        "features.npy",
        "log.jsonl",
        "manifest.json",
        DIGESTS_FILE,
    ]


def test_images_that_went_away_cost_nothing(material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(material / "whole", tmp_path / "run")
    run, numbers = RunFolder.open(tmp_path / "run"), counted(monkeypatch)
    initialize(run.root, Request([str(material / "images")], None, (), None), say=lambda line: None)
    run_all(run, until="features")
    assert numbers[0] < 30 and made(run) == made(RunFolder.open(material / "run"))


def test_nothing_is_taken_over_where_one_bit_of_a_known_row_differs(
    material: Path, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_reuse.Reuse, "agrees", lambda self, found: False)
    assert "taken over" not in grow(run, material)
    assert made(run) == made(RunFolder.open(material / "whole"))


def test_rows_computed_again_are_compared_bit_by_bit(run: RunFolder) -> None:
    former = np.load(run.artifact("features").path / "features.npy")
    rows = np.arange(len(former))
    reuse = row_reuse.Reuse(former, rows, np.array([5, 9]), np.array([0, 1]))
    assert reuse.agrees(former[[5, 9]])
    other = former[[5, 9]]
    other[1, 3] = np.nextafter(other[1, 3], 2)
    assert not reuse.agrees(other)


@pytest.mark.parametrize("setting", ["backbone.crop_fraction=0.9", "features.precision=bfloat16"])
def test_nothing_is_taken_over_from_another_backbone_or_precision(material: Path, run: RunFolder, setting: str) -> None:
    assert "taken over" not in grow(run, material, setting)


def test_nothing_is_taken_over_from_another_batch_size_version_or_older_run(material: Path, run: RunFolder) -> None:
    assert "taken over" not in grow(run, material, "compute.inference_batch_size=4")
    for change in ("packages", DIGESTS_FILE):
        shutil.rmtree(run.root)
        shutil.copytree(material / "run", run.root)
        manifest = run.artifact("features").path / "manifest.json"
        content = json.loads(manifest.read_text())
        if change == "packages":
            content["provenance"]["packages"]["torch"] = "0.1"
        else:
            del content["outputs"][DIGESTS_FILE]
        manifest.write_text(json.dumps(content))
        assert "taken over" not in grow(run, material)


def test_an_interrupted_take_over_goes_on(material: Path, run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(row_reuse.Reuse, "fill", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            grow(run, material)
    line = grow(run, material)
    assert made(run) == made(RunFolder.open(material / "whole"))
    skip_where_places_matter(run)
    assert "taken over" in line
