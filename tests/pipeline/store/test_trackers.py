"""Trackers get the points of ``metrics.jsonl`` while a training runs, and never end it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from grappa.core.extras import is_installed
from grappa.pipeline.commands.init import Request, initialize
from grappa.pipeline.engine.packages import MissingPackageError
from grappa.pipeline.engine.status import read_config, states
from grappa.pipeline.store import checkpoints, trackers
from grappa.pipeline.store.artifacts import RunFolder
from grappa.pipeline.store.trackers import Tracked, tracked
from tests.helpers.tiny import draw_images, make_run, run_all, write_weights

TRAINING = {"step": 3, "epoch": 0.5, "loss": 0.25}


class Recorder:
    """A tracker that remembers what it gets."""

    made: list[Recorder] = []  # noqa: RUF012

    def __init__(self, training: Tracked, step: int) -> None:
        self.training, self.first, self.points, self.closed = training, step, dict[int, dict[str, float]](), False
        self.made.append(self)

    def log(self, step: int, values: trackers.Record) -> None:
        self.points[step] = dict(values)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> type[Recorder]:
    """Recorders in the place of two trackers, whose packages count as installed."""
    Recorder.made = []
    monkeypatch.setattr(trackers, "OPENED", {"tensorboard": Recorder, "mlflow": Recorder})
    monkeypatch.setattr("grappa.pipeline.engine.packages.is_installed", lambda package: True)
    return Recorder


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tracked")
    draw_images(folder / "images", num_classes=2)
    write_weights(folder / "weights.safetensors")
    return folder


def new_run(material: Path, folder: Path, trackers: str) -> RunFolder:
    return make_run(folder, [material / "images"], material / "weights.safetensors", compute__trackers=trackers)


def metrics(run: RunFolder, name: str) -> dict[int, dict[str, float]]:
    lines = (run.artifact(name).path / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return {record.pop("step"): record for record in records}


def test_all_trackers_get_the_same_curves_of_every_training(
    material: Path, tmp_path: Path, recorder: type[Recorder]
) -> None:
    run = new_run(material, tmp_path / "run", "[tensorboard, mlflow]")
    run_all(run, until="student")
    names = ["adaptors/k00004", "adaptors/k00008", "fusion/neighbors", "student"]
    assert [each.training.artifact for each in recorder.made] == [name for name in names for _ in range(2)]
    for each in recorder.made:
        assert each.points == metrics(run, each.training.artifact) and each.closed
        assert each.first == min(each.points) and each.training.settings
    assert len({each.training.name for each in recorder.made}) == 4


def test_trackers_make_nothing_stale_and_change_no_byte(
    material: Path, tmp_path: Path, recorder: type[Recorder]
) -> None:
    run = new_run(material, tmp_path / "run", "[]")
    run_all(run, until="adaptors")
    before = metrics(run, "adaptors/k00004")
    initialize(run.root, Request((), None, ["compute.trackers=[mlflow]"], None), say=lambda line: None)
    found = {each.name: each.state.kind for each in states(run, read_config(run))}
    assert found["adaptors/k00004"] == "fresh" and not recorder.made
    run_all(run, stage="adaptors", force=True)
    assert metrics(run, "adaptors/k00004") == before == recorder.made[0].points


def test_a_resumed_training_goes_on_under_its_name(
    material: Path, tmp_path: Path, recorder: type[Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new_run(material, tmp_path / "run", "[mlflow]")
    run_all(run, until="clusters")
    initialize(run.root, Request((), None, ["compute.checkpoint_seconds=0.000001"], None), say=lambda line: None)
    real = Recorder.log

    def stop(self: Recorder, step: int, values: trackers.Record) -> None:
        real(self, step, values)
        if step == 3 and len(recorder.made) == 1:
            checkpoints.request_stop()

    monkeypatch.setattr(Recorder, "log", stop)
    with pytest.raises(checkpoints.Stopped):
        run_all(run, stage="adaptors", instance="k00004")
    checkpoints.withdraw_stop()
    run_all(run, stage="adaptors", instance="k00004")
    first, second = recorder.made
    assert first.closed and first.training.name == second.training.name
    assert first.points | second.points == metrics(run, "adaptors/k00004")
    assert second.first == max(first.points) + 1


def test_a_tracker_that_fails_is_named_once_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Broken(Recorder):
        def log(self, step: int, values: trackers.Record) -> None:
            raise ConnectionError("no server\nat all")

    Recorder.made, said = [], list[str]()
    monkeypatch.setattr(trackers, "OPENED", {"tensorboard": Broken, "mlflow": Recorder})
    training = Tracked(tmp_path, "adaptors/k00004", {}, "abc")
    with tracked(["tensorboard", "mlflow"], training, said.append) as recorded:
        assert recorded is not None
        for step in (1, 2):
            recorded({**TRAINING, "step": step})
    assert said == ["warning: adaptors/k00004 goes on without tensorboard: no server at all"]
    assert Recorder.made[-1].points == {1: {"epoch": 0.5, "loss": 0.25}, 2: {"epoch": 0.5, "loss": 0.25}}


def test_a_missing_package_is_said_by_init_and_refused_before_any_stage_runs(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grappa.pipeline.engine.packages.is_installed", lambda package: package != "wandb")
    run, said = new_run(material, tmp_path / "run", "[wandb]"), list[str]()
    initialize(run.root, Request((), None, [], None), say=said.append)
    sentence = "the package wandb is missing; install it by `pip install 'grappa-retrieval[wandb]'`"
    assert [line for line in said if sentence in line] == [
        f"warning: compute.trackers names wandb: {sentence}, or take it out"
    ]
    with pytest.raises(MissingPackageError, match="compute.trackers names wandb: the package wandb is missing"):
        run_all(run)
    assert not (run.root / "backbone").exists()


def test_tensorboard_has_the_events_while_a_training_runs(tmp_path: Path) -> None:
    if not is_installed("tensorboard"):
        pytest.skip("tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    training = Tracked(tmp_path, "adaptors/k00004", {}, "abc")

    def shown() -> list[tuple[int, float]]:
        events = EventAccumulator(str(tmp_path / "trackers" / "tensorboard" / "adaptors-k00004-abc"))
        events.Reload()
        return [(each.step, each.value) for each in events.Scalars("loss")]

    with tracked(["tensorboard"], training, print) as recorded:
        assert recorded is not None
        recorded({"step": 1, "loss": 0.5})
        assert shown() == [(1, 0.5)]
        recorded({"step": 2, "loss": 0.25})
    with tracked(["tensorboard"], training, print) as recorded:
        assert recorded is not None
        recorded({"step": 2, "loss": 0.125})
    assert shown() == [(1, 0.5), (2, 0.125)]


def test_mlflow_has_one_run_for_a_training_that_was_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not (is_installed("mlflow") and is_installed("sqlalchemy")):
        pytest.skip("mlflow is not installed")
    from mlflow import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    training = Tracked(tmp_path / "mine", "adaptors/k00004", {"adaptors.seed": 0}, "abc")
    for step in (1, 2):
        with tracked(["mlflow"], training, print) as recorded:
            assert recorded is not None
            recorded({"step": step, "loss": 1 / step})
    client = MlflowClient(f"sqlite:///{tmp_path}/mine/trackers/mlflow/mlflow.db")
    experiment = client.get_experiment_by_name("mine")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.params == {"adaptors.seed": "0"} and run.info.run_name == "adaptors/k00004"
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(each.step, each.value) for each in history] == [(1, 1.0), (2, 0.5)]


def test_weights_and_biases_writes_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not is_installed("wandb"):
        pytest.skip("wandb is not installed")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    said = list[str]()
    with tracked(["wandb"], Tracked(tmp_path, "student", {}, "abc"), said.append) as recorded:
        assert recorded is not None
        recorded({"step": 1, "loss": 0.5})
    assert not said and list((tmp_path / "trackers" / "wandb").rglob("*.wandb"))
