"""The table of results: printed, and written as CSV and JSON with the machine it was measured on."""

from __future__ import annotations

import csv
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from grappa.core.devices import has_bfloat16_products
from tests.benchmarks.core import Options, Result

PACKAGES = ("numpy", "torch", "faiss-cpu", "timm", "scikit-learn")


def machine(options: Options) -> dict[str, str]:
    """Return what the figures depend on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores",
        "threads": str(options.threads),
        "clock": "CPU time" if options.cpu_time else "wall",
        "bfloat16 products": "in hardware" if has_bfloat16_products() else "no",
        "load at the start": f"{os.getloadavg()[0]:.1f}",
        "features": "given" if options.features else "drawn",
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
    }


def line(result: Result) -> str:
    """Return a gate's line."""
    ratio = f"{result.ratio:.3f} [{result.low:.3f}, {result.high:.3f}]"
    sides = f"{_number(result.ours, result.unit)} / {_number(result.peer, result.unit)}"
    note = f"; {result.note}" if result.note else ""
    return (
        f"{result.name:<10} {result.verdict:<11} {ratio:<24} gate {result.gate:<8} {sides:<24} {result.measure}{note}"
    )


def write(folder: Path, results: Sequence[Result], about: Mapping[str, str]) -> None:
    """Write results.csv and results.json."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [asdict(result) for result in results]
    (folder / "results.json").write_text(json.dumps({"machine": dict(about), "results": rows}, indent=2) + "\n")
    with (folder / "results.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, [*rows[0], *about])
        table.writeheader()
        table.writerows({**row, **about} for row in rows)


def _number(value: float, unit: str) -> str:
    return f"{value / 2**20:.0f} MB" if unit == "bytes" else f"{value:.4g} {unit}"


def _version(name: str) -> str:
    try:
        return version(name)
    except ModuleNotFoundError:  # such as faiss-cpu beside the GPU build
        return "none"
