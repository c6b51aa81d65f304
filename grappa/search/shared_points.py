"""The points of a clustering, of which several processes hold a slice each: what is compared, added up and drawn is the
same, bit for bit, whatever the number of processes.

Points are compared in parts of fixed rows, and a process holds whole parts: the last bit of a product can depend on the
rows that are multiplied with it. Sums over points are sums of integers, which no order changes. A single process holds
all parts, and exchanges nothing.
"""

# B points of a part, C clusters, D width, n points of this process, N points of all processes

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from grappa.core.distributed import ALONE, Processes
from grappa.search.assignment import Assignment, Progress, improve

PART_ROWS = 32768
UNIT_BITS = 32  # a number is rounded by 2^-33 at most where there are fewer than 2^20 points
SUM_BITS = 52  # and a sign: float64 holds the integers up to 2^53
TAKEN_ROWS = 4096  # rows that are exchanged at a time


def own_parts(number: int, processes: Processes = ALONE) -> list[slice]:
    """Return the parts of ``number`` rows that this process holds: they follow one another, of PART_ROWS at most.

    Where there are fewer parts than processes, the last processes hold none.
    """
    total = -(-number // PART_ROWS)
    mine = _mine(total, processes)
    return [slice(part * number // total, (part + 1) * number // total) for part in range(mine.start, mine.stop)]


def own_rows(number: int, processes: Processes = ALONE) -> slice:
    """Return the rows of all parts of this process."""
    total = max(1, -(-number // PART_ROWS))
    mine = _mine(total, processes)
    return slice(mine.start * number // total, mine.stop * number // total)


def _mine(total: int, processes: Processes) -> slice:
    """Return which of ``total`` parts a process holds; the first process, which shows progress, always holds some."""
    first, stop = (-(-rank * total // processes.world_size) for rank in (processes.rank, processes.rank + 1))
    return slice(first, stop)


def most_rows(number: int, world_size: int) -> int:
    """Return the largest number of rows that one of ``world_size`` processes holds."""
    slices = (own_rows(number, Processes(rank, world_size)) for rank in range(world_size))
    return max(each.stop - each.start for each in slices)


@dataclass(frozen=True)
class SharedPoints:
    """N points, of which this process holds ``own_rows``, (n, D) float32. Every process must make the same calls.

    "Rows" in an argument or a result are rows of all points, in [0, N).
    """

    own_ND: torch.Tensor
    number: int
    processes: Processes = ALONE

    @classmethod
    def alone(cls, points_ND: torch.Tensor) -> SharedPoints:
        """Return the points of a single process."""
        return cls(points_ND, len(points_ND))

    @property
    def unit(self) -> float:
        """What a number of length 2 at most is multiplied with before it is rounded to an integer: float64 holds the
        sum of N of them, and of some of them, exactly."""
        return 2.0 ** min(UNIT_BITS, SUM_BITS - self.number.bit_length())

    @property
    def own(self) -> slice:
        """The rows that this process holds."""
        return own_rows(self.number, self.processes)

    def parts(self, found: Assignment) -> Iterator[tuple[Assignment, torch.Tensor]]:
        """Yield each part of this process: its assignment, a view of ``found`` (n,), and its points (B, D)."""
        first = self.own.start
        for part in own_parts(self.number, self.processes):
            own = slice(part.start - first, part.stop - first)
            yield Assignment(found.labels[own], found.cosines[own]), self.own_ND[own]

    def improve(
        self,
        found: Assignment,
        centroids_CD: torch.Tensor,
        names: torch.Tensor | None = None,
        progress: Progress = lambda _: None,
    ) -> None:
        """Give each own point, in place, the nearest of these centroids if it is nearer than its present one."""
        for part, points_BD in self.parts(found):
            improve(part, points_BD, centroids_CD, names=names, progress=progress)

    def counted(self, values: torch.Tensor) -> torch.Tensor:
        """Return float32 numbers of length 2 at most as integers, in units of 1 / ``unit``, in float64."""
        return (values * self.unit).round_().double()

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum of the processes' integers, of one shape; ``values`` may be returned, and is not changed."""
        if self.processes.world_size == 1:
            return values
        total = values.clone()
        self.processes.all_reduce([total])
        return total

    def mean(self, values: torch.Tensor) -> float:
        """Return the mean over all points of numbers (n,) float32, of which each process gives those of its points."""
        own = torch.stack([self.counted(part).sum() for part in values.split(PART_ROWS)]).sum()
        return float(self.total(own)) / self.unit / self.number

    def sizes(self, found: Assignment, num_clusters: int) -> torch.Tensor:
        """Return the number of points of each cluster, (C,) int64."""
        return self.total(torch.bincount(found.labels, minlength=num_clusters))

    def take(self, values: torch.Tensor, rows: NDArray[np.int64]) -> torch.Tensor:
        """Return the values (m, ...) of some rows in every process; ``values`` (n, ...) holds those of the own rows."""
        if self.processes.world_size == 1:
            return values[torch.from_numpy(rows).to(values.device)]
        taken = values.new_zeros(len(rows), *values.shape[1:])
        held = torch.from_numpy(np.flatnonzero(self.holds(rows))).to(values.device)
        taken[held] = values[torch.from_numpy(rows).to(values.device)[held] - self.own.start]
        bits = taken.view(torch.int32) if taken.is_floating_point() else taken  # a sum of numbers would change -0.0
        for block in bits.split(TAKEN_ROWS):
            self.processes.all_reduce([block])
        return taken

    def holds(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Tell which rows this process holds."""
        held: NDArray[np.bool_] = (rows >= self.own.start) & (rows < self.own.stop)
        return held

    def smallest(self, values: NDArray[np.floating], number: int) -> NDArray[np.int64]:
        """Return the ``number`` <= N rows with the smallest values, by value, then row; values (n,): the own ones."""
        own = _smallest(values, number)
        if self.processes.world_size == 1:
            return own
        least, rows = np.full(number, np.nan), np.zeros(number, dtype=np.int64)
        least[: len(own)], rows[: len(own)] = values[own], own + self.own.start
        of_all = self.processes.beside(torch.from_numpy(least)).flatten().numpy()
        found: NDArray[np.int64] = self.processes.beside(torch.from_numpy(rows)).flatten().numpy()
        return found[np.argsort(of_all, kind="stable")[:number]]

    def agreed(self, chosen: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return what the first process has chosen: another kind of CPU may see a tie where it sees none."""
        return np.frombuffer(self.processes.broadcast(chosen.tobytes()), dtype=np.int64).copy()

    def subset(self, rows: NDArray[np.int64]) -> SharedPoints:
        """Return the points of some rows, cut into parts and shared anew."""
        if self.processes.world_size == 1:
            return SharedPoints.alone(self.take(self.own_ND, rows))
        own = own_rows(len(rows), self.processes)
        held = self.own_ND.new_empty(own.stop - own.start, self.own_ND.shape[1])
        for start in range(0, len(rows), TAKEN_ROWS):
            block = self.take(self.own_ND, rows[start : start + TAKEN_ROWS])
            first, after = (min(max(place - start, 0), len(block)) for place in (own.start, own.stop))
            held[start + first - own.start :][: after - first] = block[first:after]
        return SharedPoints(held, len(rows), self.processes)


def _smallest(values: NDArray[np.floating], number: int) -> NDArray[np.int64]:
    """Return the places of at most ``number`` smallest values, ordered by value, then place."""
    places = np.arange(len(values))
    if 0 < number < len(values):
        places = np.flatnonzero(values <= np.partition(values, number - 1)[number - 1])
    return places[np.argsort(values[places], kind="stable")[:number]]
