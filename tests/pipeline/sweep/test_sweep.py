"""`grappa sweep`: nothing computed twice, resumed after a kill, a failing run alone fails, one tidy table."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner, Result

from grappa.pipeline import tables
from grappa.pipeline.cli import app
from grappa.pipeline.commands.init import Request, initialize
from grappa.pipeline.engine.context import StageContext
from grappa.pipeline.engine.progress import Progress
from grappa.pipeline.engine.status import read_config, states
from grappa.pipeline.graph.node import Node
from grappa.pipeline.store.artifacts import RunFolder
from grappa.pipeline.sweep.command import braced, run_sweep
from grappa.pipeline.sweep.comparison import compact
from grappa.pipeline.sweep.runs import SweepRequest
from tests.helpers.fake_stages import FakeStages, fake_stages
from tests.helpers.tiny import digests, draw_images, settings, write_table, write_weights

RUNS = "runs: {base: {}, swapped: {fusion.attention_loss: swapped}, wide: {adaptors.bottleneck_dim: 96}}\n"
METRICS = """\
model,domain,gallery,num_queries,map
zero_shot,_mean,domain,8,0.5
fused,birds,domain,8,{0}
fused,_mean,domain,8,{0}
fused,_mean,merged,8,0.25
"""

BELOW_FUSION = {f"{stage}/{row}" for stage in ("embeddings", "views", "heads") for row in ("fused", "student")}
BELOW_FUSION |= {"fusion/neighbors", "student", "verdict", "model", "evaluation"}
BELOW_FUSION |= {"retrieval/fused", "retrieval/fused_raw", "retrieval/student"}


class Desk:
    """A folder of listed files, a sweep file, and fake stages for whatever run."""

    def __init__(self, folder: Path, fakes: FakeStages) -> None:
        self.folder, self.fakes, self.out = folder, fakes, folder / "out"
        self.images = folder / "images"
        for number in range(24):
            file = self.images / f"{'birds' if number % 2 else 'cars'}/{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(b"%d" % number)
        self.write(RUNS)
        fakes.hooks["evaluation"] = write_metrics

    def write(self, text: str) -> None:
        base = f"base: {{images: [{self.images}], set: {{backbone.weights: {self.folder / 'weights.safetensors'}}}}}\n"
        (self.folder / "sweep.yaml").write_text(base + text)

    def sweep(self, *arguments: str | Path) -> Result:
        self.fakes.ran.clear()
        command = ["sweep", self.folder / "sweep.yaml", "--out", self.out, *arguments]
        return CliRunner().invoke(app, [str(argument) for argument in command])

    def refused(self, *arguments: str | Path) -> str:
        result = self.sweep(*arguments)
        assert result.exit_code == 1, result.output
        assert result.stderr.startswith("grappa: ") and result.stderr.count("\n") == 1
        assert not self.out.exists() and not self.fakes.ran
        return result.stderr

    def times(self, name: str) -> int:
        """How often an artifact was computed in the last sweep."""
        return self.fakes.ran.count(name)

    def source(self, run: str, name: str) -> str | None:
        """The run that an artifact was reused from."""
        stage, _, instance = name.partition("/")
        manifest = RunFolder.open(self.out / run).artifact(Node(stage, instance or None)).manifest()
        assert manifest is not None
        taken = manifest.provenance.get("taken_from")
        return taken and Path(taken).relative_to(self.out).parts[0]


def write_metrics(context: StageContext) -> None:
    value = 0.25 + context.config.fusion.seed / 8
    (context.path / "metrics.csv").write_text(METRICS.format(value))


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    return Desk(tmp_path, fake_stages(tmp_path / "spare", monkeypatch))


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_ino) for path in sorted(folder.rglob("*"))}


def test_what_runs_share_is_computed_once(desk: Desk) -> None:
    result = desk.sweep()
    assert result.exit_code == 0, result.output
    assert {desk.times(name) for name in ("images", "features", "neighbors", "clusters/k00002")} == {1}
    assert desk.times("adaptors/k00002") == 2
    assert desk.times("fusion/neighbors") == desk.times("evaluation") == 3
    assert desk.source("base", "features") is None
    assert desk.source("swapped", "adaptors/k00002") == "base"
    assert desk.source("wide", "clusters/k00002") == "base"
    assert desk.source("wide", "adaptors/k00002") is None
    assert "reused from base: backbone, images, features, frozen_views, whitening" in result.stdout


def test_every_run_is_an_ordinary_one_and_a_second_sweep_does_nothing(desk: Desk) -> None:
    desk.sweep()
    for name in ("base", "swapped", "wide"):
        run = RunFolder.open(desk.out / name)
        fresh = {each.node.stage for each in states(run, read_config(run), verify=True) if each.state.kind == "fresh"}
        assert {"backbone", "adaptors", "embeddings", "evaluation"} <= fresh
        assert "index" not in fresh, "`until` is evaluation"
    assert read_config(RunFolder.open(desk.out / "wide")).adaptors.bottleneck_dim == 96
    again = desk.sweep()
    assert desk.fakes.ran == []
    assert again.stdout.count("all is fresh") == 3


def test_a_dry_run_says_what_each_run_changes_and_changes_nothing(desk: Desk) -> None:
    said = desk.sweep("--dry-run").stdout
    assert not desk.out.exists() and desk.fakes.ran == []
    assert said.splitlines() == [
        "base: the base",
        "swapped: fusion.attention_loss=swapped",
        "wide: adaptors.bottleneck_dim=96",
        f"3 runs in {desk.out}, up to evaluation",
    ]
    desk.sweep()
    before = snapshot(desk.out)
    assert desk.sweep("--dry-run").stdout == said
    assert snapshot(desk.out) == before


def test_a_run_is_reported_and_tried_again_and_the_others_go_on(desk: Desk) -> None:
    def fail(context: StageContext) -> None:
        if context.config.fusion.attention_loss == "swapped":
            raise FloatingPointError("the loss is nan at step 3")

    desk.fakes.hooks["fusion/neighbors"] = fail
    result = desk.sweep()
    assert result.exit_code == 1
    assert "swapped failed: the loss is nan at step 3" in result.stdout
    sentence = "grappa: 1 of 3 runs failed, the same command tries again: swapped: the loss is nan at step 3"
    assert result.stderr.splitlines()[-1] == sentence and "Traceback" not in result.stderr
    assert set(tables.load_sweep(desk.out)["run"]) == {"base", "wide"}
    assert ["swapped", "0", "-", "-"] in [line.split() for line in result.stdout.splitlines()]
    del desk.fakes.hooks["fusion/neighbors"]
    assert desk.sweep().exit_code == 0
    assert set(desk.fakes.ran) == BELOW_FUSION
    assert set(tables.load_sweep(desk.out)["run"]) == {"base", "swapped", "wide"}


def test_what_nobody_expects_stops_one_run_too_with_its_traceback(desk: Desk) -> None:
    def fail(context: StageContext) -> None:
        if context.config.adaptors.bottleneck_dim == 96:
            raise KeyError("a defect")

    desk.fakes.hooks["adaptors/k00002"] = fail
    desk.write(RUNS.replace("base: {}, ", ""))
    result = desk.sweep()
    assert result.exit_code == 1 and "1 of 2 runs failed" in result.stderr
    assert "Traceback" in result.stderr and "KeyError: 'a defect'" in result.stderr


def test_a_full_disk_stops_the_sweep(desk: Desk) -> None:
    def fail(context: StageContext) -> None:
        raise OSError(28, "No space left on device")

    desk.fakes.hooks["features"] = fail
    result = desk.sweep()
    assert result.exit_code == 1 and "The disk is full at" in result.stderr
    assert desk.times("features") == 1


def test_an_artifact_that_a_later_run_has_already_is_taken_over(desk: Desk) -> None:
    desk.write("runs: {second: {fusion.seed: 1}}\n")
    desk.sweep()
    desk.write("runs: {first: {fusion.seed: 1}, second: {fusion.seed: 2}}\n")
    desk.sweep()
    assert desk.source("first", "fusion/neighbors") == "second"
    assert set(desk.fakes.ran) == BELOW_FUSION


def test_another_run_gives_what_it_has(desk: Desk) -> None:
    desk.sweep()
    result = desk.sweep("--out", desk.folder / "elsewhere", "--from", desk.out / "wide")
    assert result.exit_code == 0, result.output
    assert f"reused from {desk.out / 'wide'}: backbone, images" in result.stdout
    assert "features" not in desk.fakes.ran and desk.times("adaptors/k00002") == 1


def test_ctrl_c_keeps_what_is_done_and_the_same_command_goes_on(desk: Desk) -> None:
    def interrupt(context: StageContext) -> None:
        if context.config.adaptors.bottleneck_dim == 96:
            raise KeyboardInterrupt

    desk.fakes.hooks["adaptors/k00002"] = interrupt
    result = desk.sweep()
    assert result.exit_code == 130 and "stopped; the same command resumes" in result.stderr
    assert set(tables.load_sweep(desk.out)["run"]) == {"base", "swapped"}
    del desk.fakes.hooks["adaptors/k00002"]
    assert desk.sweep().exit_code == 0
    assert "features" not in desk.fakes.ran and desk.times("adaptors/k00002") == 1


def test_the_table_is_tidy(desk: Desk) -> None:
    desk.write(f"{RUNS}seeds: {{fusion.seed: [0, 1, 2]}}\nrows: [fused]\n")
    result = desk.sweep()
    table = tables.load_sweep(desk.out)
    pd.testing.assert_frame_equal(table, pd.read_csv(desk.out / "sweep.csv"))
    assert list(table.columns[:9]) == [
        *("run", "variant", "fusion.attention_loss", "adaptors.bottleneck_dim", "fusion.seed"),
        *("model", "domain", "gallery", "num_queries"),
    ]
    assert set(table["model"]) == {"fused"} and len(table) == 9 * 3
    wide = table[table["run"] == "wide-seed=2"].iloc[0]
    assert (wide["variant"], wide["adaptors.bottleneck_dim"], wide["fusion.seed"]) == ("wide", 96, 2)
    assert wide["map"] == 0.5
    assert table["seconds_features"].nunique() == 1, "the time it took where it was computed"
    here = table.groupby("run")["seconds_here"].first()
    totals = table.groupby("run")["seconds_total"].first()
    assert here["base-seed=0"] == totals["base-seed=0"] and (here <= totals).all()
    assert [line.split() for line in result.stdout.splitlines()[-5:-1]] == [
        ["mean", "mAP", "seeds", "fused"],
        *([name, "3", "0.3750", "±", "0.0722"] for name in ("base", "swapped", "wide")),
    ]


def test_single_sets_are_in_the_file_but_not_in_the_compact_table() -> None:
    rows = [("a", "k00004", 0.5), ("a", "fused", 0.25), ("b", "k00008", 0.5), ("b", "fused", float("nan"))]
    table = pd.DataFrame(rows, columns=["variant", "model", "map"]).assign(domain="_mean", gallery="domain", run="x")
    header, lines = compact(table, ["a", "b", "c"])
    assert header == ["mean mAP", "seeds", "fused"]
    assert lines == [["a", "1", "0.2500"], ["b", "1", "-"], ["c", "0", "-"]]


def test_the_compact_table_of_runs_that_all_failed() -> None:
    table = pd.DataFrame(columns=["run", "variant", "model", "domain", "gallery", "map"])
    assert compact(table, ["a", "b"]) == (["mean mAP", "seeds"], [["a", "0"], ["b", "0"]])


def test_an_edited_sweep_says_what_changes_and_drops_what_is_no_longer_true(desk: Desk) -> None:
    desk.sweep()
    desk.write(RUNS.replace("swapped}", "swapped, fusion.seed: 4}"))
    desk.fakes.hooks["fusion/neighbors"] = lambda context: (_ for _ in ()).throw(ValueError("no"))
    result = desk.sweep()
    assert "swapped: config fusion.seed: 0 -> 4" in result.stdout
    assert set(tables.load_sweep(desk.out)["run"]) == {"base", "wide"}


def test_without_the_evaluation_there_is_no_table(desk: Desk) -> None:
    desk.write(f"{RUNS}until: features\n")
    result = desk.sweep()
    assert result.exit_code == 0 and "leaves the evaluation out" in result.stdout
    assert "clusters/k00002" not in desk.fakes.ran
    with pytest.raises(ValueError, match=r"sweep\.parquet is missing; make it by `grappa sweep SWEEP"):
        tables.load_sweep(desk.out)


@pytest.mark.parametrize(
    ("text", "arguments", "sentence"),
    [
        ("runs: {a: {fusion.sed: 1}}", [], "sweep.yaml: a: unknown key fusion.sed: did you mean fusion.seed?"),
        ("runs: {a: {}, b: {fusion.seed: x}}", [], "sweep.yaml: b: fusion.seed: found 'x', expected a valid integer"),
        ("runs: {a: {fusion.seed: on}}", [], "a: fusion.seed: found True, expected a number"),
        ("runs: {a: {fusion.num_neighbors: 11}}", [], "fusion.num_neighbors is 11 but neighbors.num_neighbors keeps"),
        ("runs: {a: {clusters.num_clusters: [99]}}", [], "a: clusters.num_clusters: 99 clusters are more than half"),
        ("runs: {a: {backbone.weights: /nowhere}}", [], "backbone.weights: no such file /nowhere"),
        ("runs: {a: {}}\nrows: [fussed]", [], "rows: 'fussed' is no model of any run; there are zero_shot,"),
        ("seeds: {fusion.seed: [1]}", ["--set", "fusion.seed=2"], "--set fusion.seed: fusion.seed is set by the seeds"),
        (RUNS, ["--set", "fusion.sed=2"], "--set: unknown key fusion.sed"),
        (
            RUNS,
            ["--config", "tiny"],
            "no preset of that name (clip, demo, dinov2, dinov3, dva, grappa, siglip2, small, small_dva)",
        ),
        (RUNS, ["--images", "/nowhere"], "/nowhere"),
        ("runs: {a: {evaluation.extra_rows: [supervised]}}", [], "a: evaluation.extra_rows asks for `supervised`, but"),
        (RUNS, ["--from", "/nowhere"], "There is no run folder /nowhere"),
        ("runs: {a: {images.sources: []}}", [], "no images given"),
    ],
)
def test_nothing_runs_and_nothing_is_written_when_anything_is_wrong(
    desk: Desk, text: str, arguments: list[str], sentence: str
) -> None:
    desk.write(text)
    assert sentence in desk.refused(*arguments)


def test_folders_that_are_something_else_are_refused(desk: Desk) -> None:
    run = desk.folder / "run"
    initialize(run, Request([str(desk.images)]), say=lambda line: None)
    assert "is a run folder; give another folder by --out" in desk.refused("--out", run)
    assert "is a file; give a folder by --out" in desk.refused("--out", desk.folder / "sweep.yaml")
    (desk.folder / "mine" / "wide").mkdir(parents=True)
    (desk.folder / "mine" / "wide" / "thesis.tex").write_text("precious")
    assert "wide holds other files" in desk.refused("--out", desk.folder / "mine")


def test_the_command_changes_the_base_and_a_run_its_own(desk: Desk) -> None:
    desk.sweep("--set", "fusion.attention_loss=none", "--set", "fusion.barlow_weight=1", "--config", "small")
    configs = {name: read_config(RunFolder.open(desk.out / name)) for name in ("base", "swapped")}
    assert [configs[name].fusion.attention_loss for name in configs] == ["none", "swapped"]
    assert {config.adaptors.temperature for config in configs.values()} == {0.1}


def test_names_of_one_stage_are_written_together() -> None:
    assert braced(["images", "clusters/k00004", "clusters/k00008", "fusion/views"]) == (
        "images, clusters/{k00004,k00008}, fusion/views"
    )


KILLER = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import tests.conftest
from io import StringIO
from pathlib import Path
from grappa.pipeline.store.checkpoints import FileCheckpoint
from grappa.pipeline.engine.progress import Progress
from grappa.pipeline.sweep.command import run_sweep
from grappa.pipeline.sweep.runs import SweepRequest

real, left = FileCheckpoint.save, 3
def save(self, *arguments):
    global left
    real(self, *arguments)
    left -= "/cls/fusion/" in str(self.path)
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
FileCheckpoint.save = save
run_sweep(SweepRequest(sys.argv[1], Path(sys.argv[2])), progress=Progress(StringIO()), say=print)
"""


def test_kill_9_in_the_second_run_and_the_same_command_ends_bit_identical(tmp_path: Path) -> None:
    """With the real stages: the shared ones run once, and a killed sweep ends as an undisturbed one does."""
    images, file = draw_images(tmp_path / "images", num_classes=2, num_images=4), tmp_path / "sweep.yaml"
    table = write_table(images, tmp_path / "table.csv", label=lambda path: path.parent.name)
    values = settings(write_weights(tmp_path / "weights.safetensors"), compute__checkpoint_seconds=0.000001)
    lines = [f"    {value.replace('=', ': ', 1)}" for value in values]
    runs = "runs: {base: {}, cls: {fusion.attention_level: cls}, narrow: {adaptors.bottleneck_dim: 2}}"
    file.write_text("\n".join([f"base:\n  images: ['{table}']\n  set:", *lines, runs]))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_sweep(SweepRequest(str(file), whole), progress=Progress(StringIO()), say=lambda line: None)
    script = KILLER.format(tests=str(Path(__file__).parents[3]))
    command = [sys.executable, "-c", script, str(file), str(killed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (left,) = killed.rglob("checkpoint.safetensors")
    assert left.parent in RunFolder.open(killed / "cls").artifact("fusion/neighbors").unfinished()
    said: list[str] = []
    run_sweep(SweepRequest(str(file), killed), progress=Progress(StringIO()), say=said.append)
    assert not [line for line in said if line.startswith(("features:", "clusters/"))]
    for name in ("base", "cls", "narrow"):
        assert digests(RunFolder.open(killed / name)) == digests(RunFolder.open(whole / name))
    records = [json.loads(line) for line in (killed / "cls/fusion/neighbors/log.jsonl").read_text().splitlines()]
    assert [record["resumed"] for record in records if "result" in record] == [True]
    partly = tables.load_sweep(killed).groupby("run")["seconds_partly"].first()
    assert partly.to_dict() == {"base": False, "cls": True, "narrow": False}
    ours = tables.load_sweep(killed).drop(columns=[name for name in tables.load_sweep(killed) if "seconds" in name])
    pd.testing.assert_frame_equal(ours, tables.load_sweep(whole)[list(ours.columns)])
    assert os.path.samefile(killed / "base/features/features.npy", killed / "narrow/features/features.npy")
