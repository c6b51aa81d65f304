"""The verdict in whole runs: what it chooses is deployed, indexed, searched and exported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import grappa
from grappa.images import splits
from grappa.method.head import apply_head
from grappa.metrics import indicators
from grappa.metrics import verdict as rule
from grappa.metrics.indicators import neighborhood_standout
from grappa.metrics.retrieval import paired_bootstrap
from grappa.metrics.verdict import judge
from grappa.pipeline.commands.search import search
from grappa.pipeline.config.yaml_file import ConfigError
from grappa.pipeline.engine.status import read_config, states
from grappa.pipeline.opening import head_in, read_images
from grappa.pipeline.stages.verdict import _evidence
from grappa.pipeline.store.artifacts import RunFolder
from tests.helpers.tiny import draw_images, make_run, run_all, split_of, with_other_bytes, write_table, write_weights


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("material")
    images = draw_images(folder / "images")
    write_weights(folder / "weights.safetensors")
    write_table(images, folder / "split.csv", split=split_of)
    write_table(images, folder / "whole.csv")
    return folder


def _make(root: Path, material: Path, table: str = "split", **changes: object) -> RunFolder:
    return make_run(root, [material / f"{table}.csv"], material / "weights.safetensors", **changes)


@pytest.fixture(scope="module")
def chosen(material: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    run = _make(tmp_path_factory.mktemp("runs") / "run", material, model__source="auto")
    run_all(run)
    return run


def _query(material: Path) -> Path:
    image = sorted(path for path in (material / "images").rglob("*") if path.is_file())[0]
    return with_other_bytes(image, material)  # an image of the run is not its own result


def _found(run: RunFolder, material: Path) -> NDArray[np.float64]:
    return np.array([each["similarity"] for each in search(run.root, _query(material), 3)])


def test_too_few_images_deploy_the_frozen_backbone_with_its_head(chosen: RunFolder, material: Path) -> None:
    record = json.loads((chosen.root / "verdict" / "verdict.json").read_text())
    assert (record["verdict"], record["choice"], record["images"]) == ("too few images", "zero_shot", "test")
    opened = grappa.open_run(chosen.root)
    assert opened.deployed == "zero_shot"
    model = grappa.load_model(chosen.root)
    assert model.adaptation is None and model.head.form()["kind"] == "whitened_neighborhood"
    assert (np.diff(_found(chosen, material)) <= 0).all() and _found(chosen, material)[0] > 0.9


def test_adapted_models_see_views_of_judged_images_only(chosen: RunFolder) -> None:
    frozen = np.load(chosen.root / "frozen_views" / "rows.npy")
    tested, _ = splits.test_rows(read_images(chosen.root / "images"))
    for model in ("k00004", "mean", "student"):
        seen = np.load(chosen.root / "views" / model / "rows.npy")
        np.testing.assert_array_equal(seen, np.intersect1d(frozen, tested))
        assert len(np.load(chosen.root / "views" / model / "views.npy")) == len(seen) < len(frozen)


def test_views_of_all_images_give_the_verdict_of_the_judged_ones(
    chosen: RunFolder, material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rule, "MIN_IMAGES", 1)
    copy = RunFolder.open(shutil.copytree(chosen.root, tmp_path / "copy"))
    run_all(copy, stage="verdict", force=True)
    judged = json.loads((copy.root / "verdict" / "verdict.json").read_text())
    _make(copy.root, material, model__source="auto", views__num_judged="null")  # as older runs have it
    stale = {each.name for each in states(copy, read_config(copy)) if each.state.kind != "fresh"}
    assert {name.partition("/")[0] for name in stale} <= {"views", "verdict", "model", "index"}
    run_all(copy, until="verdict")
    whole = json.loads((copy.root / "verdict" / "verdict.json").read_text())
    assert len(np.load(copy.root / "views" / "fused" / "rows.npy")) == len(
        np.load(copy.root / "frozen_views" / "rows.npy")
    )
    assert whole["num_images"] == judged["num_images"]
    for one, other in zip(whole["models"], judged["models"], strict=True):
        assert one["indicator"] == pytest.approx(other["indicator"], abs=1e-4)


def test_every_model_is_judged_as_it_is_searched(
    chosen: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indicators, "MIN_OF_DOMAIN", 2)  # else three domains of ten images count as one
    copy = RunFolder.open(shutil.copytree(chosen.root, tmp_path / "copy"))
    run_all(copy, stage="verdict", force=True)
    table = read_images(copy.root / "images")
    tested, domains = splits.test_rows(table)[0], table["domain"].to_numpy(dtype=object)
    frozen_within, lows = None, []
    for each in json.loads((copy.root / "verdict" / "verdict.json").read_text())["models"]:
        folder, seen_by = copy.root / "heads" / each["model"], copy.root / "views" / each["model"]
        seen_by = seen_by if seen_by.exists() else copy.root / "frozen_views"
        rows, seen = (np.load(seen_by / name) for name in ("rows.npy", "views.npy"))
        rows, seen = rows[np.isin(rows, tested)], seen[np.isin(rows, tested)]
        images, views = np.load(folder / "embeddings.npy")[rows], apply_head(head_in(folder), seen)
        assert each["indicator"] == pytest.approx(float(neighborhood_standout(images, views).mean()), abs=1e-4)
        within = neighborhood_standout(images, views, domains=domains[rows])
        frozen_within = within if frozen_within is None else frozen_within
        low, _ = paired_bootstrap(within - frozen_within, seed=read_config(copy).views.seed)
        assert each["low_within"] == pytest.approx(low, abs=1e-4)
        lows.append(each["low_within"] - each["low"])
    assert np.ptp(lows) > 1e-3, "within domains it is another number"


def _verdict(**within: tuple[float, float]) -> str:
    """Return the evidence for models that are better by so much, among all images and within domains."""
    frozen, noise = np.linspace(2, 3, 200), 0.01 * np.random.default_rng(0).normal(size=200)
    among = {"zero_shot": frozen} | {name: frozen + by + noise for name, (by, _) in within.items()}
    inside = {"zero_shot": frozen} | {name: frozen + by + noise for name, (_, by) in within.items()}
    return _evidence(judge(among, within=inside, by_cost=list(within)), "test")


def test_a_backbone_without_any_standout_can_be_compared_with() -> None:
    same = {"zero_shot": np.zeros(200), "mean": np.zeros(200)}
    assert "stand out +0.000 [+0.000, +0.000] against" in _evidence(judge(same, by_cost=[]), "test")
    better = {"zero_shot": np.zeros(200), "mean": np.full(200, 0.5)}
    assert "stand out +0.500 [+0.500, +0.500] against" in _evidence(judge(better, by_cost=[]), "test")


def test_the_evidence_names_the_best_model_also_where_it_holds_among_all_images_only() -> None:
    among_all_only = _verdict(k00004=(0.5, -0.1), mean=(-0.1, 0.2))
    assert "with k00004, the best adapted model, but not certainly within its domain" in among_all_only
    assert "with k00004, the best adapted model (" in _verdict(k00004=(-0.3, -0.1), mean=(-0.6, 0.2))
    assert "with mean, the best adapted model (" in _verdict(k00004=(0.6, -0.1), mean=(0.5, 0.2))


def test_another_choice_is_deployed_everywhere(
    chosen: RunFolder, material: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rule, "MIN_IMAGES", 1)
    monkeypatch.setattr(rule, "MIN_SHARE", -9.0)
    monkeypatch.setattr(rule, "paired_bootstrap", lambda difference, seed: (0.1, 0.2))
    run_all(chosen, stage="verdict", force=True)
    run_all(chosen)
    opened = grappa.open_run(chosen.root)
    assert opened.deployed != "zero_shot" and opened.deployed in ("k00004", "k00008", "mean", "fused", "student")
    assert grappa.load_model(chosen.root).adaptation is not None
    stored, _ = opened.embeddings()
    np.testing.assert_array_equal(stored, opened.embeddings(opened.deployed)[0])
    assert _found(chosen, material)[0] > 0.9


def test_any_model_can_be_deployed_by_hand(chosen: RunFolder, material: Path) -> None:
    for source in ("k00004", "mean", "zero_shot"):
        _make(chosen.root, material, model__source=source)
        run_all(chosen)
        assert grappa.open_run(chosen.root).deployed == source
        assert _found(chosen, material)[0] > 0.9


def test_a_model_that_the_run_does_not_have_is_refused(material: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="model.source is k00005, but the granularities are k00004, k00008"):
        _make(tmp_path / "run", material, model__source="k00005")
    with pytest.raises(ConfigError, match="found 'best'; give auto, zero_shot, mean, fused, student, single"):
        _make(tmp_path / "run", material, model__source="best")


def test_without_a_split_train_images_are_judged_and_only_whitened(material: Path, tmp_path: Path) -> None:
    run = _make(tmp_path / "run", material, "whole", model__source="auto")
    run_all(run, until="verdict")
    record = json.loads((run.root / "verdict" / "verdict.json").read_text())
    assert record["images"] == "train"
    assert record["num_images"] == len(np.load(run.root / "frozen_views" / "rows.npy"))
    fresh = {each.name: each.state.kind for each in states(run, read_config(run))}
    assert fresh["verdict"] == "fresh"
    for model in ("zero_shot", "fused"):
        assert json.loads((run.root / "heads" / model / "head.json").read_text()) == {"kind": "whitening"}


def test_one_weight_is_chosen_for_the_heads_of_all_models(chosen: RunFolder) -> None:
    choice = json.loads((chosen.root / "heads" / "zero_shot" / "choice.json").read_text())
    for model in ("zero_shot", "k00004", "fused"):
        head = json.loads((chosen.root / "heads" / model / "head.json").read_text())
        assert head["neighborhood_weight"] == choice["chosen"]
