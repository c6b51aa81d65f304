"""How neighbours are found: settled by `init`, part of the stage's fingerprint, and its recall measured and told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grappa.pipeline.commands.init import Request, initialize
from grappa.pipeline.config.schema import Config
from grappa.pipeline.config.yaml_file import ConfigError, load_config
from grappa.pipeline.engine.status import read_config, states
from grappa.pipeline.stages import neighbors
from grappa.pipeline.store.artifacts import RunFolder
from tests.helpers.tiny import draw_images, make_run, run_all, write_weights
from tests.helpers.together import start


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run up to its neighbours, whose configuration knows nothing of engines, as older ones."""
    folder = tmp_path_factory.mktemp("engines")
    weights = write_weights(folder / "weights.safetensors")
    run = make_run(folder / "run", [draw_images(folder / "images")], weights)
    lines = run.config_path.read_text().splitlines(keepends=True)
    run.config_path.write_text("".join(line for line in lines if not line.startswith("  engine:")))
    run_all(run, until="neighbors")
    return run


@pytest.fixture
def run(exact: RunFolder, tmp_path: Path) -> RunFolder:
    shutil.copytree(exact.root, tmp_path / "run", symlinks=True)
    return RunFolder.open(tmp_path / "run")


def _set(run: RunFolder, engine: str) -> None:
    initialize(run.root, Request([], None, [f"neighbors.engine={engine}"], None), say=lambda line: None)


def _stale(run: RunFolder) -> set[str]:
    return {str(each.node) for each in states(run, read_config(run)) if each.state.kind not in ("fresh", "missing")}


def _found(run: RunFolder) -> tuple[dict[str, Any], list[dict[str, Any]], list[np.ndarray[Any, Any]]]:
    """Return the resolved values of the manifest, the log, and the arrays."""
    artifact = run.artifact("neighbors")
    manifest = artifact.manifest()
    assert manifest is not None
    log = [json.loads(line) for line in (artifact.home / "log.jsonl").read_text().splitlines()]
    arrays = [np.load(artifact.home / f"{name}.npy") for name in ("neighbors", "similarities")]
    return manifest.provenance["resolved"], log, arrays


def test_older_runs_are_exact_and_stay_fresh(run: RunFolder) -> None:
    assert load_config(run.config_path).neighbors.engine == "exact" and not _stale(run)
    _set(run, "auto")
    assert load_config(run.config_path).neighbors.engine == "exact" and not _stale(run)
    assert not [name for name in _found(run)[0] if name.startswith("recall")]


@pytest.mark.parametrize("engine", ["ivf", "hnsw"])
def test_an_engine_states_its_recall(engine: str, run: RunFolder, capfd: pytest.CaptureFixture[str]) -> None:
    """Of so few images all are found: the arrays are those of exact search."""
    before = _found(run)[2]
    _set(run, engine)
    assert _stale(run) == {"neighbors"}
    lines = run_all(run, until="neighbors")
    resolved, log, arrays = _found(run)
    assert resolved["recall_at_4"] == 1.0 and {"resolved": {"recall_at_4": 1.0}} in [_untimed(each) for each in log]
    assert any(f"{engine} (recall@4 1.000)" in line for line in lines)
    assert "warning" not in capfd.readouterr().err
    for one, other in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(one, other)
    _set(run, "exact")
    assert _stale(run) == {"neighbors"}


def _untimed(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name == "resolved"}


def test_a_low_recall_is_told(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    search = neighbors.approximate_neighbors

    def forgetful(*arguments: Any, **options: Any) -> Any:
        found, similarities = search(*arguments, **options)
        similarities[:, :2] = -1.0  # two of four are lost
        return found, similarities

    monkeypatch.setattr(neighbors, "approximate_neighbors", forgetful)
    _set(run, "ivf")
    run_all(run, until="neighbors")
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning")]
    assert len(said) == 1
    assert "neighbors: ivf finds 50.0% of the nearest images (below 95%, measured on 60 images)" in said[0]
    assert "--set neighbors.engine=exact" in said[0] and _found(run)[0]["recall_at_4"] == 0.5


@pytest.mark.parametrize("engine", ["ivf", "hnsw"])
def test_several_processes_find_the_same(engine: str, run: RunFolder, tmp_path: Path) -> None:
    _set(run, engine)
    shutil.copytree(run.root, tmp_path / "together", symlinks=True)
    run_all(run, until="neighbors")
    ended = start(3, "-m", "grappa", "run", str(tmp_path / "together"), "--stage", "neighbors")
    assert [each.code for each in ended] == [0] * 3, ended
    alone, together = _found(run), _found(RunFolder.open(tmp_path / "together"))
    assert together[0]["recall_at_4"] == alone[0]["recall_at_4"]
    for one, other in zip(alone[2], together[2], strict=True):
        np.testing.assert_array_equal(one, other)


def test_automatic_is_exact_up_to_a_million(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grappa.pipeline.commands.init.MOST_EXACT", 59)
    _set(run, "auto")
    assert load_config(run.config_path).neighbors.engine == "ivf"
    monkeypatch.setattr("grappa.pipeline.commands.init.MOST_EXACT", 60)
    _set(run, "auto")
    assert load_config(run.config_path).neighbors.engine == "exact"


def test_a_wrong_engine_is_one_sentence(run: RunFolder) -> None:
    with pytest.raises(ConfigError, match="neighbors.engine: found 'cuvs', expected 'auto', 'exact', 'ivf' or 'hnsw'"):
        _set(run, "cuvs")
    with pytest.raises(ValueError, match="neighbors.engine is still `auto`; `grappa init RUN` resolves it"):
        assert Config().neighbors.settled_engine
