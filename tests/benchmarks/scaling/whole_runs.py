"""What each stage of whole runs of different sizes takes: CPU time, memory and disk, as lines of one table."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pyarrow import parquet

from grappa.backbone.files.conversions import import_timm
from grappa.pipeline.engine.execution import Selection, run_stages
from grappa.pipeline.engine.progress import Progress
from grappa.pipeline.engine.status import read_config
from grappa.pipeline.graph.node import Node
from grappa.pipeline.graph.stages import nodes
from grappa.pipeline.store.artifacts import RunFolder
from tests.benchmarks.memory import Cost, measured
from tests.benchmarks.scaling.growth import IMAGE_COUNTS, Point, exponent, hours, measured_at, write_table

STAGES_FILE = "stages.csv"
STAGE_NUMBERS = ("images", "cpu_seconds", "wall_seconds", "peak_mb", "own_mb", "disk_mb")


def measure_runs(folders: Iterable[Path], out: Path, until: str | None = None) -> None:
    """Take runs through their stages, to the last instance of ``until``; add what each took to stages.csv and write
    stages.md after each run."""
    import_timm()  # what is loaded once is no growth
    for folder in folders:
        run = RunFolder.open(folder, writable=True)
        for node in _planned(list(nodes(read_config(run))), until):
            if run.artifact(node).manifest() is None:
                _measure_stage(run, node, out)
        with (out / STAGES_FILE).open(newline="") as file:
            rows = [{**row, **{name: float(row[name]) for name in STAGE_NUMBERS}} for row in csv.DictReader(file)]
        write_table(out / "stages.md", stage_table(rows))
        print(f"written to {out}: {STAGES_FILE}, stages.md")


def _planned(every: list[Node], until: str | None) -> list[Node]:
    places = [place for place, node in enumerate(every) if until in (None, node.stage)]
    if not places:
        raise SystemExit(f"no stage is called {until}; there are {', '.join(dict.fromkeys(n.stage for n in every))}")
    return every[: places[-1] + 1]


def _measure_stage(run: RunFolder, node: Node, out: Path) -> None:
    config, selection = read_config(run), Selection(node.stage, node.instance)
    found = measured(lambda: run_stages(run, config, selection, progress=Progress(), say=print))
    files = [file for file in run.artifact(node).home.rglob("*") if file.is_file()]
    add_row(out, run, node.stage, node.instance or "", found, sum(file.stat().st_size for file in files))


def add_row(out: Path, run: RunFolder, stage: str, instance: str, found: Cost, disk: int) -> None:
    """Add to stages.csv, and print, what a stage of a run took and how many bytes it left on the disk."""
    images = parquet.read_metadata(run.artifact("sources").home / "sources.parquet").num_rows
    row = {"run": run.root.name, "images": images, "stage": stage, "instance": instance}
    row |= {"cpu_seconds": round(found.cpu_seconds, 1), "wall_seconds": round(found.wall_seconds, 1)}
    row |= {"peak_mb": found.peak_bytes >> 20, "own_mb": found.own_bytes >> 20, "disk_mb": round(disk / 2**20, 1)}
    print(*row.values(), flush=True)
    new = not (out / STAGES_FILE).exists()
    with (out / STAGES_FILE).open("a", newline="") as opened:
        table = csv.DictWriter(opened, list(row))
        if new:
            table.writeheader()
        table.writerow(row)


def stage_table(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Return the lines of the table for the stages of runs, all instances of a stage together: CPU seconds at the
    smallest and the largest size, the exponent between the two largest, largest memory without files (of the whole
    process, in which earlier stages ran) and bytes on disk, and the CPU hours of the far sizes; by the number of images
    where a stage was measured at one size.
    """
    found = []
    for stage in dict.fromkeys(row["stage"] for row in rows):
        sizes = sorted({row["images"] for row in rows if row["stage"] == stage})
        points = [_stage_point(rows, stage, size) for size in sizes]
        disk = sum(row["disk_mb"] for row in rows if (row["stage"], row["images"]) == (stage, points[-1].size))
        peak = f"{points[-1].memory / 2**20:,.0f} MB; {disk * 2**20 / points[-1].size:,.0f} B an image on disk"
        power = f"{exponent(points[-2:]):.2f}" if len(points) > 1 else "1, assumed"
        far = [_far_stage(points, number) for number in IMAGE_COUNTS]
        found.append([f"`{stage}` of a run", "images", measured_at(points), power, peak, *far])
    return found


def _stage_point(rows: list[dict[str, Any]], stage: str, size: float) -> Point:
    own = [row for row in rows if (row["images"], row["stage"]) == (size, stage)]
    seconds, memory = sum(row["cpu_seconds"] for row in own), max(row["own_mb"] for row in own)
    return Point(int(size), max(seconds, 0.1), memory * 2**20)


def _far_stage(points: list[Point], number: int) -> str:
    power, last = exponent(points[-2:]) if len(points) > 1 else 1.0, points[-1]
    return hours(last.seconds * (number / last.size) ** power)
