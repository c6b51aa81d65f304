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

from grappa.images.table import list_images
from grappa.pipeline.demo.dataset import write_demo_images
from tests.benchmarks.core import Gate, Options, Pair, interval, measured
from tests.benchmarks.memory import peak_growth
from tests.benchmarks.output import machine, write
from tests.benchmarks.scaling.made_images import write_images
from tests.benchmarks.scaling.whole_runs import stage_table

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


def test_images_of_a_run_at_scale_are_made_from_few_and_listed_with_those_for_testing(tmp_path: Path) -> None:
    table = write_demo_images(tmp_path / "drawn", num_images_per_class=2)
    for name in ("one", "two"):
        write_images(tmp_path / name, 2_003, table)
    listing = list_images([str(tmp_path / "one")])
    assert (listing["split"] == "test").sum() == 96 and (listing["split"] != "test").sum() == 2_003
    assert set(listing["domain"][listing["split"] == "test"]) == {"digits", "glyphs", "objects", "textures"}
    tars = sorted(file.relative_to(tmp_path / "one") for file in (tmp_path / "one").rglob("*.tar"))
    assert len(tars) == 3 and all(
        (tmp_path / "one" / t).read_bytes() == (tmp_path / "two" / t).read_bytes() for t in tars
    )


def test_the_stages_of_runs_of_two_sizes_are_lines_with_their_growth() -> None:
    common = {"run": "r", "stage": "clusters", "wall_seconds": 1.0, "peak_mb": 300.0, "own_mb": 200.0, "disk_mb": 1.0}
    found = [(1_000, "k00002", 1.0), (1_000, "k00004", 1.0), (10_000, "k00002", 8.0), (10_000, "k00004", 12.0)]
    rows = [common | {"images": float(n), "instance": name, "cpu_seconds": cpu} for n, name, cpu in found]
    (line,) = stage_table(rows)
    assert line[2:4] == ["1,000 in 2.00 s ... 10,000 in 20.00 s", "1.00"]
    assert line[5] == "33 min"
