"""What happened in a campaign: counts, and the faults that make it fail."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field

KINDS = ("lost", "differs", "silently used", "refused", "stuck", "traceback", "leftover", "no cure named")


@dataclass
class Tally:
    """Counts of what happened; ``faults`` are the lines that make the campaign fail."""

    deadline: float = float("inf")
    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    @property
    def is_over(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() > self.deadline

    def count(self, what: str) -> None:
        self.counts[what] += 1

    def fault(self, kind: str, line: str) -> None:
        """Note a fault of one of ``KINDS``, and print it at once."""
        assert kind in KINDS
        self.counts[kind] += 1
        self.faults.append(f"{kind}: {line}")
        print(f"FAULT {kind}: {line}", flush=True)

    def summary(self, name: str) -> str:
        """Return one line: the faults by kind, then all counts."""
        verdict = ", ".join(f"{self.counts[kind]} {kind}" for kind in KINDS)
        counts = ", ".join(f"{number} {what}" for what, number in sorted(self.counts.items()) if what not in KINDS)
        return f"{name}: {verdict}; counts: {counts}"
