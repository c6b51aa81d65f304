"""Faults on a real Slurm cluster: whatever happens to a job, the artifacts equal those of an undisturbed run."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from grappa.pipeline import tables
from grappa.pipeline.engine.status import read_config, states
from grappa.pipeline.graph.stages import STAGES, nodes
from grappa.pipeline.store.artifacts import RunFolder
from grappa.slurm import scheduler
from grappa.slurm.notes import JobNote, job_notes
from tests.cluster.cluster import Cluster
from tests.cluster.scene import ROOT, SECONDS, SETS, Desk, Scene, grappa, make_desk, staged, wait_until
from tests.helpers.tiny import digests
from tests.helpers.together import start

pytestmark = pytest.mark.slurm

NOBODY = 65534


@pytest.fixture(scope="module")
def desk(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Desk:
    return make_desk(cluster, tmp_path_factory.mktemp("slurm"))


@pytest.fixture
def scene(desk: Desk, tmp_path: Path) -> Iterator[Scene]:
    yield from staged(desk, tmp_path / "run", tmp_path)


def test_a_job_preempted_in_the_middle_goes_on_where_it_was(scene: Scene) -> None:
    scene.submit("--until", "adaptors")
    for name in SETS:
        scene.wait_for_step(name)
    scene.preempt()
    for name in SETS:
        scene.wait_for_restart(scene.job_of(name))
    assert "requeued" in scene.status()[SETS[0]] or "running" in scene.status()[SETS[0]]
    scene.open_gate()
    scene.wait_until_idle()
    scene.assert_undisturbed(*SETS)
    jobs = tables.load_jobs(scene.run.root).set_index("artifact")
    assert list(jobs.loc[list(SETS), "restarts"]) == [1, 1]
    for name in SETS:
        assert scene.resumed_from(name) == 5


def test_the_tasks_of_a_job_compute_together_and_are_preempted_together(desk: Desk, tmp_path: Path) -> None:
    together = RunFolder(Path(shutil.copytree(desk.base.root, tmp_path / "together")))
    ended = start(2, "-m", "grappa", "run", str(together.root), "--until", "adaptors")
    assert [each.code for each in ended] == [0, 0], ended
    names = [stage.name for stage in STAGES]
    before = json.dumps([names[names.index("images") : names.index("adaptors")]])
    several = "{images: {tasks: 2}, adaptors: {nodes: 2}}"
    for scene in staged(desk, tmp_path / "run", tmp_path, shared=before, stages=several):
        for name in ("images", "features"):
            shutil.rmtree(scene.run.root / name)
        scene.submit("--until", "adaptors")
        for name in SETS:
            scene.wait_for_step(name)
        scene.assert_undisturbed("images", "features", "neighbors", "clusters")
        scene.preempt()
        for name in SETS:
            scene.wait_for_restart(scene.job_of(name))
        scene.open_gate()
        scene.wait_until_idle()
        found, wanted = digests(scene.run), digests(together)
        assert {name: found.get(name) for name in wanted} == wanted, scene.explain()
        for name, number in (("images", 2), ("features", 2), ("clusters/k00004", 1), *((each, 2) for each in SETS)):
            assert _processes(scene.run, name) == number
        for name in SETS:
            assert [each["event"] for each in scene.events(scene.job_of(name))].count("stop") == 1
            assert scene.resumed_from(name) == 5


def _processes(run: RunFolder, name: str) -> int:
    manifest = run.artifact(name).manifest()
    assert manifest is not None
    return int(manifest.provenance["processes"])


def test_a_killed_task_ends_the_others_and_the_next_submit_resumes(desk: Desk, tmp_path: Path) -> None:
    for scene in staged(desk, tmp_path / "run", tmp_path, stages="{adaptors: {tasks: 2}}"):
        scene.submit("--stage", "adaptors", "--instance", "k00004")
        scene.wait_for_step(SETS[0])
        os.kill(scene.pid_of_task(SETS[0], 1), signal.SIGKILL)
        scene.open_gate()
        scene.wait_for_failure(SETS[0])
        assert "rank 1 of 2: no sign of life" in scene.status()[SETS[0]]
        scene.wait_until_idle()
        scene.submit("--stage", "adaptors", "--instance", "k00004")
        scene.wait_until_idle()
        assert scene.status()[SETS[0]] == "fresh"


def test_a_job_is_put_back_a_bounded_number_of_times(desk: Desk, tmp_path: Path) -> None:
    for scene in staged(desk, tmp_path / "run", tmp_path, max_requeues="0"):
        scene.submit("--stage", "adaptors", "--instance", "k00004")
        scene.wait_for_step(SETS[0])
        scene.preempt()
        scene.wait_for_restart(scene.job_of(SETS[0]))
        scene.wait_until_idle()
        assert "put back into the queue 1 times, the profile allows 0" in scene.status()[SETS[0]]
        scene.open_gate()
        scene.submit("--stage", "adaptors", "--instance", "k00004")
        scene.wait_until_idle()
        scene.assert_undisturbed(SETS[0])


def test_the_request_to_be_put_back_outlives_the_signal_that_answers_it(desk: Desk, tmp_path: Path) -> None:
    slow = tmp_path / "bin" / "scontrol"
    slow.parent.mkdir()
    slow.write_text(f'#!/bin/sh\n{shutil.which("scontrol")} "$@" || exit\nsleep 2\n')
    slow.chmod(0o755)
    for scene in staged(desk, tmp_path / "run", tmp_path):
        scene.profile.write_text(scene.profile.read_text().replace("export ", f"export PATH={slow.parent}:$PATH "))
        scene.submit("--stage", "adaptors", "--instance", "k00004")
        scene.wait_for_step(SETS[0])
        scene.preempt()
        scene.wait_for_restart(scene.job_of(SETS[0]))
        scene.open_gate()
        scene.wait_until_idle()
        scene.assert_undisturbed(SETS[0])


def test_two_time_limits_lose_nothing(desk: Desk, tmp_path: Path) -> None:
    for scene in staged(desk, tmp_path / "run", tmp_path, stages="{adaptors: {time: 1m}}", signal_seconds="10"):
        scene.submit("--until", "adaptors")
        job = scene.job_of(SETS[0])
        scene.wait_for_restart(job, 2)
        scene.open_gate()
        scene.wait_until_idle()
        scene.assert_undisturbed(*SETS)
        assert [each["event"] for each in scene.events(job)].count("stop") == 2


def test_a_cancelled_task_leaves_the_others_and_is_submitted_alone(scene: Scene) -> None:
    scene.submit("--until", "fusion")
    for name in SETS:
        scene.wait_for_step(name)
    assert "cancelled job" in grappa("cancel", scene.run.root, "adaptors", "k00004")
    wait_until(lambda: "cancelled" in scene.status()[SETS[0]], "the job is seen as cancelled", scene)
    scene.open_gate()
    scene.wait_until_idle()
    status = scene.status()
    assert status[SETS[1]] == "fresh"
    assert "blocked by adaptors/k00004" in status["fusion/neighbors"]
    said = scene.submit("--until", "fusion")
    assert "adaptors," not in said and "array" not in said
    scene.wait_until_idle()
    scene.assert_undisturbed()


def test_a_killed_worker_is_seen_and_the_next_submit_resumes(scene: Scene) -> None:
    scene.submit("--stage", "adaptors", "--instance", "k00004")
    scene.wait_for_step(SETS[0])
    os.kill(scene.pid_of(SETS[0]), signal.SIGKILL)
    scene.wait_for_failure(SETS[0])
    scene.wait_until_idle()
    wait_until(lambda: "FAILED" in scene.status()[SETS[0]], "accounting knows the end", scene)
    outcome = tables.load_jobs(scene.run.root).set_index("artifact").loc[SETS[0], "outcome"]
    assert str(outcome).startswith("FAILED")
    scene.open_gate()
    scene.submit("--until", "adaptors")
    scene.wait_until_idle()
    scene.assert_undisturbed(*SETS)


def test_a_lost_node_daemon(scene: Scene) -> None:
    scene.submit("--stage", "adaptors", "--instance", "k00004")
    scene.wait_for_step(SETS[0])
    job = scene.job_of(SETS[0])
    node = next(each["node"] for each in scene.events(job) if each["event"] == "start")
    scene.cluster.end(node, signal.SIGKILL)
    try:  # the old process lives on; the new one, on the other node, waits for it
        scene.wait_for_restart(job)
        log = next(scene.run.root.glob(f"jobs/*/{job}_0_log.out"))
        wait_until(lambda: "waiting: adaptors/k00004 is being written by" in log.read_text(), "it waits", scene)
        scene.open_gate()
        wait_until(lambda: scene.status()[SETS[0]] == "fresh", "the set is made", scene)
    finally:
        scene.cluster.start_node(node)
        scene.cluster.wait_until(scene.cluster.all_nodes_idle, "the node is back")
    scene.wait_until_idle()
    scene.assert_undisturbed(SETS[0])


def test_a_restarted_controller(scene: Scene) -> None:
    scene.submit("--until", "adaptors")
    scene.wait_for_step(SETS[0])
    scene.cluster.end("slurmctld")
    try:
        said = grappa("status", scene.run.root)
        assert said.startswith("warning: squeue") and "begun (job" in said
    finally:
        scene.cluster.start_controller()
    scene.open_gate()
    scene.wait_until_idle()
    scene.assert_undisturbed(*SETS)


def test_a_controller_that_does_not_answer(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "call", functools.partial(scheduler.call, seconds=2))
    scene.submit("--stage", "adaptors", "--instance", "k00004")
    scene.wait_for_step(SETS[0])
    scene.cluster.pause("slurmctld")
    try:
        notes, warning = job_notes(scene.run, states(scene.run, read_config(scene.run)))
    finally:
        scene.cluster.pause("slurmctld", resume=True)
    assert warning.startswith("squeue did not answer within 2 s")
    assert notes == {SETS[0]: JobNote("begun", f"begun (job {scene.job_of(SETS[0])})")}


def test_a_failing_instance_leaves_the_others_and_blocks_what_needs_it(scene: Scene) -> None:
    (scene.gate / "fail-adaptors-k00004").touch()
    scene.submit("--until", "fusion")
    for name in SETS:
        scene.wait_for_step(name)
    scene.open_gate()
    scene.wait_for_failure(SETS[0])
    scene.wait_until_idle()
    status = scene.status()
    assert "failed: the test lets adaptors-k00004 fail" in status[SETS[0]] and "_log.out" in status[SETS[0]]
    assert status[SETS[1]] == "fresh"
    assert "blocked by adaptors/k00004" in status["fusion/neighbors"]
    assert "the test lets adaptors-k00004 fail" in grappa("logs", scene.run.root, "adaptors", "k00004")
    (scene.gate / "fail-adaptors-k00004").unlink()
    scene.submit("--until", "fusion")
    scene.wait_until_idle()
    scene.assert_undisturbed()
    made = tables.load_jobs(scene.run.root).query("state == 'made'")["artifact"]
    assert sorted(made) == [*sorted(SETS), "fusion/neighbors"]


def test_a_full_disk(desk: Desk, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here")
    try:
        for scene in staged(desk, disk / "run", tmp_path):
            scene.submit("--until", "adaptors")
            for name in SETS:
                scene.wait_for_step(name)
            (disk / "filler").write_bytes(b"0" * shutil.disk_usage(disk).free)
            scene.open_gate()
            scene.wait_until_idle()
            assert not any((scene.run.root / name / "manifest.json").exists() for name in SETS), scene.explain()
            (disk / "filler").unlink()
            assert "missing" in scene.status()[SETS[0]]
            scene.submit("--until", "adaptors")
            scene.wait_until_idle()
            scene.assert_undisturbed(*SETS)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_configuration_edited_while_jobs_wait(scene: Scene) -> None:
    scene.submit("--until", "fusion")
    scene.wait_for_step(SETS[0])
    grappa("init", scene.run.root, "--set", "fusion.learning_rate=0.5")
    refused = grappa("submit", scene.run.root, "--cluster", scene.profile, "--until", "fusion", fails=True)
    assert "fusion.learning_rate: 0.0003 -> 0.5" in refused and "grappa cancel" in refused
    scene.open_gate()
    scene.wait_for_failure("fusion/neighbors")
    scene.wait_until_idle()
    note = scene.status()["fusion/neighbors"]
    assert "no longer what was submitted: config fusion.learning_rate: 0.0003 -> 0.5" in note
    scene.assert_undisturbed(*SETS)
    grappa("init", scene.run.root, "--set", "fusion.learning_rate=0.0003")
    scene.submit("--until", "fusion")
    scene.wait_until_idle()
    scene.assert_undisturbed()


def test_two_submits_at_once(desk: Desk, tmp_path: Path) -> None:
    for scene in staged(desk, tmp_path / "run", tmp_path):
        command = [sys.executable, "-m", "grappa", "submit", scene.run.root, "--cluster", scene.profile]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
        both = [subprocess.Popen([*command, "--until", "adaptors"], **pipes) for _ in range(2)]
        said = [process.communicate(timeout=SECONDS) for process in both]
        assert [process.returncode for process in both] == [0, 0], said
        assert sorted("nothing to submit" in out for out, _ in said) == [False, True], said
        assert not tables.load_jobs(scene.run.root)["artifact"].duplicated().any()
        scene.open_gate()
        scene.wait_until_idle()
        scene.assert_undisturbed(*SETS)


def test_another_user_sees_that_all_is_on_its_way(desk: Desk) -> None:
    if reason := _why_nobody_else_submits():
        pytest.skip(reason)
    home = Path(tempfile.mkdtemp())  # where another user gets to, unlike to pytest's folders
    try:
        for scene in staged(desk, home / "run", home):
            scene.submit("--until", "adaptors")
            assert "nothing to submit: 2 artifacts are on their way" in _as_another_user(scene, home)
            scene.open_gate()
            scene.wait_until_idle()
            scene.assert_undisturbed(*SETS)
    finally:
        shutil.rmtree(home)


def _why_nobody_else_submits() -> str:
    """Return why no second user can load the code here, or nothing."""
    if os.getuid() != 0:
        return "only root can become another user"
    folders = [folder for place in (ROOT, Path(sys.prefix)) for folder in (place, *place.parents)]
    closed = [folder for folder in folders if not folder.stat().st_mode & 0o001]
    return f"other users cannot enter {closed[-1]}, where the code lies" if closed else ""


def _as_another_user(scene: Scene, home: Path) -> str:
    """Submit as ``nobody``, who may write into the run folder, in a child that has loaded everything already."""
    from grappa.pipeline.engine.execution import Selection
    from grappa.slurm.submit import submit

    out = home / "said"
    out.touch()
    jobs = scene.run.root / "jobs"
    for path in (home, *home.rglob("*")):
        if jobs not in path.parent.parents and path.parent != jobs:
            path.chmod(0o777)
        elif path.suffix != ".pkl":  # a submission's folder can be read: a job refuses what others could have written
            path.chmod(0o755 if path.is_dir() or path.suffix == ".sh" else 0o644)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            with out.open("w") as file, contextlib.redirect_stderr(file):
                say = functools.partial(print, file=file)
                submit(scene.run.root, Selection(until="adaptors"), str(scene.profile), say=say)
            status = 0
        finally:
            if status:
                out.write_text(traceback.format_exc())
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, out.read_text()
    return out.read_text()


def test_a_run_folder_with_an_odd_name(desk: Desk, tmp_path: Path) -> None:
    for scene in staged(desk, tmp_path / """it's a "run" $HOME & more""", tmp_path):
        scene.open_gate()
        scene.submit("--until", "adaptors")
        scene.wait_until_idle()
        scene.assert_undisturbed(*SETS)


def test_what_the_cluster_refuses_is_said_and_nothing_stays_behind(scene: Scene) -> None:
    text = scene.profile.read_text()
    scene.profile.write_text(text + "stages: {fusion: {partition: no_such_partition}}\n")
    refused = grappa("submit", scene.run.root, "--cluster", scene.profile, "--until", "fusion", fails=True)
    assert refused.count("\n") == 1
    assert "fusion was refused" in refused and "invalid partition specified: no_such_partition" in refused
    scene.wait_until_idle()
    assert not list(scene.run.root.glob("jobs/*/submission.json"))
    assert not any("job" in state for state in scene.status().values())


def test_status_without_accounting_from_elsewhere_and_with_ids_used_again(scene: Scene, tmp_path: Path) -> None:
    conf = tmp_path / "slurm.conf"
    lines = scene.cluster.conf.read_text().splitlines()
    plain = [line for line in lines if not line.startswith("AccountingStorage")]
    conf.write_text("\n".join([*plain, "AccountingStorageType=accounting_storage/none", ""]))
    scene.submit("--stage", "adaptors", "--instance", "k00004")
    scene.wait_for_step(SETS[0])
    elsewhere = {"cwd": scene.run.root.parent, "env": {**os.environ, "SLURM_CONF": str(conf), "PYTHONPATH": str(ROOT)}}
    assert "running on n" in grappa("status", scene.run.root.name, **elsewhere)
    os.kill(scene.pid_of(SETS[0]), signal.SIGKILL)
    scene.wait_until_idle()
    assert "ended without a word" in grappa("status", scene.run.root.name, **elsewhere)
    _forge_live_id(scene)
    assert "running" not in scene.status()[SETS[1]]
    assert "array" not in scene.submit("--stage", "adaptors", "--instance", "k00008", "--dry-run")


def _forge_live_id(scene: Scene) -> None:
    """Pretend that the other set was submitted once as the job whose id a foreign, running job has now."""
    foreign = scene.cluster.call("sbatch", "--parsable", "--output=/dev/null", "--wrap=sleep 300", check=True).strip()
    (file,) = scene.run.root.glob("jobs/*/submission.json")
    content = json.loads(file.read_text())
    job = json.loads(json.dumps(content["jobs"][0]).replace("k00004", "k00008"))
    content["jobs"].append({**job, "ids": [foreign], "name": "grappa-adaptors-elsewhere"})
    file.write_text(json.dumps(content))


def test_the_whole_pipeline_as_jobs(desk: Desk, tmp_path: Path) -> None:
    names = [stage.name for stage in STAGES]
    before, after = names[: names.index("adaptors")], names[names.index("adaptors") + 1 :]
    present = {node.stage for node in nodes(read_config(desk.base))}
    for scene in staged(desk, tmp_path / "run", tmp_path, shared=json.dumps([before, after])):
        for name in names:
            shutil.rmtree(scene.run.root / name, ignore_errors=True)
        text = scene.submit("--dry-run")
        said = scene.submit()
        assert [line.partition(": ")[2].split(",")[0] for line in said.splitlines()[:3]] == [
            "+".join(name for name in before if name in present),
            "adaptors (array of 2)",
            "+".join(name for name in after if name in present),
        ]
        _compare_scripts(scene, text)
        scene.wait_for_step(SETS[0])
        left = sum(state != "fresh" for state in scene.status().values())
        assert f"nothing to submit: {left} artifacts are on their way" in scene.submit()
        scene.open_gate()
        assert "adaptors/k00004: 2 epochs" in grappa("logs", scene.run.root, "adaptors", "k00004", "--follow")
        scene.wait_until_idle()
        assert set(scene.status().values()) == {"fresh"}, scene.explain()
        scene.assert_undisturbed()
        assert "nothing to submit: all is fresh" in scene.submit()


def _compare_scripts(scene: Scene, text: str) -> None:
    """The scripts of the dry run are those that were given to sbatch, but for ids, which only Slurm gives."""
    (folder,) = scene.run.root.glob("jobs/2*")
    real = [path.read_text().replace(folder.name, "X") for path in sorted(folder.glob("*_submission.sh"))]
    lines = [line[6:] for line in text.splitlines() if line.startswith("    |")]
    name = next(line.split("/jobs/")[1].split("/")[0] for line in lines if "--output" in line)
    for dry, script in zip("\n".join(lines).replace(name, "X").split("#!/bin/bash")[1:], real, strict=True):
        assert _without_ids(dry, name) == _without_ids(script, folder.name)


def _without_ids(script: str, folder: str) -> list[str]:
    mark = folder.rpartition("-")[2]
    lines = [line.replace(mark, "MARK").rstrip() for line in script.splitlines() if "--dependency" not in line]
    return [line for line in lines if line and line != "#!/bin/bash"]
