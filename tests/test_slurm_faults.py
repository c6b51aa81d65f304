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
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cluster.cluster import Cluster
from tiny import digests, draw_images, make_run, run_all, write_weights

from pipeline import tables
from pipeline.artifacts import RunFolder
from pipeline.stages import STAGES

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).parents[1]
HOOKS = Path(__file__).parent / "cluster" / "hooks"
SECONDS = 180
NOBODY = 65534
SETS = ("adaptors/k00004", "adaptors/k00008")


@dataclass(frozen=True)
class Desk:
    """A cluster, a run whose clusters are made, and what an undisturbed run makes of it."""

    cluster: Cluster
    base: RunFolder
    expected: dict[str, str]


@dataclass(frozen=True)
class Scene:
    """A copy of the run, a gate in the middle of its trainings, and a profile."""

    desk: Desk
    run: RunFolder
    gate: Path
    profile: Path

    @property
    def cluster(self) -> Cluster:
        return self.desk.cluster

    def open_gate(self) -> None:
        (self.gate / "open").touch()

    def submit(self, *arguments: str) -> str:
        return grappa("submit", self.run.root, "--cluster", self.profile, *arguments)

    def status(self) -> dict[str, str]:
        """Return what status says of each artifact and its job."""
        found = json.loads(grappa("status", self.run.root, "--json"))
        names = ("/".join(filter(None, (each["stage"], each["instance"]))) for each in found)
        return {name: f"{each['state']} {each['job']}".strip() for name, each in zip(names, found, strict=True)}

    def wait_for_step(self, name: str, restart: int = 0) -> None:
        """Wait until a training has come to the gate (after so many restarts)."""
        file = self.gate / f"reached-{name.replace('/', '-')}-{restart}"
        wait_until(file.exists, f"{name} reaches the gate", self)

    def wait_until_idle(self) -> None:
        """Wait until no job of this cluster waits or runs."""
        wait_until(lambda: not self.cluster.call("squeue", "--noheader").strip(), "the queue is empty", self)

    def wait_for_restart(self, job: str, count: int = 1) -> None:
        def restarted() -> bool:
            return any(each.get("restarts") == count for each in self.events(job))

        wait_until(restarted, f"job {job} starts again", self)

    def events(self, job: str) -> list[dict[str, Any]]:
        files = list(self.run.root.glob(f"jobs/*/events/{job}.jsonl"))
        return [json.loads(line) for file in files for line in file.read_text().splitlines()]

    def job_of(self, name: str) -> str:
        """Return the id of the newest job of an artifact."""
        jobs = tables.load_jobs(self.run.root)
        return str(jobs[jobs["artifact"] == name]["job_id"].iloc[-1])

    def pid_of(self, name: str) -> int:
        starts = [each for each in self.events(self.job_of(name)) if each["event"] == "start"]
        return int(starts[-1]["pid"])

    def assert_undisturbed(self, *made: str) -> None:
        """Check that everything (or what is below some names) was made, with the bytes of the undisturbed run."""
        expected = {name: digest for name, digest in self.desk.expected.items() if not made or name.startswith(made)}
        found = digests(self.run)
        assert {name: found.get(name) for name in expected} == expected, self.explain()

    def explain(self) -> str:
        logs = "".join(path.read_text(errors="replace")[-3000:] for path in self.run.root.glob("jobs/*/*_log.out"))
        return f"{json.dumps(self.status(), indent=1)}\n{self.cluster.call('squeue', '--long')}\n{logs}"


def grappa(*arguments: str | Path, fails: bool = False, **options: Any) -> str:
    """Return what the command prints (with ``fails``: on stderr, of a command that must fail)."""
    command = [sys.executable, "-m", "pipeline", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, **{"cwd": ROOT, **options})
    assert (done.returncode != 0) == fails, f"{done.stdout}\n{done.stderr}"
    return done.stderr if fails else done.stdout


def wait_until(condition: Callable[[], bool], what: str, scene: Scene) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, f"waited in vain until {what}\n{scene.explain()}"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def desk(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Desk:
    home = tmp_path_factory.mktemp("slurm")
    images, weights = draw_images(home / "images"), write_weights(home / "weights.safetensors")
    base = make_run(home / "base", [images], weights)
    run_all(base, until="clusters")
    whole = home / "whole"
    shutil.copytree(base.root, whole)
    run_all(RunFolder(whole), until="fusion")
    return Desk(cluster, base, digests(RunFolder(whole)))


@pytest.fixture
def scene(desk: Desk, tmp_path: Path) -> Iterator[Scene]:
    yield from _scene(desk, tmp_path / "run", tmp_path)


def _scene(desk: Desk, run: Path, home: Path, **profile: str) -> Iterator[Scene]:
    gate = home / "gate"
    gate.mkdir()
    shutil.copytree(desk.base.root, run)
    file = home / "profile.yaml"
    settings = {
        "time": "20m",
        "memory": "1G",
        "setup": json.dumps([f"export PYTHONPATH={HOOKS}:{ROOT} GRAPPA_TEST_GATE={gate}"]),
        **profile,
    }
    file.write_text("".join(f"{key}: {value}\n" for key, value in settings.items()))
    scene = Scene(desk, RunFolder(run), gate, file)
    yield scene
    subprocess.run(["scancel", "--user=root"], check=False, timeout=60)
    scene.wait_until_idle()


def test_a_job_preempted_in_the_middle_goes_on_where_it_was(scene: Scene) -> None:
    scene.submit("--until", "adaptors")
    for name in SETS:
        scene.wait_for_step(name)
    urgent = ("sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")
    scene.cluster.call(*urgent, check=True)
    for name in SETS:
        scene.wait_for_restart(scene.job_of(name))
    assert "requeued" in scene.status()[SETS[0]] or "running" in scene.status()[SETS[0]]
    scene.open_gate()
    scene.wait_until_idle()
    scene.assert_undisturbed(*SETS)
    jobs = tables.load_jobs(scene.run.root).set_index("artifact")
    assert list(jobs.loc[list(SETS), "restarts"]) == [1, 1]
    for name in SETS:
        assert _resumed_from(scene, name) == 5


def _resumed_from(scene: Scene, name: str) -> int:
    """Return the steps that a training did not do again: those that its last process did not train."""
    records = [json.loads(line) for line in (scene.run.root / name / "log.jsonl").read_text().splitlines()]
    task = next(record for record in records if record.get("task") == "training")
    return int((task["total"] - task["new"]) / 4)


def test_two_time_limits_lose_nothing(desk: Desk, tmp_path: Path) -> None:
    for scene in _scene(desk, tmp_path / "run", tmp_path, stages="{adaptors: {time: 1m}}", signal_seconds="10"):
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
    wait_until(lambda: "failed" in scene.status()[SETS[0]], "the job is seen as failed", scene)
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


def test_a_failing_instance_leaves_the_others_and_blocks_what_needs_it(scene: Scene) -> None:
    (scene.gate / "fail-adaptors-k00004").touch()
    scene.submit("--until", "fusion")
    for name in SETS:
        scene.wait_for_step(name)
    scene.open_gate()
    wait_until(lambda: "failed" in scene.status()[SETS[0]], "the instance fails", scene)
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
        for scene in _scene(desk, disk / "run", tmp_path):
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
    assert "fusion.learning_rate: 0.001 -> 0.5" in refused and "grappa cancel" in refused
    scene.open_gate()
    wait_until(lambda: "failed" in scene.status()["fusion/neighbors"], "the job refuses", scene)
    scene.wait_until_idle()
    note = scene.status()["fusion/neighbors"]
    assert "no longer what was submitted: config fusion.learning_rate: 0.001 -> 0.5" in note
    scene.assert_undisturbed(*SETS)
    grappa("init", scene.run.root, "--set", "fusion.learning_rate=0.001")
    scene.submit("--until", "fusion")
    scene.wait_until_idle()
    scene.assert_undisturbed()


def test_two_submits_at_once(desk: Desk) -> None:
    home = Path(tempfile.mkdtemp())  # where another user gets to, unlike to pytest's folders
    try:
        for scene in _scene(desk, home / "run", home):
            command = [sys.executable, "-m", "pipeline", "submit", scene.run.root, "--cluster", scene.profile]
            pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
            both = [subprocess.Popen([*command, "--until", "adaptors"], **pipes) for _ in range(2)]
            said = [process.communicate(timeout=SECONDS) for process in both]
            assert [process.returncode for process in both] == [0, 0], said
            assert sorted("nothing to submit" in out for out, _ in said) == [False, True], said
            jobs = tables.load_jobs(scene.run.root)
            assert not jobs["artifact"].duplicated().any()
            assert "nothing to submit: 2 artifacts are on their way" in _as_another_user(scene, home)
            scene.open_gate()
            scene.wait_until_idle()
            scene.assert_undisturbed(*SETS)
    finally:
        shutil.rmtree(home)


def _as_another_user(scene: Scene, home: Path) -> str:
    """Submit as ``nobody``, who may write into the run folder, in a child that has loaded everything already."""
    from pipeline.execution import Selection
    from slurm.submit import submit

    out = home / "said"
    out.touch()
    for path in (home, *home.rglob("*")):
        path.chmod(0o777)
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
    for scene in _scene(desk, tmp_path / """it's a "run" $HOME & more""", tmp_path):
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
    for scene in _scene(desk, tmp_path / "run", tmp_path, shared=json.dumps([before, after])):
        for name in names:
            shutil.rmtree(scene.run.root / name, ignore_errors=True)
        text = scene.submit("--dry-run")
        said = scene.submit()
        assert [line.partition(": ")[2].split(",")[0] for line in said.splitlines()[:3]] == [
            "+".join(before),
            "adaptors (array of 2)",
            "+".join(after),
        ]
        _compare_scripts(scene, text)
        scene.wait_for_step(SETS[0])
        left = sum(state != "fresh" for state in scene.status().values())
        assert f"nothing to submit: {left} artifacts are on their way" in scene.submit()
        scene.open_gate()
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
