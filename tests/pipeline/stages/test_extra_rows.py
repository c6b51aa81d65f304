"""The rows that are only made when asked for: concat, multi_head, supervised."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from grappa.pipeline import tables
from grappa.pipeline.commands.run import read_table
from grappa.pipeline.config.yaml_file import ConfigError
from grappa.pipeline.engine.execution import Selection, planned
from grappa.pipeline.engine.status import read_config, states
from grappa.pipeline.store.artifacts import RunFolder
from tests.helpers.rounding import sum_error
from tests.helpers.tiny import digests, draw_images, make_run, run_all, split_of, write_table, write_weights

EXTRA = "[concat, multi_head, supervised]"


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("material")
    draw_images(folder / "images")
    write_weights(folder / "weights.safetensors")
    write_table(folder / "images", folder / "table.csv", label=lambda path: path.parent.name, split=split_of)
    return folder


def _make(folder: Path, material: Path, table: Path, **changes: object) -> RunFolder:
    return make_run(folder, [table], material / "weights.safetensors", **changes)


@pytest.fixture(scope="module")
def plain(material: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The digests of a run without extra rows."""
    run = _make(tmp_path_factory.mktemp("runs") / "plain", material, material / "table.csv")
    run_all(run)
    return digests(run)


@pytest.fixture(scope="module")
def run(material: Path, tmp_path_factory: pytest.TempPathFactory, plain: dict[str, str]) -> RunFolder:
    """A finished run to which the extra rows were added."""
    made = _make(tmp_path_factory.mktemp("runs") / "run", material, material / "table.csv")
    run_all(made)
    _make(made.root, material, material / "table.csv", evaluation__extra_rows=EXTRA)
    stale = [each.name for each in states(made, read_config(made)) if each.state.kind == "stale"]
    assert stale == ["evaluation"], "asking for rows makes nothing stale but the table"
    run_all(made)
    return made


def test_the_rows_join_the_table_and_change_no_other(run: RunFolder, plain: dict[str, str]) -> None:
    models = list(dict.fromkeys(tables.load_metrics(run.root)["model"]))
    assert models[-4:] == ["concat", "multi_head", "supervised", "oracle"]
    mine = digests(run)
    assert {name for name in plain if plain[name] != mine[name]} == {
        "evaluation/per_query.parquet",
        "evaluation/metrics.csv",
    }
    added = {name.rpartition("/")[0] for name in mine.keys() - plain.keys()}
    assert added >= {"adaptors/multi_head", "adaptors/supervised", "embeddings/concat", "embeddings/supervised"}


def test_concat_holds_the_granularities_side_by_side(run: RunFolder) -> None:
    concat, *parts = (
        np.load(run.root / "embeddings" / row / "embeddings.npy") for row in ("concat", "k00004", "k00008")
    )
    assert (concat.shape, concat.dtype) == ((60, 64), np.float32)
    np.testing.assert_allclose(
        concat @ concat.T, (parts[0] @ parts[0].T + parts[1] @ parts[1].T) / 2, atol=sum_error(64)
    )


def test_the_competitors_have_the_budget_of_one_set(run: RunFolder) -> None:
    curves = tables.learning_curves(run.root)
    last = curves[curves["stage"] == "adaptors"].groupby("instance")["step"].max()
    assert set(last.index) == {"k00004", "k00008", "multi_head", "supervised"}
    assert last.nunique() == 1
    sizes = {(run.root / "adaptors" / name / "adaptors.safetensors").stat().st_size for name in last.index}
    assert len(sizes) == 1, "a set's file is as big whatever it was trained on"


def test_the_result_table_says_how_much_of_the_gap_is_closed(run: RunFolder) -> None:
    _, rows = read_table(run.root / "evaluation" / "metrics.csv")
    assert [row[0] for row in rows][-2:] == ["oracle", "gap closed"]


def test_supervised_learns_from_labelled_train_images_only(material: Path, tmp_path: Path) -> None:
    def label(path: Path) -> str:
        return path.parent.name if path.stem in "012" or split_of(path) == "test" else ""

    some = _make(
        tmp_path / "some",
        material,
        write_table(material / "images", tmp_path / "some.csv", label=label, split=split_of),
        evaluation__extra_rows="[supervised]",
    )
    lines = run_all(some, until="adaptors")
    assert any(line.startswith("adaptors/supervised: 2 epochs") and "18 labels" in line for line in lines)
    log = (some.root / "adaptors" / "supervised" / "log.jsonl").read_text().splitlines()
    total = next(json.loads(line)["total"] for line in log if "total" in json.loads(line))
    assert total == 2 * (18 // 4) * 4


def test_without_labels_supervised_is_refused_when_asked_for_and_when_run(material: Path, tmp_path: Path) -> None:
    table = write_table(
        material / "images",
        tmp_path / "test_only.csv",
        label=lambda path: path.parent.name if split_of(path) == "test" else "",
        split=split_of,
    )
    with pytest.raises(ConfigError, match="asks for `supervised`, but no train image has a label; give labels"):
        _make(tmp_path / "refused", material, table, evaluation__extra_rows="[supervised]")
    made = _make(tmp_path / "edited", material, table)
    made.config_path.write_text(made.config_path.read_text().replace("extra_rows: []", "extra_rows: [supervised]"))
    assert read_config(made).evaluation.extra_rows == ("supervised",)
    with pytest.raises(ValueError, match="no train image has a label; give labels, or leave it out"):
        run_all(made, until="adaptors")


def test_one_call_makes_the_embeddings_that_concat_is_made_of(run: RunFolder) -> None:
    before = digests(run)
    config = read_config(run)
    for row in ("k00004", "k00008", "concat"):
        shutil.rmtree(run.root / "embeddings" / row)
    named = [name for name, _ in planned(run, config, Selection(stage="embeddings"))]
    assert named == ["embeddings/k00004", "embeddings/k00008", "embeddings/concat"]
    with pytest.raises(ValueError, match=r"embeddings/concat cannot run: upstream embeddings/k00004 is missing"):
        run_all(run, stage="embeddings", instance="concat")
    lines = run_all(run, stage="embeddings")
    assert [line.partition(":")[0] for line in lines] == named
    assert digests(run) == before
    assert run_all(run) == []


def test_the_rows_come_back_the_same_bit_for_bit(run: RunFolder) -> None:
    before = digests(run)
    run_all(run, stage="adaptors", force=True)
    assert digests(run) == before
