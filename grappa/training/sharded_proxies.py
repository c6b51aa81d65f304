"""The proxies of all targets as one table, of which each process holds, scores and trains its own rows.

Shapes: D width, C classes of all targets together, K of those that this process holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from grappa.core.distributed import Processes
from grappa.training.targets import Targets


@dataclass(frozen=True)
class ShardedProxies:
    """Which rows of the table (C, D) a process holds: its ``own_slice``. The targets' classes follow each other in it.

    With ``ALONE`` it holds all of them.
    """

    targets: Sequence[Targets]
    processes: Processes

    @property
    def num_classes(self) -> int:
        """C: the proxies that all processes hold together."""
        return sum(len(each.proxies) for each in self.targets)

    @property
    def num_rows(self) -> int | None:
        """C where the processes hold the table in parts, None where each process holds all of it."""
        return self.num_classes if self.processes.world_size > 1 else None

    @property
    def num_own(self) -> int:
        """K: the proxies that this process holds."""
        return sum(held.stop - held.start for held in self._held())

    def first_values(self) -> Tensor:
        """Return the proxies (K, D) float32 that this process holds, as the targets have them."""
        parts = [
            np.array(each.proxies[held], dtype=np.float32)
            for each, held in zip(self.targets, self._held(), strict=True)
        ]
        return torch.from_numpy(np.concatenate(parts))

    def by_target(self, proxies_KD: Tensor) -> list[tuple[Tensor, int]]:
        """Return of each target the proxies that this process holds, and the class of the first of them."""
        held = list(self._held())
        parts = proxies_KD.split([each.stop - each.start for each in held])
        return [(part, each.start) for part, each in zip(parts, held, strict=True)]

    def _held(self) -> Iterator[slice]:
        """Yield which classes of each target this process holds, none for some where the targets are many."""
        own, start = self.processes.own_slice(self.num_classes), 0
        for each in self.targets:
            number = len(each.proxies)
            low, high = (min(max(edge - start, 0), number) for edge in (own.start, own.stop))
            yield slice(low, high)
            start += number
