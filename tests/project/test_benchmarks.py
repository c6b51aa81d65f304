"""The benchmark runner on toy gates: pairs in turn, honest verdicts, a table with the machine. No time is asserted."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tests.benchmarks.core import Gate, Options, Pair, interval, measured
from tests.benchmarks.memory import peak_growth
from tests.benchmarks.output import machine, write

ROOT = Path(__file__).parents[2]


def toy(ours: list[float], peer: list[float], bound: float, *, at_least: bool = False, right: bool = True) -> Gate:
    """A gate whose sides return the given numbers; a side that is asked once too often fails."""
    sides = iter(ours), iter(peer)

    @contextmanager
    def prepare(options: Options) -> Iterator[Pair]:
        check: Callable[[], tuple[bool, str]] = lambda: (right, "recall 0.5")  # noqa: E731
        yield Pair(lambda: next(sides[0]), lambda: next(sides[1]), "a toy", check, repeats=4)

    return Gate("R0", "toy", bound, prepare, at_least=at_least)


@pytest.mark.parametrize(
    ("ours", "bound", "at_least", "expected"),
    [
        ([9, 1.0, 1.1, 1.0, 1.1], 0.6, False, "pass"),
        ([9, 1.0, 1.1, 1.0, 1.1], 0.4, False, "falls short"),
        ([9, 0.5, 1.5, 0.5, 1.5], 0.5, False, "undecided"),
        ([9, 1.0, 1.1, 1.0, 1.1], 1.8, True, "pass"),
        ([9, 1.0, 1.1, 1.0, 1.1], 2.1, True, "falls short"),
        ([9, 0.5, 1.5, 0.5, 1.5], 2.0, True, "undecided"),
    ],
)
def test_a_verdict_needs_the_whole_interval(ours: list[float], bound: float, at_least: bool, expected: str) -> None:
    """The first number of each side is the warm-up, which does not count; the peer always takes 2."""
    result = measured(toy(ours, [9.0] + 4 * [2.0], bound, at_least=at_least), Options())
    assert result.verdict == expected
    assert result.low <= result.ratio <= result.high and result.repeats == 4 and result.peer == 2.0


def test_sides_that_did_not_do_the_same_work_fall_short_and_toy_sizes_are_not_judged() -> None:
    assert measured(toy([1.0] * 5, [2.0] * 5, 1.0, right=False), Options()).verdict == "falls short"
    assert measured(toy([1.0] * 5, [2.0] * 5, 1.0), Options(quick=True)).verdict == "not judged"


def test_two_times_decide_nothing_two_sizes_of_memory_do() -> None:
    for unit, expected in (("s", "undecided"), ("bytes", "pass")):
        gate = replace(toy([1.0] * 5, [2.0] * 5, 1.0), unit=unit)
        assert measured(gate, Options(repeats=2)).verdict == expected


def test_pairs_are_measured_in_turn_and_the_first_alternates() -> None:
    order: list[str] = []

    @contextmanager
    def prepare(options: Options) -> Iterator[Pair]:
        yield Pair(lambda: order.append("ours") or 1.0, lambda: order.append("peer") or 1.0, "", warm_up=False)

    measured(Gate("R0", "toy", 1.0, prepare), Options(repeats=3))
    assert order == ["ours", "peer", "peer", "ours", "ours", "peer"]


def test_the_interval_holds_the_median_and_narrows() -> None:
    low, high = interval([1.0, 2.0, 3.0])
    assert low == 1.0 and high == 3.0
    low, high = interval([1.0, 3.0] + 30 * [2.0])
    assert low == high == 2.0


def test_the_table_is_written_with_the_machine(tmp_path: Path) -> None:
    results = [measured(toy([1.0] * 5, [2.0] * 5, 1.0), Options())]
    write(tmp_path / "out", results, machine(Options(threads=3)))
    (row,) = csv.DictReader((tmp_path / "out" / "results.csv").open())
    assert (row["name"], row["verdict"], row["ratio"], row["threads"]) == ("R0", "pass", "0.5", "3")
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert written["machine"]["torch"] and written["results"][0]["setup"] == "a toy"


def held(megabytes: int) -> Callable[[], object]:
    return lambda: bytearray(megabytes * 2**20).count(b"\1")


def test_the_peak_of_a_fresh_process_is_what_the_work_takes() -> None:
    assert 45 * 2**20 < peak_growth(held, 50) < 60 * 2**20


def test_the_command_lists_the_gates_it_knows() -> None:
    command = [sys.executable, "-m", "tests.benchmarks", "--only", "R99"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "no gate is called R99; there are R1, R2" in done.stderr
