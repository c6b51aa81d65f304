"""All gates, in order. R15 (a resumed run has the same bits) and R17's folded form are tests, not measurements."""

from __future__ import annotations

from tests.benchmarks import clustering, command_line, extraction, inference, retrieval, sets, training
from tests.benchmarks.core import Gate

MODULES = (extraction, clustering, retrieval, training, inference, sets, command_line)
GATES: list[Gate] = sorted(
    (gate for module in MODULES for gate in module.GATES), key=lambda gate: int(gate.name.split()[0][1:])
)
