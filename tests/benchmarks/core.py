"""What a gate is, how its two sides are measured in turn, and when the result is a verdict.

A gate is a ratio of two things measured in one run, never a bare time: machines differ and are noisy.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from random import Random

Side = Callable[[], float]
CONFIDENCE = 0.95
NUM_SAMPLES = 2000
MIN_PAIRS = 3


@dataclass(frozen=True)
class Options:
    """How large and how often: ``quick`` takes toy sizes, which are not judged."""

    quick: bool = False
    repeats: int | None = None
    threads: int = 1
    features: Path | None = None
    cpu_time: bool = False
    num_images: int = 100_000

    def size(self, full: int, quick: int) -> int:
        """Return the size to measure at."""
        return quick if self.quick else full


@dataclass(frozen=True)
class Pair:
    """A gate's two sides, ready to be measured.

    Both return what they measured (seconds, bytes). ``setup`` says how the peer is set up; ``check`` tells in the
    end whether both sides did the same work, with a note; ``repeats`` is how often each is measured, after one round
    unmeasured if ``warm_up``.
    """

    ours: Side
    peer: Side
    setup: str
    check: Callable[[], tuple[bool, str]] | None = None
    repeats: int = 7
    warm_up: bool = True


@dataclass(frozen=True)
class Gate:
    """A bound on a ratio: ours / peer at most ``bound``, or (``at_least``) peer / ours, how many times better."""

    name: str
    measure: str
    bound: float
    prepare: Callable[[Options], AbstractContextManager[Pair]]
    at_least: bool = False
    unit: str = "s"


@dataclass(frozen=True)
class Result:
    """One line of the table: the verdict, the median of the paired ratios with its interval, and both medians."""

    name: str
    verdict: str
    ratio: float
    low: float
    high: float
    gate: str
    ours: float
    peer: float
    unit: str
    repeats: int
    measure: str
    setup: str
    note: str


def measured(gate: Gate, options: Options) -> Result:
    """Measure both sides of a gate in turn and judge."""
    with gate.prepare(options) as pair:
        pairs = in_turn(pair, options.repeats or (3 if options.quick else pair.repeats))
        right, note = pair.check() if pair.check else (True, "")
    ratios = [peer / ours if gate.at_least else ours / peer for ours, peer in pairs]
    low, high = interval(ratios)
    return Result(
        name=gate.name,
        verdict=_judged(gate, low, high, len(pairs), right=right) if not options.quick else "not judged",
        ratio=statistics.median(ratios),
        low=low,
        high=high,
        gate=f"{'>=' if gate.at_least else '<='} {gate.bound:g}",
        ours=statistics.median(ours for ours, _ in pairs),
        peer=statistics.median(peer for _, peer in pairs),
        unit=gate.unit,
        repeats=len(pairs),
        measure=gate.measure,
        setup=pair.setup,
        note=note,
    )


def in_turn(pair: Pair, repeats: int) -> list[tuple[float, float]]:
    """Return (ours, peer) of each repeat; who goes first alternates, so that a drift of the machine cancels."""
    if pair.warm_up:
        pair.ours(), pair.peer()
    found = []
    for repeat in range(repeats):
        if repeat % 2:
            peer, ours = pair.peer(), pair.ours()
        else:
            ours, peer = pair.ours(), pair.peer()
        found.append((ours, peer))
    return found


def interval(ratios: Sequence[float]) -> tuple[float, float]:
    """Return the percentile bootstrap interval of the median."""
    random = Random(0)
    medians = sorted(statistics.median(random.choices(ratios, k=len(ratios))) for _ in range(NUM_SAMPLES))
    tail = (1.0 - CONFIDENCE) / 2.0
    return medians[round(tail * (NUM_SAMPLES - 1))], medians[round((1.0 - tail) * (NUM_SAMPLES - 1))]


def _judged(gate: Gate, low: float, high: float, repeats: int, *, right: bool) -> str:
    """Times vary: fewer than three pairs of them decide nothing."""
    if not right:
        return "falls short"
    return "undecided" if gate.unit == "s" and repeats < MIN_PAIRS else verdict(low, high, gate)


def verdict(low: float, high: float, gate: Gate) -> str:
    """Return ``pass`` or ``falls short`` when the whole interval lies on one side of the bound, else ``undecided``."""
    worst, best = (low, high) if gate.at_least else (high, low)
    if worst >= gate.bound if gate.at_least else worst <= gate.bound:
        return "pass"
    return "undecided" if (best >= gate.bound if gate.at_least else best <= gate.bound) else "falls short"


def seconds(work: Callable[[], object], options: Options | None = None) -> Side:
    """Return a side that measures the seconds of ``work``.

    By the wall clock; with ``options`` that ask for it by the CPU time of this process, which is right where one thread
    of it does all the work.
    """
    clock = time.process_time if options and options.cpu_time else time.perf_counter

    def side() -> float:
        start = clock()
        work()
        return clock() - start

    return side
