"""No label is read: defaults, training, sampling and stopping are the same with labels true, scrambled or absent.

Only the evaluation (stages ``retrieval`` and ``evaluation``) reads labels, and the supervised set of the ablation,
which is there to say what they would buy.
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from grappa.pipeline import tables
from grappa.pipeline.config.schema import Config
from grappa.pipeline.config.yaml_file import parse_settings
from grappa.pipeline.graph.models import evaluated_models
from grappa.pipeline.graph.stages import STAGES, inputs_of, nodes, upstream
from grappa.pipeline.store.artifacts import RunFolder
from tests.helpers.tiny import digests, draw_images, make_run, run_all, split_of, write_table, write_weights

READERS = {"adaptors/supervised", "evaluation"}
LABELLED = ("adaptors/supervised", "embeddings/supervised", "heads/supervised", "retrieval/supervised")
LABELS = "images/labels.parquet"
GIVEN, FUSED = "given_features/features.npy", "embeddings/fused/embeddings.npy"
UNSUPERVISED = "[concat, multi_head, zero_shot_objects]"
EVERYTHING = "[concat, multi_head, supervised, zero_shot_objects]"


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("material")
    images = draw_images(folder / "images")
    write_weights(folder / "weights.safetensors")
    rng = random.Random(0)
    write_table(images, folder / "true.csv", label=lambda path: path.parent.name, split=split_of)
    write_table(images, folder / "scrambled.csv", label=lambda path: rng.choice("abc"), split=split_of)
    write_table(images, folder / "absent.csv", split=split_of)
    return folder


def _make(folder: Path, material: Path, labels: str, **changes: object) -> RunFolder:
    changes = {
        "objects__provider": "backbone",
        "model__source": "auto",
        "clusters__num_clusters": "[2, 4, 8]",
        **changes,
    }
    return make_run(folder, [material / f"{labels}.csv"], material / "weights.safetensors", **changes)


@pytest.fixture(scope="module")
def run(material: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    made = _make(tmp_path_factory.mktemp("runs") / "run", material, "true", evaluation__extra_rows=EVERYTHING)
    run_all(made)
    return made


def _config() -> Config:
    settings = {
        "clusters": {"num_clusters": [2, 4, 8]},
        "fusion": {"pairs": ["neighbors", "views"]},
        "objects": {"provider": "backbone"},
        "evaluation": {"extra_rows": ["concat", "multi_head", "supervised", "zero_shot_objects"]},
    }
    return parse_settings(settings, "test")


def _readers(config: Config) -> set[str]:
    return READERS | {f"retrieval/{name}" for name in evaluated_models(config)}


def test_three_stages_declare_that_they_read_labels() -> None:
    config = _config()
    readers = {
        node.name for node in nodes(config) for source in inputs_of(node, config) if "labels.parquet" in source.files
    }
    assert readers == _readers(config)


def test_nothing_but_the_evaluation_reads_the_models_tables() -> None:
    config = _config()
    readers = {node.name for node in nodes(config) if any(each.stage == "retrieval" for each in upstream(node, config))}
    assert readers == {"evaluation"}
    assert not any(each.stage == "evaluation" for node in nodes(config) for each in upstream(node, config))


def _below_readers(config: Config) -> set[str]:
    """The artifacts that read labels, or are made from what does."""
    found = _readers(config)
    for node in nodes(config):
        if any(source.name in found for source in upstream(node, config)):
            found.add(node.name)
    return found


def test_scrambled_labels_change_nothing_but_what_declares_them(run: RunFolder, material: Path, tmp_path: Path) -> None:
    other = _make(tmp_path / "other", material, "scrambled", evaluation__extra_rows=EVERYTHING)
    run_all(other)
    mine, theirs = digests(run), digests(other)
    assert mine.keys() == theirs.keys()
    differing = {name for name in mine if mine[name] != theirs[name]}
    supervised = "adaptors/supervised/adaptors.safetensors", "embeddings/supervised/embeddings.npy"
    assert differing >= {LABELS, "evaluation/metrics.csv", *supervised}, "what reads labels does see them"
    allowed = _below_readers(_config())
    assert {name for name in differing - {LABELS} if name.rpartition("/")[0] not in allowed} == set()
    reciprocity = {name for name in differing if name.endswith("reciprocity.parquet")}
    assert reciprocity <= {"retrieval/supervised/reciprocity.parquet"}, "this table of a model reads no label"


def test_absent_labels_change_nothing_at_all_of_the_rest(run: RunFolder, material: Path, tmp_path: Path) -> None:
    other = _make(tmp_path / "other", material, "absent", evaluation__extra_rows=UNSUPERVISED)
    lines = run_all(other)
    assert any("no test image has a label" in line for line in lines)
    index = ["model", "domain", "gallery"]
    told, whole = (tables.load_metrics(each.root).astype(dict.fromkeys(index, str)) for each in (other, run))
    told, whole = told.set_index(index), whole.set_index(index)
    known = ["num_queries", "num_possible_queries", "num_images", "num_reciprocity_images", "reciprocity"]
    assert told.drop(columns=known).isna().all(axis=None) and not told[known[:2]].any(axis=None)
    assert told["reciprocity"].between(0, 1).all()
    pd.testing.assert_series_equal(told["reciprocity"], whole["reciprocity"].loc[told.index])
    mine, theirs = digests(run), digests(other)
    differing = {name for name in theirs if mine[name] != theirs[name]}
    tables_with_labels = {f"evaluation/{file}" for file in ("metrics.csv", "per_query.parquet", "clusters.csv")}
    tables_with_labels |= {name for name in theirs if name.endswith("/per_query.parquet")}
    assert differing == {LABELS, *tables_with_labels}
    agreement = tables.cluster_metrics(other.root)
    assert agreement[["purity", "nmi", "ami"]].isna().all(axis=None) and not agreement["num_images"].any()
    missing = {name.rpartition("/")[0] for name in mine.keys() - theirs.keys()}
    assert missing == set(LABELLED)


@pytest.mark.parametrize("labels", ["scrambled", "absent"])
def test_the_defaults_of_a_new_run_are_the_same(material: Path, tmp_path: Path, labels: str) -> None:
    texts = []
    for name in ("true", labels):
        made = _make(tmp_path / name, material, name, clusters__num_clusters="auto")
        texts.append(made.config_path.read_text().replace(f"{name}.csv", "TABLE.csv"))
    assert texts[0] == texts[1]
    assert "num_clusters: [" in texts[0]


def test_every_other_stage_runs_where_the_labels_cannot_be_read(run: RunFolder, material: Path, tmp_path: Path) -> None:
    other = _make(tmp_path / "other", material, "true", evaluation__extra_rows=UNSUPERVISED)
    _make_labels_unreadable(other)
    for stage in STAGES:
        if stage.name not in ("retrieval", "evaluation", "given_features"):
            run_all(other, stage=stage.name)
    mine, theirs = digests(run), digests(other)
    assert all(theirs[name] == mine[name] for name in theirs)
    with pytest.raises(ValueError, match="retrieval/zero_shot cannot run: images in .* is damaged .labels.parquet"):
        run_all(other, stage="retrieval")


def test_a_second_round_runs_where_the_labels_cannot_be_read(run: RunFolder, material: Path, tmp_path: Path) -> None:
    given = str(run.root)
    other = _make(tmp_path / "other", material, "true", evaluation__extra_rows="[]", clusters__embeddings=given)
    _make_labels_unreadable(other)
    run_all(other, until="clusters")
    copied, fused = (np.load(each, allow_pickle=False) for each in (other.root / GIVEN, run.root / FUSED))
    assert np.array_equal(copied, fused)


def _make_labels_unreadable(run: RunFolder) -> None:
    run_all(run, until="images")
    file = run.root / LABELS
    file.write_bytes(bytes(file.stat().st_size))
