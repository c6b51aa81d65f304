"""Measure the performance gates and print one line each.

    python -m tests.benchmarks [--only R5 R8] [--quick] [--out FOLDER]

A gate passes when the whole 95 % interval of the median of its paired ratios lies within the bound, falls short when
the whole interval lies outside (or both sides did not do the same work), and is undecided otherwise.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from tests.benchmarks.core import Gate, Options, Result, measured


def main(arguments: list[str] | None = None) -> None:
    """Run what was asked for; the results are written after each gate."""
    options, only, out = _parsed(arguments)
    _set_threads(options.threads)
    from tests.benchmarks.output import line, machine, write

    about = machine(options)
    print("; ".join(f"{name}: {value}" for name, value in about.items()), flush=True)
    results: list[Result] = []
    for gate in _chosen(_gates(), only):
        results.append(measured(gate, options))
        print(line(results[-1]), flush=True)
        write(out, results, about)
    print(f"written to {out}: results.csv, results.json (with the set-up of both sides)")


def _gates() -> list[Gate]:
    """Return all gates, in order. R15 (a resumed run has the same bits) and R17's folded form are tests instead."""
    from tests.benchmarks import clustering, command_line, extraction, inference, retrieval, sets, training

    modules = (extraction, clustering, retrieval, training, inference, sets, command_line)
    found: list[Gate] = [gate for module in modules for gate in module.GATES]
    return sorted(found, key=lambda gate: int(gate.name.split()[0][1:]))


def _parsed(arguments: list[str] | None) -> tuple[Options, list[str], Path]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="GATE", default=[], help="such as R5, or R9 for both its parts")
    parser.add_argument("--quick", action="store_true", help="toy sizes, to see that it runs; nothing is judged")
    parser.add_argument("--repeats", type=int, help="pairs a gate, in place of its own number")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of both sides; default: all cores")
    parser.add_argument(
        "--cpu-time", action="store_true", help="of one thread, but for R3, R4, R13: for a busy machine"
    )
    parser.add_argument("--images", type=int, default=100_000, help="of R5 to R8; default: 100,000")
    parser.add_argument("--features", type=Path, metavar="FILE", help="real features (N, D) .npy for R5 to R8")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="default: runs/benchmarks")
    given = parser.parse_args(arguments)
    threads = 1 if given.cpu_time else given.threads
    options = Options(given.quick, given.repeats, threads, given.features, given.cpu_time, given.images)
    return options, given.only, given.out


def _set_threads(number: int) -> None:
    """Before anything that computes is imported, so that each library and each child process obeys."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(number)


def _chosen(gates: list[Gate], only: list[str]) -> list[Gate]:
    numbers = {gate.name.split()[0] for gate in gates}
    unknown = [name for name in only if name not in numbers]
    if unknown:
        sys.exit(f"no gate is called {', '.join(unknown)}; there are {', '.join(sorted(numbers, key=_number))}")
    return [gate for gate in gates if not only or gate.name.split()[0] in only]


def _number(name: str) -> int:
    return int(name[1:])


if __name__ == "__main__":
    main()
