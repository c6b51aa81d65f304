"""What submission costs, on a throw-away cluster; root, Debian's Slurm (tests/cluster/install.sh).

    python -m tests.benchmarks.bench_slurm            submit a pipeline of 8 granularities; status of about 200 jobs
    python -m tests.benchmarks.bench_slurm RUN        of a finished run: wall time / stage times on its critical path
    python -m tests.benchmarks.bench_slurm RUN 1 2 4  the same images and settings on so many processes on two nodes

Nothing is computed by the first: the jobs are held, and cancelled afterwards. The last one makes the first stages of
RUN anew for each number of processes (features as so many ranges) and prints wall and CPU time of each stage.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from grappa.pipeline import tables
from grappa.pipeline.engine.status import read_config
from grappa.pipeline.graph.stages import nodes, upstream
from grappa.pipeline.store.artifacts import RunFolder
from tests.cluster.cluster import Cluster
from tests.helpers.tiny import draw_images, make_run, write_weights

ROOT = Path(__file__).parents[2]
COMMANDS = ("sbatch", "squeue", "sacct", "scontrol")
PROFILE = """
cpus: 1
shared: [[backbone, images], [heads, verdict, model, retrieval, evaluation, index]]
sbatch: {hold: true}
"""
TOGETHER = ("images", "clusters", "adaptors")  # by processes that talk; features: by ranges, which do not
NUM_NODES = 2


def main() -> None:
    """Print one line a figure."""
    run, processes = sys.argv[1:2], [int(each) for each in sys.argv[2:]]
    if run and not processes:
        print_overhead(RunFolder.open(Path(run[0])))
        return
    home = Path(tempfile.mkdtemp(prefix="grappa-slurm-"))
    home.chmod(0o755)
    cluster = Cluster(home / "cluster", NUM_NODES, cpus=max([4, *processes]), cpu_times=True)
    cluster.start()
    try:
        if processes:
            print_speed(cluster, home, Path(run[0]), processes)
        else:
            print_submission(cluster, home)
    finally:
        cluster.stop()
        shutil.rmtree(home)


def print_speed(cluster: Cluster, home: Path, like: Path, processes: list[int]) -> None:
    """Print wall seconds and CPU seconds of the first stages of a run with one process, two, and so on."""
    settings = read_config(RunFolder.open(like))
    for number in processes:
        run, profile = home / f"run{number}", home / f"profile{number}.yaml"
        nodes = min(number, NUM_NODES)
        shares = {name: {"nodes": nodes, "tasks": number // nodes} for name in TOGETHER}
        stages = shares | {"features": {"ranges": number}}
        profile.write_text(json.dumps({"cpus": 1, "memory": "2G", "stages": stages}))
        images = [each for source in settings.images.sources for each in ("--images", source)]
        grappa(cluster, "init", run, "--config", like / "config.yaml", *images)
        for stage in ("backbone", "images", "features", "clusters", "adaptors"):
            grappa(cluster, "submit", run, "--cluster", profile, "--until", stage)
            cluster.wait_until(lambda: not cluster.call("squeue", "--noheader").strip(), "the queue is empty", 3600)
        print_stages(cluster, RunFolder.open(run), number)


def print_stages(cluster: Cluster, run: RunFolder, number: int) -> None:
    """Print of each stage: seconds from the first start to the last end, seconds of the slowest task's work, CPU."""
    jobs = tables.load_jobs(run.root)
    jobs["stage"] = jobs["artifact"].str.split("[/.]", regex=True).str[0]
    for stage, tasks in jobs.groupby("stage", sort=False):
        assert (tasks["state"] == "made").all(), tasks[["artifact", "state", "error"]]
        wall = (tasks["ended"].max() - tasks["started"].min()).total_seconds()
        work = float(tasks.groupby("artifact")["seconds"].first().max())
        cpu = sum(cpu_seconds(cluster, job) for job in tasks["job_id"].unique())
        print(f"{stage}, {number} processes: {wall:.1f} s, work {work:.1f} s, CPU {cpu:.1f} s", flush=True)


def cpu_seconds(cluster: Cluster, job: str) -> float:
    """Return user and system time of a job, which accounting has as [days-][hours:]minutes:seconds."""

    def told() -> list[str]:
        return cluster.call("sacct", "--jobs", job, "--noheader", "--format=TotalCPU", check=True).split()

    cluster.wait_until(lambda: told()[:1] not in ([], ["00:00:00"]), f"accounting knows the time of {job}")
    days, _, clock = told()[0].rpartition("-")  # the job's, before those of its steps, of which it is the sum
    parts = [float(each) for each in clock.split(":")]
    return 86400 * int(days or 0) + sum(each * 60**place for place, each in enumerate(reversed(parts)))


def grappa(cluster: Cluster, *arguments: str | Path) -> None:
    command = [sys.executable, "-m", "grappa", *map(str, arguments)]
    subprocess.run(command, env=cluster.environment, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def print_submission(cluster: Cluster, home: Path) -> None:
    """Time submit with 8 granularities, then status with 66."""
    (home / "profile.yaml").write_text(PROFILE)
    images, weights = draw_images(home / "images", num_images=12), write_weights(home / "weights.safetensors")
    for number, wanted in ((8, "submit"), (66, "status")):
        values = "[" + ", ".join(str(2 + each) for each in range(number)) + "]"
        run = make_run(home / f"run{number}", [images], weights, clusters__num_clusters=values)
        submit = timed(cluster, home, "submit", str(run.root), "--cluster", str(home / "profile.yaml"))
        found = submit if wanted == "submit" else timed(cluster, home, "status", str(run.root))
        tasks = tables.load_jobs(run.root)["job_id"].nunique()
        print(f"{wanted} with {number} granularities, {tasks} tasks: {found}")
        cluster.call("scancel", "--user=root")


def timed(cluster: Cluster, home: Path, *arguments: str) -> str:
    """Return seconds and numbers of Slurm's commands of one call of grappa."""
    calls = home / "calls"
    calls.write_text("")
    bin_folder = home / "bin"
    bin_folder.mkdir(exist_ok=True)
    for name in COMMANDS:
        (bin_folder / name).write_text(f'#!/bin/sh\necho {name} >> {calls}\nexec /usr/bin/{name} "$@"\n')
        (bin_folder / name).chmod(0o755)
    environment = cluster.environment | {"PATH": f"{bin_folder}{os.pathsep}{cluster.environment['PATH']}"}
    start = time.perf_counter()
    command = [sys.executable, "-m", "grappa", *arguments]
    subprocess.run(command, env=environment, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    seconds, names = time.perf_counter() - start, calls.read_text().split()
    return f"{seconds:.2f} s, {', '.join(f'{names.count(name)} {name}' for name in COMMANDS if name in names)}"


def print_overhead(run: RunFolder) -> None:
    """Compare the time from the first submission to the last end with stage times: those of the longest chain, and all.

    Of a job that came back only the last start counts as stage time.
    """
    jobs = tables.load_jobs(run.root)
    wall = (jobs["ended"].max() - jobs["submitted"].min()).total_seconds()
    config, path, every = read_config(run), dict[str, float](), 0.0
    for node in nodes(config):
        artifact = run.artifact(node)
        if artifact.name not in set(jobs["artifact"]):
            continue
        manifest = artifact.manifest()
        assert manifest is not None, f"{artifact.name} was not made"
        seconds = float(manifest.provenance["seconds"])
        before = max((path.get(each.name, 0.0) for each in upstream(node, config)), default=0.0)
        path[artifact.name] = before + seconds
        every += seconds
    for name, total in (("on the critical path", max(path.values())), ("in all", every)):
        print(f"wall {wall:.0f} s / stages {name} {total:.0f} s = {wall / total:.3f}")


if __name__ == "__main__":
    main()
