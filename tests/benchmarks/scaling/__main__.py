"""How time and memory grow with images, clusters and adaptor sets: measured, fitted, drawn, extrapolated.

    python -m tests.benchmarks.scaling [--only neighbors] [--out FOLDER]

Each point is a fresh process with one thread, of which the CPU time is counted: a busy machine changes little. Written
are scaling.csv (measured), scaling.svg and scaling.md: the fitted exponents, and what 10^6 to 10^8 images would take by
them: hours of one core of this CPU, and memory as the steps state it (both computed, not measured).

    python -m tests.benchmarks.scaling --images 20000 100000 [--photographs TABLE] [--until STAGE] [--out FOLDER]

makes that many small images in tars, each another crop, colour and noise of a photograph (of the demo's drawn images
where no table is given), takes a run of each through every stage, and adds what each took to stages.csv (CPU seconds;
memory with and without mapped files; disk). stages.md has lines for the same table. Interrupted, the same command goes
on with the next stage.

    python -m tests.benchmarks.scaling --runs RUN RUN [--until STAGE] [--out FOLDER]

does the same with run folders of one's own, made by `grappa init`.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def main(arguments: list[str] | None = None) -> None:
    """Measure, fit, draw and extrapolate what was asked for."""
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is loaded
    from tests.benchmarks.scaling.curves import CURVES, measure_curves
    from tests.benchmarks.scaling.made_images import LEAST, make_runs
    from tests.benchmarks.scaling.whole_runs import measure_runs

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [curve.name for curve in CURVES]
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--images", nargs="+", type=int, help=f"sizes of runs to make and to measure, from {LEAST:,}")
    parser.add_argument("--photographs", type=Path, help="their origin: a table with path, domain, label, split")
    parser.add_argument("--runs", nargs="+", type=Path, default=[], help="run folders to take through their stages")
    parser.add_argument("--until", metavar="STAGE", help="the last stage of the runs that is measured; default: all")
    parser.add_argument("--out", type=Path, default=Path("runs/scaling"), help="default: runs/scaling")
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    if given.images:
        measure_runs(make_runs(given.out, given.images, given.photographs), given.out, given.until)
    elif given.runs:
        measure_runs(given.runs, given.out, given.until)
    else:
        measure_curves(given.only, given.out)


if __name__ == "__main__":
    main()
