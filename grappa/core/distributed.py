"""Several processes that compute one result: which part each process takes, and how the parts come together.

The processes share torch.distributed's default group, which the caller has set up; the words are torch's. A single
process needs no group: every function below then returns its argument, and torch.distributed is not imported.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BLOCK_NUMBERS = 2**22  # of a message by which rows that the processes hold together go to the first one


class GroupBrokenError(RuntimeError):
    """Another process has ended or cannot be reached: the processes can compute nothing together any more."""


@dataclass(frozen=True)
class Processes:
    """The processes that compute together, as seen by the one of this ``rank``. All must make the same calls."""

    rank: int = 0
    world_size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, the process that writes the result."""
        return self.rank == 0

    def own_slice(self, number: int) -> slice:
        """Return which of ``number`` items this process takes: the slices are contiguous, their lengths differ by one
        item at most."""
        return slice(self.rank * number // self.world_size, (self.rank + 1) * number // self.world_size)

    def all_reduce(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor, of one dtype and device, by its sum over the processes, in one message."""
        if self.world_size == 1 or not tensors:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        self._sum(flat)
        for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))

    def all_gather(self, values: Tensor, number: int) -> Tensor:
        """Return the rows (number, ...) of all processes; each process gives its ``own_slice(number)`` of them.

        The result is differentiable. Every process must compute the same loss from these rows and take ``1 /
        world_size`` of it as its share: the gradients, summed over the processes, are then those of the whole loss.
        """
        return values if self.world_size == 1 else _Gather.apply(values, self, number)

    def beside(self, values: Tensor) -> Tensor:
        """Return the values (P, ...) of the P processes, in order of rank; all give the same shape and type."""
        whole = values.new_zeros(self.world_size, *values.shape)
        whole[self.rank] = values
        self.all_reduce([whole])
        return whole

    def gather(self, rows: Tensor, capacity: int) -> list[Tensor] | None:
        """Return the rows of every process on the CPU, in order of rank; None on all processes but rank 0.

        capacity: the largest number of rows that a process gives.
        """
        if self.world_size == 1:
            return [rows]
        from torch import distributed

        sent = rows.new_zeros(capacity, *rows.shape[1:], device="cpu")
        sent[: len(rows)] = rows.cpu()
        counts, parts = ([torch.empty_like(one) for _ in range(self.world_size)] for one in (torch.tensor([0]), sent))
        with _one_group():
            distributed.gather(torch.tensor([len(rows)]), counts if self.leads else None)
            distributed.gather(sent, parts if self.leads else None)
        if not self.leads:
            return None
        return [part[: int(count)] for part, count in zip(parts, counts, strict=True)]

    def broadcast(self, data: bytes) -> bytes:
        """Return the data that rank 0 gives; the data of the other processes is ignored."""
        if self.world_size == 1:
            return data
        from torch import distributed

        length = torch.tensor([len(data)])
        with _one_group():
            distributed.broadcast(length, 0)
            if not length:
                return b""
            known = torch.frombuffer(bytearray(data), dtype=torch.uint8) if self.leads else None
            content = torch.empty(int(length), dtype=torch.uint8) if known is None else known
            distributed.broadcast(content, 0)
        return content.numpy().tobytes()

    def _sum(self, tensor: Tensor) -> None:
        from torch import distributed

        with _one_group():
            distributed.all_reduce(tensor)


ALONE = Processes()


@dataclass(frozen=True)
class Sharded:
    """Rows (number, ...) that no process holds as a whole: each holds its ``own`` ones."""

    own: Tensor
    number: int
    processes: Processes

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole."""
        return self.number, *self.own.shape[1:]

    @property
    def dtype(self) -> torch.dtype:
        return self.own.dtype

    def blocks(self) -> Iterator[Tensor]:
        """Yield all rows in their order, in blocks on the CPU, to rank 0. All processes must go through them at the
        same time; the others get none."""
        size = max(1, BLOCK_NUMBERS // math.prod(self.shape[1:]))
        for rank in range(self.processes.world_size):
            own = Processes(rank, self.processes.world_size).own_slice(self.number)
            for start in range(0, own.stop - own.start, size):
                yield from self._block(rank, slice(start, min(start + size, own.stop - own.start)))

    def _block(self, rank: int, rows: slice) -> Iterator[Tensor]:
        """Yield these of the rows of one process to rank 0."""
        from torch import distributed

        leads, holds = self.processes.leads, rank == self.processes.rank
        if not (leads or holds):
            return
        if holds:
            block = self.own[rows].detach().cpu()
        else:
            block = self.own.new_empty(rows.stop - rows.start, *self.shape[1:], device="cpu")
        with _one_group():
            if holds and not leads:
                distributed.send(block, 0)
            elif leads and not holds:
                distributed.recv(block, rank)
        if leads:
            yield block


class _Gather(torch.autograd.Function):
    """The rows of all processes, as the sum of tensors in which each process has filled its slice: torch's own
    ``all_gather`` wants slices of equal lengths."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, processes: Processes, number: int) -> Tensor:
        ctx.processes, ctx.own = processes, processes.own_slice(number)
        whole = values.new_zeros(number, *values.shape[1:])
        whole[ctx.own] = values
        processes._sum(whole)
        return whole

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0][ctx.own] * ctx.processes.world_size, None, None


@contextmanager
def _one_group() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise GroupBrokenError(f"the connection to another process is lost ({error})") from error
