"""A second round: `clusters.embeddings` clusters what a model of another run made of the same images."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from grappa.pipeline.commands.init import Request, initialize
from grappa.pipeline.config.schema import Config
from grappa.pipeline.engine.fingerprints import expected_fingerprint
from grappa.pipeline.engine.status import read_config, states
from grappa.pipeline.graph.node import Node
from grappa.pipeline.store.artifacts import RunFolder
from tests.helpers.tiny import draw_images, make_run, run_all, sign_again, split_of, write_table, write_weights


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images, a finished first round and a second round up to its adaptor sets."""
    folder = tmp_path_factory.mktemp("rounds")
    table = write_table(draw_images(folder / "images"), folder / "images.csv", split=lambda path: split_of(path))
    changes = {"features__whitening_power": 0.5, "adaptors__learning_rate": 0.1}  # so that embeddings move in few steps
    first = make_run(folder / "first", [table], write_weights(folder / "w.safetensors"), **changes)
    run_all(first, until="embeddings")
    second_round(folder, "second", folder / "first")
    run_all(RunFolder.open(folder / "second"), until="adaptors")
    return folder


@pytest.fixture
def rounds(made: Path, tmp_path: Path) -> Path:
    """A copy of both rounds; the second one reads the copied first one."""
    for name in ("first", "second"):
        shutil.copytree(made / name, tmp_path / name)
    file = tmp_path / "second" / "config.yaml"
    file.write_text(file.read_text().replace(str(made / "first"), str(tmp_path / "first")))
    run_all(RunFolder.open(tmp_path / "second"), stage="given_features", force=True)
    return tmp_path


def second_round(folder: Path, name: str, given: Path) -> RunFolder:
    """Initialize a run from the first one, whose clusters are those of ``given``."""
    request = Request(assignments=[f"clusters.embeddings={given}"], other=folder / "first")
    initialize(folder / name, request, say=lambda line: None)
    return RunFolder.open(folder / name)


def kinds(folder: Path) -> dict[str, str]:
    run = RunFolder.open(folder)
    return {each.name: each.state.kind for each in states(run, read_config(run))}


def labels(run: Path, granularity: str = "k00008") -> pd.Series:
    return pd.read_parquet(run / "clusters" / granularity / "assignments.parquet")["pseudo_label"]


def test_the_first_rounds_embeddings_are_clustered_whitened_anew_and_all_else_stays(made: Path) -> None:
    given = np.load(made / "second" / "given_features" / "features.npy")
    assert np.array_equal(given, np.load(made / "first" / "embeddings" / "fused" / "embeddings.npy"))
    whitened = np.load(made / "second" / "whitening" / "given_features" / "features.npy")
    assert not np.allclose(given, whitened)
    assert not labels(made / "first").equals(labels(made / "second"))
    for name in ("features", "whitening/features", "neighbors"):
        taken = json.loads((made / "second" / name / "manifest.json").read_text())["provenance"]
        assert taken["taken_from"] == str(made / "first" / name)


def test_the_fingerprint_changes_with_the_first_rounds_embeddings_only(rounds: Path) -> None:
    assert kinds(rounds / "second")["adaptors/k00008"] == "fresh"
    shutil.rmtree(rounds / "first" / "embeddings" / "student")
    (rounds / "first" / "fusion" / "neighbors" / "manifest.json").write_text("{")
    assert kinds(rounds / "second")["adaptors/k00008"] == "fresh"

    file = rounds / "first" / "embeddings" / "fused" / "embeddings.npy"
    np.save(file, np.load(file)[:, ::-1])
    sign_again(file.parent)
    run = RunFolder.open(rounds / "second")
    found = {each.name: each.state for each in states(run, read_config(run))}
    assert found["given_features"].reasons == ["input embeddings: content changed"]
    assert found["clusters/k00008"].kind == "stale"
    assert found["neighbors"].kind == "fresh"


def test_the_second_round_stays_fresh_when_the_first_one_is_deleted(rounds: Path) -> None:
    shutil.rmtree(rounds / "first")
    assert {kinds(rounds / "second")[name] for name in ("given_features", "clusters/k00008")} == {"fresh"}
    run = RunFolder.open(rounds / "second")
    initialize(run.root, Request(assignments=["clusters.seed=1"]), say=lambda line: None)
    run_all(run, until="adaptors")
    assert kinds(rounds / "second")["adaptors/k00008"] == "fresh"


def test_a_model_can_be_named(made: Path) -> None:
    run = second_round(made, "by_student", made / "first" / "embeddings" / "student")
    run_all(run, stage="given_features")
    given = np.load(run.root / "given_features" / "features.npy")
    assert np.array_equal(given, np.load(made / "first" / "embeddings" / "student" / "embeddings.npy"))


def test_images_are_found_by_id_and_lacking_ones_are_counted(made: Path, tmp_path: Path) -> None:
    weights, given = made / "w.safetensors", made / "first"
    keep = sorted((made / "images").rglob("*.png"))[:-1]
    table = pd.read_csv(made / "images.csv")
    part, more = tmp_path / "part.csv", tmp_path / "more.csv"
    table[table["path"].isin([str(path) for path in keep])][::-1].to_csv(part, index=False)
    fewer = make_run(tmp_path / "fewer", [part], weights, clusters__embeddings=given)
    run_all(fewer, until="given_features")
    ours, theirs = (pd.read_parquet(run / "images" / "images.parquet")["image_id"] for run in (fewer.root, given))
    rows = pd.Index(theirs).get_indexer(ours)
    embeddings = np.load(given / "embeddings" / "fused" / "embeddings.npy")
    assert np.array_equal(np.load(fewer.root / "given_features" / "features.npy"), embeddings[rows])

    draw_images(tmp_path / "others", num_classes=1, num_images=2, seed=5)
    write_table(tmp_path / "others", more, split=lambda path: "train")
    other = make_run(tmp_path / "other", [made / "images.csv", more], weights, clusters__embeddings=given)
    with pytest.raises(ValueError, match=r"first has 60 images and lacks 6 of the 66 of this run; name a run of the"):
        run_all(other, until="frozen_views")
    assert kinds(other.root)["frozen_views"] == "missing"


def test_embeddings_of_another_width_are_clustered_and_the_need_is_noted(rounds: Path) -> None:
    file = rounds / "first" / "embeddings" / "fused" / "embeddings.npy"
    narrow = np.load(file)[:, :20]
    np.save(file, narrow / np.linalg.norm(narrow, axis=1, keepdims=True))
    sign_again(file.parent)
    run = RunFolder.open(rounds / "second")
    initialize(run.root, Request(assignments=["features.whitening_power=0"]), say=lambda line: None)
    run_all(run, until="adaptors")  # the proxies begin as mean features of the backbone, not as the centroids
    assert np.load(run.root / "clusters" / "k00008" / "centroids.npy").shape == (8, 20)
    assert "needed_memory_bytes" in (run.root / "given_features" / "log.jsonl").read_text()


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("nothing", "nothing is no run folder; give that of a finished run"),
        ("first/embeddings/k00099", "embeddings/k00099 is missing in .*first; run `grappa run"),
    ],
)
def test_what_is_not_there_is_refused_by_init_in_a_sentence(made: Path, name: str, wrong: str) -> None:
    with pytest.raises(ValueError, match=f"^clusters.embeddings: .*{wrong}"):
        second_round(made, "refused", made / name)
    assert not (made / "refused").exists()


def test_a_run_cannot_be_its_own_first_round(rounds: Path) -> None:
    with pytest.raises(ValueError, match="second is this run itself; name the run of a first round"):
        second_round(rounds, "second", rounds / "second")


def test_embeddings_that_are_stale_or_damaged_are_refused_in_a_sentence(rounds: Path) -> None:
    second, first = RunFolder.open(rounds / "second"), RunFolder.open(rounds / "first")
    file = first.root / "embeddings" / "fused" / "embeddings.npy"
    kept = file.read_bytes()
    file.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"embeddings/fused in .*first is damaged \(embeddings.npy: sha256 differs\)"):
        run_all(second, stage="given_features", force=True)
    file.write_bytes(kept)
    initialize(first.root, Request(assignments=["fusion.learning_rate=0.5"]), say=lambda line: None)
    with pytest.raises(ValueError, match="^clusters.embeddings: embeddings/fused in .*first is stale; run `grappa run"):
        run_all(second, stage="given_features", force=True)


def test_its_place_is_no_identity_and_runs_without_it_are_as_before(rounds: Path) -> None:
    first = RunFolder.open(rounds / "first")
    fingerprint = expected_fingerprint(first, read_config(first), Node("clusters", "k00008")).fingerprint
    assert sorted(fingerprint["config"]) == ["clusters.num_iterations", "clusters.seed"]
    (rounds / "first").rename(rounds / "moved")
    file = rounds / "second" / "config.yaml"
    file.write_text(file.read_text().replace(str(rounds / "first"), str(rounds / "moved")))
    assert kinds(rounds / "second")["given_features"] == "fresh"


def test_embeddings_and_object_views_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="clusters.embeddings names another run, .* leave one of them out"):
        Config.model_validate(
            {
                "clusters": {"embeddings": "RUN", "view": "objects"},
                "objects": {"provider": "backbone"},
            }
        )
