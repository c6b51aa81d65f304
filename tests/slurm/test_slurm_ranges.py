"""Ranges of rows on a real Slurm cluster: preempted, killed, cancelled; the bytes are those of one pass."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from grappa.pipeline import tables
from grappa.pipeline.store.artifacts import RunFolder
from tests.cluster.cluster import Cluster
from tests.cluster.scene import Desk, Scene, grappa, staged, wait_until
from tests.helpers.tiny import digests, draw_images, make_run, run_all, write_weights

pytestmark = pytest.mark.slurm

RANGES = tuple(f"features.ranges/{number}-of-3" for number in (1, 2, 3))


@pytest.fixture(scope="module")
def desk(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Desk:
    home = tmp_path_factory.mktemp("slurm")
    images, weights = draw_images(home / "images"), write_weights(home / "weights.safetensors")
    base = make_run(home / "base", [images], weights, compute__inference_batch_size=4)
    run_all(base, until="images")
    whole = RunFolder(Path(shutil.copytree(base.root, home / "whole")))
    run_all(whole, until="features")
    return Desk(cluster, base, digests(whole))


@pytest.fixture
def scene(desk: Desk, tmp_path: Path) -> Iterator[Scene]:
    yield from staged(desk, tmp_path / "run", tmp_path, stages="{features: {ranges: 3}}")


def test_preempted_and_killed_ranges_cost_time_only(scene: Scene) -> None:
    said = scene.submit("--until", "features").splitlines()
    assert "features ranges (array of 3)" in said[0] and said[1].endswith(f", after {said[0].split()[1][:-1]}")
    for name in RANGES:
        scene.wait_for_step(name)
    assert scene.status()["features"].startswith("missing 0 of 3 ranges made, 3 running")
    assert "; joining pending: Dependency (job " in scene.status()["features"]
    assert scene.submit("--until", "features").startswith("nothing to submit: 4 artifacts are on their way")
    scene.preempt()
    for name in RANGES:
        scene.wait_for_restart(scene.job_of(name))
        scene.wait_for_step(name, 1)
    os.kill(scene.pid_of(RANGES[1]), signal.SIGKILL)
    wait_until(lambda: "1 failed" in scene.status()["features"], "the killed range is seen", scene)
    scene.open_gate()
    scene.wait_until_idle()
    scene.assert_undisturbed()
    assert not (scene.run.root / "features.ranges").exists()
    log = grappa("logs", scene.run.root, "features")
    assert "features: 2 of 3 ranges are taken over, the others are computed now" in log
    assert "60 features of 32 dimensions, joined from 3 ranges" in log
    jobs = tables.load_jobs(scene.run.root).set_index("artifact")
    assert list(jobs.loc[list(RANGES), "restarts"]) == [1, 1, 1]
    assert list(jobs.loc[[RANGES[0], RANGES[2], "features"], "state"]) == ["made"] * 3
    assert [each["event"] for each in scene.events(scene.job_of(RANGES[0]))].count("stop") == 1


def test_failed_and_cancelled_ranges_are_submitted_again(scene: Scene) -> None:
    (scene.gate / "fail-features.ranges-2-of-3").touch()
    scene.submit("--until", "features")
    for name in RANGES:
        scene.wait_for_step(name)
    scene.cluster.call("scancel", scene.job_of("features"), check=True)
    wait_until(lambda: "1 failed: the test lets" in scene.status()["features"], "a range fails", scene)
    assert grappa("cancel", scene.run.root, "features").count("cancelled job ") == 2
    scene.open_gate()
    scene.wait_until_idle()
    said = scene.submit("--until", "features")
    assert "features ranges (array of 3)" in said
    scene.wait_until_idle()
    scene.assert_undisturbed()
