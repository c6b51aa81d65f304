"""What submission costs, on a throw-away cluster; root, Debian's Slurm (tests/cluster/install.sh).

    python -m tests.benchmarks.bench_slurm            submit a pipeline of 8 granularities; status of about 200 jobs
    python -m tests.benchmarks.bench_slurm RUN        of a finished run: wall time / stage times on its critical path

Nothing is computed by the first: the jobs are held, and cancelled afterwards.
"""

from __future__ import annotations

import os
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


def main() -> None:
    """Print one line a figure."""
    if len(sys.argv) > 1:
        print_overhead(RunFolder.open(Path(sys.argv[1])))
        return
    home = Path(tempfile.mkdtemp(prefix="grappa-slurm-"))
    home.chmod(0o755)
    cluster = Cluster(home / "cluster")
    cluster.start()
    try:
        print_submission(cluster, home)
    finally:
        cluster.stop()


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
