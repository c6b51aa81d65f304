"""The freshness table over the whole graph, and how it is told."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest

from grappa.pipeline.config.schema import Images
from grappa.pipeline.config.yaml_file import ConfigError
from grappa.pipeline.engine.sources import list_sources, publish_listing
from grappa.pipeline.engine.status import read_config, states, status_lines
from grappa.pipeline.graph.stages import nodes
from grappa.pipeline.store.artifacts import Manifest
from tests.helpers.fake_stages import FakeStages, fake_stages

ADVICE = "run `grappa init"


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeStages:
    return fake_stages(tmp_path / "run", monkeypatch)


@pytest.fixture
def complete(fakes: FakeStages) -> FakeStages:
    fakes.execute()
    return fakes


def test_everything_is_missing_then_fresh(fakes: FakeStages) -> None:
    assert set(fakes.states().values()) == {"missing"}
    assert len(fakes.states()) == len(list(nodes(fakes.config)))
    fakes.execute()
    assert fakes.not_fresh(verify=False) == {}


def test_an_edited_setting_is_named_and_what_hangs_on_it_says_so(complete: FakeStages) -> None:
    complete.configure(clusters={"num_iterations": 50})
    found = complete.not_fresh()
    assert found["clusters/k00002"] == "stale: config clusters.num_iterations: 20 -> 50"
    assert found["adaptors/k00002"] == "stale: upstream clusters/k00002 is stale"
    assert found["fusion/neighbors"].startswith("stale: upstream adaptors/k00002 is stale")
    assert not {"images", "backbone", "features", "neighbors", "embeddings/zero_shot"} & set(found)


def test_where_and_how_fast_makes_nothing_stale(complete: FakeStages) -> None:
    complete.configure(compute={"device": "cpu", "num_workers": 7, "checkpoint_seconds": 1.0})
    assert complete.not_fresh() == {}


def test_upstream_run_again_with_other_bytes_is_an_input_that_changed(complete: FakeStages) -> None:
    complete.configure(clusters={"seed": 1})
    complete.execute(stage="clusters", instance="k00004")
    found = complete.not_fresh()
    assert found["adaptors/k00004"] == "stale: input clusters/k00004: content changed"
    assert found["clusters/k00002"] == "stale: config clusters.seed: 0 -> 1"


def test_upstream_run_again_with_the_same_bytes_leaves_the_rest_fresh(complete: FakeStages) -> None:
    complete.execute(stage="features", force=True)
    assert complete.ran == ["features"]
    assert complete.not_fresh() == {}


def test_killed_midway_stays_what_it_was(complete: FakeStages) -> None:
    complete.configure(fusion={"seed": 1})
    complete.hooks["fusion/neighbors"] = lambda context: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        complete.execute()
    assert complete.states()["fusion/neighbors"] == "stale: config fusion.seed: 0 -> 1"
    complete.configure(fusion={"seed": 0})
    assert complete.not_fresh() == {}


def test_each_manifest_is_read_twice_at_most(complete: FakeStages, monkeypatch: pytest.MonkeyPatch) -> None:
    read, counts = Manifest.read, Counter[Path]()
    monkeypatch.setattr(Manifest, "read", lambda path: counts.update([path]) or read(path))
    assert {each.state.kind for each in states(complete.run, complete.config)} == {"fresh"}
    assert len(counts) > 20
    assert max(counts.values()) == 2  # once as the artifact that is judged, once as an input


def test_a_flipped_byte_is_found_by_verify(complete: FakeStages) -> None:
    path = complete.root / "features" / "features.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert complete.not_fresh() == {}
    found = complete.not_fresh(verify=True)
    assert found["features"] == "corrupt: features.npy: sha256 differs"
    assert found["whitening/features"] == "stale: upstream features is corrupt"
    complete.execute(stage="features", force=True)
    assert complete.not_fresh(verify=True) == {}


def test_a_truncated_array_is_found_at_once_and_made_again(complete: FakeStages) -> None:
    path = complete.root / "neighbors" / "neighbors.npy"
    os.truncate(path, 3)
    assert "3 bytes, manifest says" in complete.states()["neighbors"]
    assert complete.states()["fusion/neighbors"] == "stale: upstream neighbors is corrupt"
    complete.execute()
    assert complete.ran == ["neighbors"]
    assert complete.not_fresh() == {}


@pytest.mark.parametrize("content", ["{not json", "{}", '{"format": 99}'])
def test_a_manifest_that_cannot_be_used_is_corrupt_and_made_again(complete: FakeStages, content: str) -> None:
    (complete.root / "features" / "manifest.json").write_text(content)
    assert complete.states()["features"].startswith("corrupt: manifest.json: ")
    complete.execute(until="features")
    assert complete.not_fresh() == {}


def test_an_artifact_that_was_removed_is_missing(complete: FakeStages) -> None:
    (complete.root / "features").rename(complete.root / "away")
    found = complete.not_fresh()
    assert found["features"] == "missing"
    assert found["whitening/features"] == "stale: upstream features is missing"


def test_changed_sources_reach_the_images(complete: FakeStages) -> None:
    complete.publish_sources("birds/b.png")
    assert complete.not_fresh()["images"] == "stale: input sources: content changed"


def test_missing_and_broken_sources_ask_for_init(complete: FakeStages) -> None:
    table = complete.root / "sources" / "sources.parquet"
    table.write_bytes(b"")
    assert "upstream sources is corrupt: sources.parquet: 0 bytes" in complete.states()["images"]
    (complete.root / "sources").rename(complete.root / "away")
    assert f"upstream sources is missing: {ADVICE}" in complete.states()["images"]


def test_weights_are_hashed_again_only_when_they_changed(complete: FakeStages, tmp_path: Path) -> None:
    weights = tmp_path / "weights.safetensors"
    stat = weights.stat()
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10))
    assert complete.not_fresh() == {}
    weights.write_bytes(b"other weights")
    assert complete.not_fresh()["backbone"] == "stale: input weights: content changed"
    weights.unlink()
    assert complete.not_fresh() == {}, "what was read lies in the run"


def test_weights_moved_elsewhere_are_the_same_weights(complete: FakeStages, tmp_path: Path) -> None:
    moved = (tmp_path / "weights.safetensors").rename(tmp_path / "moved.safetensors")
    complete.configure(backbone={"weights": str(moved)})
    assert complete.not_fresh() == {}
    complete.configure(backbone={"weights": str(tmp_path / "nowhere")})
    assert "backbone.weights: no such file" in complete.states()["backbone"]


def test_verify_finds_images_that_changed_since_they_were_listed(fakes: FakeStages, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    for name in ("a.png", "b.png"):
        (folder / "birds").mkdir(parents=True, exist_ok=True)
        (folder / "birds" / name).write_bytes(b"ten bytes!")
    fakes.configure(images={"sources": [str(folder)]})
    images = Images(sources=(str(folder),))
    publish_listing(fakes.run, list_sources(images), images, None)
    fakes.execute()
    assert fakes.not_fresh(verify=True) == {}
    (folder / "birds" / "b.png").write_bytes(b"eleven bytes")
    assert fakes.not_fresh() == {}
    found = fakes.states(verify=True)["images"]
    assert "images changed since init: 1 files, first birds/b.png: 12 bytes, listed with 10" in found
    assert ADVICE in found
    folder.rename(tmp_path / "moved")
    assert fakes.not_fresh(verify=True) == {}, "a root that is gone is no change"


def test_lines_and_json_tell_the_same(complete: FakeStages) -> None:
    complete.configure(index={"rows": "test"})
    found = states(complete.run, complete.config)
    lines = status_lines(found)
    place = next(number for number, line in enumerate(lines) if line.split() == ["index", "stale"])
    assert lines[place + 1].strip() == "config index.rows: all -> test"
    records = json.loads(json.dumps([each.to_json() for each in found]))
    assert next(each for each in records if each["stage"] == "index") == {
        "stage": "index",
        "instance": None,
        "state": "stale",
        "reasons": ["config index.rows: all -> test"],
    }


def test_a_run_without_configuration_says_what_to_do(fakes: FakeStages) -> None:
    fakes.run.config_path.unlink()
    with pytest.raises(ConfigError, match=r"config\.yaml is missing; write one by `grappa init"):
        read_config(fakes.run)
