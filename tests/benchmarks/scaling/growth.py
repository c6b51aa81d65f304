"""A law of growth, fitted to what was measured and followed to the far sizes, and the table of these."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import linear_regression

IMAGE_COUNTS = (10**6, 10**7, 10**8)


@dataclass(frozen=True)
class Point:
    """CPU seconds and bytes at one size."""

    size: int
    seconds: float
    memory: float


def exponent(points: list[Point]) -> float:
    """Return the slope of the least-squares line through the logarithms of size and seconds."""
    return linear_regression([math.log(p.size) for p in points], [math.log(p.seconds) for p in points]).slope


def extrapolated(points: list[Point], size: int) -> float:
    """Return the seconds at ``size`` by the fitted exponent, from the largest size measured."""
    last = points[-1]
    return last.seconds * (size / last.size) ** exponent(points)


def write_table(file: Path, lines: list[list[str]]) -> None:
    header = ["step", "over", "measured", "exponent", "peak", *(f"10^{len(str(n)) - 1}" for n in IMAGE_COUNTS)]
    rows = [f"| {' | '.join(header)} |", "|" + "---|" * len(header), *(f"| {' | '.join(line)} |" for line in lines)]
    file.write_text("\n".join(rows) + "\n")


def measured_at(points: list[Point]) -> str:
    ends = dict.fromkeys((points[0], points[-1]))
    return " ... ".join(f"{point.size:,} in {point.seconds:.2f} s" for point in ends)


def size_of(number: float) -> str:
    return f"{number / 1e9:,.1f} GB" if number < 1e11 else f"{number / 1e9:,.0f} GB"


def hours(seconds: float) -> str:
    """Return a time as minutes, hours or days, whichever it is read best in."""
    found = seconds / 3600
    if found < 1:
        return f"{max(1, round(seconds / 60))} min"
    return f"{found:.1f} h" if found < 100 else f"{found / 24:,.0f} days"
