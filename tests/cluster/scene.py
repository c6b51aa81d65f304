"""A run on a test cluster, held in the middle of its trainings while something happens to it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grappa.pipeline import tables
from grappa.pipeline.store.artifacts import RunFolder
from tests.cluster.cluster import Cluster
from tests.helpers.tiny import digests, draw_images, make_run, run_all, write_weights

ROOT = Path(__file__).parents[2]
HOOKS = Path(__file__).parent / "hooks"
SECONDS = 180
BATCH_SIZE = 4
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

    def wait_for_failure(self, name: str) -> None:
        wait_until(lambda: "failed" in self.status()[name], f"{name} is seen as failed", self)

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

    def pid_of_task(self, name: str, rank: int) -> int:
        """Return the process of a task of a running job, other than the first."""
        job = self.job_of(name)
        log = next(self.run.root.glob(f"jobs/*/{job}_{rank}_log.out"))
        holders = [path.parent for path in Path("/proc").glob("[0-9]*/cmdline") if _runs(path, log.parent)]
        (found,) = (int(path.name) for path in holders if f"SLURM_PROCID={rank}" in _environment(path))
        return found

    def preempt(self) -> None:
        """Have a job of the partition ``urgent`` take all nodes for a moment."""
        urgent = ("sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")
        self.cluster.call(*urgent, check=True)

    def resumed_from(self, name: str) -> int:
        """Return the steps that a training did not do again: those that its last process did not train."""
        records = [json.loads(line) for line in (self.run.root / name / "log.jsonl").read_text().splitlines()]
        task = next(record for record in records if record.get("task") == "training")
        return int((task["total"] - task["new"]) / BATCH_SIZE)

    def assert_undisturbed(self, *made: str) -> None:
        """Check that everything (or what is below some names) was made, with the bytes of the undisturbed run."""
        expected = {name: digest for name, digest in self.desk.expected.items() if not made or name.startswith(made)}
        found = digests(self.run)
        assert {name: found.get(name) for name in expected} == expected, self.explain()

    def explain(self) -> str:
        logs = "".join(path.read_text(errors="replace")[-3000:] for path in self.run.root.glob("jobs/*/*_log.out"))
        return f"{json.dumps(self.status(), indent=1)}\n{self.cluster.call('squeue', '--long')}\n{logs}"


def _runs(cmdline: Path, submission: Path) -> bool:
    try:
        return os.fsencode(submission) in cmdline.read_bytes().split(b"\0")
    except OSError:
        return False


def _environment(process: Path) -> list[str]:
    return (process / "environ").read_text(errors="replace").split("\0")


def grappa(*arguments: str | Path, fails: bool = False, **options: Any) -> str:
    """Return what the command prints (with ``fails``: on stderr, of a command that must fail)."""
    command = [sys.executable, "-m", "grappa", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, **{"cwd": ROOT, **options})
    assert (done.returncode != 0) == fails, f"{done.stdout}\n{done.stderr}"
    return done.stderr if fails else done.stdout


def wait_until(condition: Callable[[], bool], what: str, scene: Scene) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, f"waited in vain until {what}\n{scene.explain()}"
        time.sleep(0.2)


def make_desk(cluster: Cluster, home: Path) -> Desk:
    """Make the clusters of a run, and in a copy all up to the fusion."""
    images, weights = draw_images(home / "images"), write_weights(home / "weights.safetensors")
    base = make_run(home / "base", [images], weights)
    run_all(base, until="clusters")
    whole = home / "whole"
    shutil.copytree(base.root, whole)
    run_all(RunFolder(whole), until="fusion")
    return Desk(cluster, base, digests(RunFolder(whole)))


def staged(desk: Desk, run: Path, home: Path, **profile: str) -> Iterator[Scene]:
    """Yield a copy of the desk's run as ``run``, with a profile; cancel what is left of its jobs."""
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
