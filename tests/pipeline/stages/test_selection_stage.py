"""The stage ``selection``: weak sets are left out of fusion, mean and student, and all that names sets follows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grappa.pipeline.engine.status import read_config, states
from grappa.pipeline.open_run import open_run
from grappa.pipeline.pages.explore.collection import Collection
from grappa.pipeline.stages import adaptors
from grappa.pipeline.store.artifacts import RunFolder
from tests.helpers.tiny import draw_images, make_run, run_all, split_of, write_table, write_weights

SETS = "[2, 4, 8]"


def drawn(folder: Path, name: str = "run", **changes: object) -> RunFolder:
    """A run of three sets on 60 drawn images, half of them to learn from."""
    images = folder / "images.csv"
    if not images.exists():
        write_table(draw_images(folder / "images"), images, split=split_of)
    return make_run(
        folder / name, [images], write_weights(folder / "w.safetensors"), clusters__num_clusters=SETS, **changes
    )


def selection(run: RunFolder) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run.root / "selection" / "selection.json").read_text())
    return found


@pytest.fixture(scope="module")
def chosen(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run in which one of three sets was left out."""
    run = drawn(tmp_path_factory.mktemp("selection"), selection__num_images=20)
    with pytest.MonkeyPatch.context() as patch:
        judge_few(patch)
        patch.setattr(adaptors, "choose_sets", leave_the_first_out)
        run_all(run)
    return run


def judge_few(patch: pytest.MonkeyPatch) -> None:
    """Let ten images be enough to judge sets by."""
    for name, number in (("MIN_JUDGED", 4), ("MIN_VIEWED", 4), ("MIN_FITTED", 4)):
        patch.setattr(adaptors, name, number)


def leave_the_first_out(standouts: dict[str, np.ndarray], **options: object) -> tuple[adaptors.JudgedSet, ...]:
    assert all(len(found) == 10 and np.isfinite(found).all() for found in standouts.values())
    return tuple(
        adaptors.JudgedSet(name, 1.0, 0.1, 0.05, 0.15, kept=number > 0) for number, name in enumerate(standouts)
    )


def test_the_sets_left_out_are_named_with_their_loss(chosen: RunFolder) -> None:
    assert [each["name"] for each in selection(chosen)["sets"] if each["kept"]] == ["k00004", "k00008"]
    log = (chosen.root / "selection" / "log.jsonl").read_text()
    assert "k00004, k00008 are fused; left out as certainly weaker: k00002 (-10.0% [-15.0%, -5.0%])" in log


def test_what_is_fused_has_the_chosen_sets_only(chosen: RunFolder) -> None:
    attention = np.load(chosen.root / "attention" / "neighbors" / "attention.npy")
    record = json.loads((chosen.root / "model" / "model.json").read_text())
    assert attention.shape[2] == 2
    assert record["sets"] == ["k00004", "k00008"] and record["fusion"]


def test_tables_and_pages_name_the_chosen_sets(chosen: RunFolder) -> None:
    assert set(open_run(chosen.root).attention()["granularity"]) == {"k00004", "k00008"}
    assert Collection.open(chosen.root).fused == ("k00004", "k00008")
    assert set(open_run(chosen.root).cluster_sizes()["granularity"]) == {"k00002", "k00004", "k00008"}


def test_with_too_few_images_all_sets_are_fused(tmp_path: Path) -> None:
    run = drawn(tmp_path)
    lines = run_all(run, until="selection")
    assert all(each["kept"] for each in selection(run)["sets"]) and selection(run)["num_images"] == 0
    assert "k00002, k00004, k00008 are fused: too few images to choose among sets" in lines[-1]


def test_the_names_of_an_attention_are_those_that_it_was_made_of(chosen: RunFolder, tmp_path: Path) -> None:
    """Also where the configuration asks for all sets since: a selection that is on disk then says nothing."""
    run = RunFolder.open(Path(shutil.copytree(chosen.root, tmp_path / "run")))
    file = run.root / "config.yaml"
    file.write_text(file.read_text().replace("  sets: auto", "  sets: all"))
    assert "selection" not in [each.name for each in states(run, read_config(run))]
    assert set(open_run(run.root).attention()["granularity"]) == {"k00004", "k00008"}
    run_all(run, until="attention")
    assert set(open_run(run.root).attention()["granularity"]) == {"k00002", "k00004", "k00008"}
    assert Collection.open(run.root).fused == ("k00002", "k00004", "k00008")


def test_halves_that_hold_too_few_different_images_leave_all_sets(tmp_path: Path) -> None:
    """As where most images are copies of one."""
    run = drawn(tmp_path, selection__num_images=20)
    with pytest.MonkeyPatch.context() as patch:
        judge_few(patch)
        patch.setattr(adaptors, "region_halves", lambda rows, ids, seed: np.arange(len(rows)) == 0)
        run_all(run, until="selection")
    assert selection(run)["num_images"] == 0 and all(each["kept"] for each in selection(run)["sets"])


def test_sets_of_an_interrupted_selection_are_not_embedded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, asked = drawn(tmp_path, selection__num_images=20), []
    embed = adaptors._embedded

    def counted(context: Any, name: str, trial: adaptors.Trial) -> Any:
        asked.append(name)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return embed(context, name, trial)

    judge_few(monkeypatch)
    monkeypatch.setattr(adaptors, "_embedded", counted)
    with pytest.raises(KeyboardInterrupt):
        run_all(run, until="selection")
    run_all(run, until="selection")
    assert asked == ["k00002", "k00004", "k00008", "k00008"] and selection(run)["num_images"] == 10


def test_two_sets_or_all_need_no_selection(tmp_path: Path) -> None:
    two = make_run(tmp_path / "two", [draw_images(tmp_path / "images")], write_weights(tmp_path / "w.safetensors"))
    for run in (two, drawn(tmp_path, selection__sets="all")):
        assert "selection" not in [each.name for each in states(run, read_config(run))]


def test_a_run_of_before_the_selection_stays_fresh(tmp_path: Path) -> None:
    """Its configuration file has no such section: all its sets were fused."""
    run = drawn(tmp_path, selection__sets="all")
    run_all(run, until="fusion")
    file = run.root / "config.yaml"
    text = file.read_text()
    file.write_text(text[: text.index("selection:")] + text[text.index("fusion:") :])
    assert read_config(run).selection.sets == "all"
    found = {each.name: each for each in states(run, read_config(run))}
    assert found["fusion/neighbors"].state.kind == "fresh"
