"""Several processes that compute one thing: who takes which part, and how the parts come together.

The processes share torch.distributed's default group, which the caller has set up. A single process has none: every
function below then returns its argument, and torch.distributed is never asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class GroupBrokenError(RuntimeError):
    """Another process has ended, or can no longer be reached: nothing can be computed together any more."""


@dataclass(frozen=True)
class Processes:
    """This process among those that compute together: number ``rank`` of ``size``. All must make the same calls."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is the first process: the one that writes what comes out."""
        return self.rank == 0

    def part(self, number: int) -> slice:
        """Return which of ``number`` items are this process's: contiguous parts that differ by one item at most."""
        return slice(self.rank * number // self.size, (self.rank + 1) * number // self.size)

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor, of one dtype and device, by its sum over the processes, in one message."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        self._add(flat)
        for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))

    def gather(self, values: Tensor, number: int) -> Tensor:
        """Return the rows of all processes, (number, ...), where each holds its ``part(number)``; differentiable.

        Every process must compute the same from the result and take ``1 / size`` of it as its share of the loss: the
        gradients summed over the processes are then those of the whole.
        """
        return values if self.size == 1 else _Gather.apply(values, self, number)

    def collect(self, rows: Tensor, capacity: int) -> list[Tensor] | None:
        """Return every process's (at most ``capacity``) rows on the CPU, in order of rank; None but on the first."""
        if self.size == 1:
            return [rows]
        from torch import distributed

        sent = rows.new_zeros(capacity, *rows.shape[1:], device="cpu")
        sent[: len(rows)] = rows.cpu()
        counts, parts = ([torch.empty_like(one) for _ in range(self.size)] for one in (torch.tensor([0]), sent))
        with _one_group():
            distributed.gather(torch.tensor([len(rows)]), counts if self.leads else None)
            distributed.gather(sent, parts if self.leads else None)
        if not self.leads:
            return None
        return [part[: int(count)] for part, count in zip(parts, counts, strict=True)]

    def broadcast(self, data: bytes) -> bytes:
        """Return what the first process gives; what the others give is ignored."""
        if self.size == 1:
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

    def _add(self, tensor: Tensor) -> None:
        from torch import distributed

        with _one_group():
            distributed.all_reduce(tensor)


ALONE = Processes()


class _Gather(torch.autograd.Function):
    """Rows of all processes, as a sum of tensors in which each has filled its own rows: parts may differ in size."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, processes: Processes, number: int) -> Tensor:
        ctx.processes, ctx.part = processes, processes.part(number)
        whole = values.new_zeros(number, *values.shape[1:])
        whole[ctx.part] = values
        processes._add(whole)
        return whole

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0][ctx.part] * ctx.processes.size, None, None


@contextmanager
def _one_group() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise GroupBrokenError(f"the connection to another process is lost ({error})") from error
