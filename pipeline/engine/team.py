"""Several processes that compute one run: the first leads, the others follow.

``joined`` reads who this process is from the environment that torchrun and submitit set (RANK, WORLD_SIZE, LOCAL_RANK,
MASTER_ADDR, MASTER_PORT). The leader alone locks, writes, logs and publishes; it announces each stage that several
processes can compute (``parallel`` in ``graph.stages``), and the followers run the same stage beside it, on the same
run folder. While it does anything else they wait. Without these variables, or with WORLD_SIZE=1, there is no group:
nothing is imported and nothing costs anything.
"""

from __future__ import annotations

import atexit
import itertools
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from grappa.pipeline.engine.heartbeat import Board, ProcessesError
from grappa.pipeline.errors import explained

if TYPE_CHECKING:
    from grappa.core.distributed import Processes

T = TypeVar("T")
JOIN_TIME = timedelta(minutes=10)  # for all processes to have started
GROUP_TIME = timedelta(minutes=30)  # for one step of a computation, the slowest process's
_JOINS = itertools.count()


class Team:
    """The processes of a run as one of them sees them; without a board it is alone."""

    def __init__(self, board: Board | None = None) -> None:
        self._board, self._step = board, 0

    @property
    def rank(self) -> int:
        return self._board.rank if self._board else 0

    @property
    def size(self) -> int:
        return self._board.size if self._board else 1

    @property
    def leads(self) -> bool:
        """Whether this process locks, writes and publishes."""
        return self.rank == 0

    @property
    def processes(self) -> Processes:
        """What the library needs of them."""
        from grappa.core.distributed import Processes

        return Processes(self.rank, self.size)

    def announce(self, step: Mapping[str, Any] | None) -> None:
        """As the leader: have the followers take part in a stage; None: have them leave."""
        if self._board:
            self._step += 1
            self._board.post(f"step/{self._step}", step)

    def steps(self) -> Iterator[Mapping[str, Any]]:
        """As a follower: yield what the leader announces, until it has finished."""
        assert self._board, "who is alone has nobody to follow"
        while True:
            self._step += 1
            step = self._board.read(f"step/{self._step}")
            if step is None:
                return
            yield step

    def agree(self, name: str, value: T) -> T:
        """Return the leader's ``value`` (JSON) for the present step."""
        if self._board is None:
            return value
        key = f"step/{self._step}/{name}"
        if self.leads:
            self._board.post(key, value)
            return value
        agreed: T = self._board.read(key)
        return agreed

    def wait_for_all(self, name: str) -> None:
        """Return when every process has come to this point of the present step."""
        if self._board:
            self._board.post(f"step/{self._step}/{name}/{self.rank}", None)
            for other in range(self.size):
                self._board.read(f"step/{self._step}/{name}/{other}")

    def check(self) -> None:
        """Raise ProcessesError when another process failed."""
        if self._board:
            self._board.check()

    def part(self) -> None:
        """End in order: the leader, with which the board may go, is the last to leave."""
        assert self._board, "who is alone has nobody to part from"
        if not self.leads:
            self._board.post(f"left/{self.rank}", None)
            return
        self.announce(None)
        for other in range(1, self.size):
            self._board.read(f"left/{other}")


ALONE = Team()


@contextmanager
def joined() -> Iterator[Team]:
    """Yield the team of this process, ``ALONE`` for a single one. However one of them ends, all of them end.

    Raises ProcessesError, with the reason, when another process failed, was stopped or fell silent.
    """
    rank, size = place()
    if size == 1:
        yield ALONE
        return
    from grappa.core.distributed import GroupBrokenError

    board = Board(_store(rank, size), rank, size)
    try:
        team = Team(board)
        yield team
        team.part()
    except GroupBrokenError as error:
        atexit.unregister(_leave)
        raise board.broken(error) from error
    except BaseException as error:
        atexit.unregister(_leave)
        kind = type(error).__name__
        board.fail(explained(error)[0] or f"{kind}: {error}".removesuffix(": "), kind)
        raise
    finally:
        board.close()


def place() -> tuple[int, int]:
    """Return (RANK, WORLD_SIZE) of the environment, (0, 1) where neither is set; ValueError when they make no sense."""
    rank, size = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "1")
    if size == "1":
        return 0, 1
    if not (rank.isdecimal() and size.isdecimal() and int(rank) < int(size)):
        raise ValueError(
            f"the environment says RANK={rank or 'nothing'} of WORLD_SIZE={size}: start several processes with "
            "torchrun or Slurm, or unset both"
        )
    return int(rank), int(size)


def _store(rank: int, size: int) -> Any:
    """Return a store of its own for this call: all processes join equally often."""
    from torch.distributed.distributed_c10d import PrefixStore

    return PrefixStore(f"join/{next(_JOINS)}", _group(rank, size))


@cache
def _group(rank: int, size: int) -> Any:
    """Meet the other processes and set up torch.distributed's default group, once; return the store it came from."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else a lost connection is told as a page of addresses
    import torch
    from torch.distributed.distributed_c10d import PrefixStore, init_process_group
    from torch.distributed.rendezvous import rendezvous

    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl"
    try:
        store, _, _ = next(rendezvous("env://", timeout=JOIN_TIME))
        init_process_group(backend, store=PrefixStore("group", store), rank=rank, world_size=size, timeout=GROUP_TIME)
    except (RuntimeError, ValueError) as error:
        address = ":".join(os.environ.get(name, f"({name} is not set)") for name in ("MASTER_ADDR", "MASTER_PORT"))
        raise ProcessesError(f"rank {rank} of {size} could not meet the others at {address}: {error}") from error
    atexit.register(_leave)
    return store


def _leave() -> None:
    from torch import distributed

    distributed.destroy_process_group()
