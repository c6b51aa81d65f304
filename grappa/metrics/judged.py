"""A model as the verdict judged it: plain values, which whoever reads a verdict has too. Nothing heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Word = Literal["helped", "no certain difference", "hurt", "too few images"]


@dataclass(frozen=True)
class Judged:
    """A model that the verdict compares.

    ``indicator``: its mean neighbourhood standout, label-free, in standard deviations, higher is better.
    ``difference``: to the indicator of the frozen backbone, both behind their own heads; ``low``, ``high``: the
    95 % interval of the difference, by paired bootstrap over images (all three are 0 for the frozen backbone itself).
    ``low_within``: the lower end among the images of an image's own domain; None where there is one domain, and in a
    verdict of an earlier version.
    """

    model: str
    indicator: float
    difference: float
    low: float
    high: float
    low_within: float | None = None

    @property
    def holds_within(self) -> bool:
        """Whether it is certainly better within domains, or there is one domain only."""
        return self.low_within is None or self.low_within > 0
