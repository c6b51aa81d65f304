"""Running stages: what runs, in which order, what is refused, and what a crash leaves behind."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from grappa.pipeline.engine.context import StageContext
from grappa.pipeline.engine.execution import NotReadyError, Selection, planned
from grappa.pipeline.engine.externals import MissingInputError
from grappa.pipeline.store.artifacts import MANIFEST_FILE
from grappa.pipeline.store.locks import LockedError
from grappa.pipeline.store.storage import file_digest
from grappa.pipeline.store.work import open_work
from tests.helpers.fake_stages import FakeStages, fake_stages

EMBEDDINGS = [
    f"embeddings/{row}" for row in ("zero_shot", "zero_shot_whitened", "k00002", "k00004", "mean", "fused", "student")
]
HEADS = [f"heads/{row}" for row in ("zero_shot", "k00002", "k00004", "mean", "fused", "student")]
FREE = ("zero_shot", "zero_shot_whitened", "zero_shot_head")
RETRIEVAL = [f"retrieval/{row}" for row in (*FREE, "k00002", "k00004", "mean", "fused", "fused_raw", "student")]
ALL = [
    *(
        "backbone",
        "images",
        "features",
        "frozen_views",
        "whitening/features",
        "neighbors",
        "clusters/k00002",
        "clusters/k00004",
        "adaptors/k00002",
    ),
    *(
        "adaptors/k00004",
        "fusion/neighbors",
        "student",
        *EMBEDDINGS,
        *(name.replace("heads/", "views/") for name in HEADS[1:]),
        *HEADS,
        "verdict",
        "model",
        *RETRIEVAL,
        "evaluation",
        "index",
        "attention/neighbors",
    ),
]


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeStages:
    return fake_stages(tmp_path / "run", monkeypatch)


@pytest.fixture
def complete(fakes: FakeStages) -> FakeStages:
    fakes.execute()
    return fakes


def break_in(context: StageContext) -> None:
    (context.path / "half.bin").write_bytes(b"half")
    raise KeyboardInterrupt


def test_everything_runs_once_in_order_and_then_nothing(fakes: FakeStages) -> None:
    report = fakes.execute()
    assert fakes.ran == ALL
    assert [line.partition(":")[0] for line in fakes.said] == ALL
    assert list(report.seconds) == list(dict.fromkeys(name.partition("/")[0] for name in ALL))
    assert fakes.not_fresh() == {}
    report = fakes.execute()
    assert (fakes.ran, report.seconds, report.num_fresh) == ([], {}, len(ALL))


def test_provenance_says_how_a_result_came_to_be(fakes: FakeStages) -> None:
    def settle(context: StageContext) -> None:
        context.resolve("device", "cpu")
        context.resolve("precision", "float32")

    fakes.hooks["features"] = settle
    fakes.execute(until="features")
    manifest = fakes.run.artifact("features").manifest()
    backbone = fakes.run.artifact("backbone").manifest()
    assert manifest and backbone
    assert manifest.provenance["resolved"] == {"device": "cpu", "precision": "float32"}
    assert manifest.provenance["device"] == "cpu"
    assert manifest.provenance["seconds"] >= 0
    assert backbone.provenance["weights"]["sha256"] == backbone.fingerprint["inputs"]["weights"]["sha256"]
    log = (fakes.run.artifact("features").path / "log.jsonl").read_text().splitlines()
    assert json.loads(log[-1])["result"] == "1 files"


def test_an_edited_setting_runs_its_stage_and_all_that_hangs_on_it(complete: FakeStages) -> None:
    complete.configure(fusion={"seed": 1})
    complete.execute()
    made, seen, last = (
        [f"{stage}/{row}" for row in ("fused", "student")] for stage in ("embeddings", "views", "heads")
    )
    end = ["model", *RETRIEVAL[-3:], "evaluation", "index", "attention/neighbors"]
    assert complete.ran == ["fusion/neighbors", "student", *made, *seen, *last, "verdict", *end]


def test_upstream_run_again_with_the_same_bytes_leaves_downstream_fresh(complete: FakeStages) -> None:
    complete.same_bytes = {"adaptors/k00002"}
    complete.configure(adaptors={"seed": 1})
    complete.execute()
    complete.configure(adaptors={"seed": 2})
    complete.execute()
    assert complete.ran[:2] == ["adaptors/k00002", "adaptors/k00004"]
    assert "embeddings/k00002" not in complete.ran
    assert "embeddings/k00004" in complete.ran


def test_another_granularity_leaves_the_others_fresh(complete: FakeStages) -> None:
    complete.configure(clusters={"num_clusters": [2, 4, 8]})
    complete.execute()
    assert "clusters/k00008" in complete.ran and "adaptors/k00008" in complete.ran
    assert not {"clusters/k00002", "adaptors/k00004", "embeddings/k00004"} & set(complete.ran)
    assert {"fusion/neighbors", "embeddings/mean", "embeddings/fused"} <= set(complete.ran)


def test_one_stage_runs_exactly_its_stale_instances(complete: FakeStages) -> None:
    complete.configure(clusters={"seed": 1})
    complete.execute(stage="clusters", instance="k00004")
    assert complete.ran == ["clusters/k00004"]
    complete.execute(stage="clusters")
    assert complete.ran == ["clusters/k00002"]
    report = complete.execute(stage="clusters")
    assert (complete.ran, report.num_fresh) == ([], 2)
    complete.execute(stage="clusters", force=True)
    assert complete.ran == ["clusters/k00002", "clusters/k00004"]


def test_a_stage_with_stale_inputs_is_refused_with_reason_and_command(complete: FakeStages) -> None:
    complete.configure(adaptors={"seed": 1})
    with pytest.raises(NotReadyError) as caught:
        complete.execute(stage="fusion")
    message = str(caught.value)
    assert "fusion/neighbors cannot run: upstream adaptors/k00002 is stale" in message
    assert "(config adaptors.seed: 0 -> 1)" in message
    assert f"run `grappa run {complete.root} --until adaptors` first" in message
    assert complete.ran == []


def test_until_stops_after_a_stage(fakes: FakeStages) -> None:
    fakes.execute(until="clusters")
    assert fakes.ran == ALL[: ALL.index("clusters/k00004") + 1]


def test_force_runs_what_is_fresh(complete: FakeStages) -> None:
    complete.execute(until="features", force=True)
    assert complete.ran == ["backbone", "images", "features"]
    assert complete.not_fresh() == {}


def test_a_plan_changes_nothing(complete: FakeStages) -> None:
    complete.configure(fusion={"seed": 1})
    before = sorted(str(path) for path in complete.root.rglob("*"))
    steps = {name: str(state) for name, state in planned(complete.run, complete.config, Selection())}
    assert steps["fusion/neighbors"] == "stale: config fusion.seed: 0 -> 1"
    stale = ("verdict", "heads/fused", "heads/student")
    assert steps["index"] == f"stale: {'; '.join(f'upstream {name} is stale' for name in stale)}"
    assert len(steps) == 16
    assert sorted(str(path) for path in complete.root.rglob("*")) == before
    forced = planned(complete.run, complete.config, Selection(stage="clusters", force=True))
    assert [name for name, _ in forced] == ["clusters/k00002", "clusters/k00004"]


def test_interrupted_work_is_resumed_and_the_former_result_stays(complete: FakeStages) -> None:
    def resume(context: StageContext) -> None:
        assert context.resumed
        assert (context.path / "half.bin").read_bytes() == b"half"
        (context.path / "half.bin").unlink()

    complete.configure(fusion={"seed": 1})
    before = (complete.root / "fusion/neighbors" / MANIFEST_FILE).read_bytes()
    complete.hooks["fusion/neighbors"] = break_in
    with pytest.raises(KeyboardInterrupt):
        complete.execute()
    assert (complete.root / "fusion/neighbors" / MANIFEST_FILE).read_bytes() == before
    complete.hooks["fusion/neighbors"] = resume
    complete.execute()
    assert complete.ran[0] == "fusion/neighbors"
    assert not (complete.root / "fusion/neighbors.partial").exists()
    assert complete.not_fresh() == {}


def test_half_work_of_another_fingerprint_is_thrown_away(complete: FakeStages) -> None:
    complete.configure(fusion={"seed": 1})
    complete.hooks["fusion/neighbors"] = break_in
    with pytest.raises(KeyboardInterrupt):
        complete.execute()
    complete.configure(fusion={"seed": 2})
    complete.hooks["fusion/neighbors"] = lambda context: check_empty(context)
    complete.execute()
    assert complete.not_fresh() == {}


def check_empty(context: StageContext) -> None:
    assert not context.resumed
    assert not (context.path / "half.bin").exists()


def test_resumed_work_keeps_the_precision_that_it_began_with(fakes: FakeStages) -> None:
    def begin(context: StageContext) -> None:
        assert context.resolve("precision", "bfloat16") == "bfloat16"
        raise KeyboardInterrupt

    def resume(context: StageContext) -> None:
        assert context.resolve("precision", "float32") == "bfloat16"
        assert context.resolve("device", "cpu") == "cpu"

    fakes.hooks["features"] = begin
    with pytest.raises(KeyboardInterrupt):
        fakes.execute(until="features")
    fakes.hooks["features"] = resume
    fakes.execute(until="features")
    manifest = fakes.run.artifact("features").manifest()
    assert manifest and manifest.provenance["resolved"] == {"precision": "bfloat16", "device": "cpu"}


def test_a_crash_between_the_renames_of_a_publish_is_mended(complete: FakeStages) -> None:
    features = complete.run.artifact("features")
    features.path.rename(features.old)
    complete.execute()
    assert complete.ran == []
    assert features.path.is_dir() and not features.old.exists()


def test_a_crash_just_before_the_rename_is_completed_without_running_again(complete: FakeStages) -> None:
    features = complete.run.artifact("features")
    features.path.rename(features.partial)
    complete.execute()
    assert complete.ran == []
    assert complete.not_fresh() == {}


def test_a_second_writer_of_the_same_artifact_is_refused(fakes: FakeStages) -> None:
    with open_work(fakes.run.artifact("backbone"), {"stage": "backbone"}), pytest.raises(LockedError, match="process"):
        fakes.execute()


def test_a_stage_may_read_what_it_declares_only(fakes: FakeStages) -> None:
    fakes.hooks["neighbors"] = lambda context: print(context.input("backbone"))
    with pytest.raises(AssertionError, match="neighbors reads backbone"):
        fakes.execute()
    fakes.hooks["neighbors"] = lambda context: print(context.sources())
    with pytest.raises(AssertionError, match="does not declare `sources`"):
        fakes.execute()


def test_progress_and_speed_are_logged_with_the_artifact(fakes: FakeStages) -> None:
    def work(context: StageContext) -> None:
        with context.task("counting", 10, done=4) as advance:
            advance(6)
        assert context.num_threads == 3 and context.num_workers >= 1

    fakes.configure(compute={"num_threads": 3})
    fakes.hooks["features"] = work
    fakes.execute(until="features")
    records = [json.loads(line) for line in (fakes.root / "features/log.jsonl").read_text().splitlines()]
    record = next(record for record in records if record.get("task") == "counting")
    assert (record["total"], record["new"], record["unit"]) == (10, 6, "images")
    manifest = fakes.run.artifact("features").manifest()
    assert manifest and "log.jsonl" not in manifest.outputs


def test_weights_that_are_gone_stop_the_stage_that_reads_them(fakes: FakeStages, tmp_path: Path) -> None:
    (tmp_path / "weights.safetensors").unlink()
    with pytest.raises(MissingInputError, match=r"backbone\.weights: no such file .*weights\.safetensors"):
        fakes.execute()


def test_an_edited_list_of_sources_asks_for_init(complete: FakeStages) -> None:
    complete.configure(images={"sources": ["/elsewhere"]})
    with pytest.raises(NotReadyError, match="images cannot run: images.sources was edited .*run `grappa init"):
        complete.execute()


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ({"stage": "cluster"}, "no stage is called 'cluster'; the stages are backbone, images"),
        ({"until": "x"}, "no stage is called 'x'"),
        ({"stage": "clusters", "instance": "k2"}, "clusters has no instance 'k2'; it has: k00002, k00004"),
        ({"stage": "model", "instance": "k00002"}, "model has no instance 'k00002'; it has: none"),
        ({"instance": "k00002"}, "--instance needs --stage"),
        ({"stage": "model", "until": "model"}, "--stage and --until exclude each other"),
    ],
)
def test_names_that_do_not_exist_are_refused(fakes: FakeStages, selection: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        fakes.execute(**selection)


def test_two_runs_of_the_same_fingerprints_have_the_same_bytes(
    complete: FakeStages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other").mkdir()
    other = fake_stages(tmp_path / "other" / "run", monkeypatch)
    other.execute()
    for name in ("fusion/neighbors/fusion.safetensors", "embeddings/fused/embeddings.npy"):
        assert file_digest(complete.root / name) == file_digest(other.root / name)
