"""Several processes that compute one run: the first process leads, the others follow.

``joined`` reads the rank of this process from the environment that torchrun and submitit set (RANK, WORLD_SIZE,
LOCAL_RANK, MASTER_ADDR, MASTER_PORT). Only the leader locks, writes, logs and publishes. It announces each stage that
several processes can compute (``parallel`` in ``graph.stages``), and the followers run the same stage at the same time,
on the same run folder. The followers wait while the leader does anything else. Without these variables, or with
WORLD_SIZE=1, the process is alone: torch.distributed is not imported, and the team costs nothing.
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

from grappa.pipeline.engine.heartbeat import ProcessesError, WatchedStore
from grappa.pipeline.errors import sentence_and_code

if TYPE_CHECKING:
    from grappa.core.distributed import Processes

T = TypeVar("T")
JOIN_TIME = timedelta(minutes=10)  # the time until all processes must have started
GROUP_TIME = timedelta(minutes=30)  # the time that one collective may take in the slowest process
_JOINS = itertools.count()


class Team:
    """The processes of a run, as one of them sees them; without a store the process is alone."""

    def __init__(self, store: WatchedStore | None = None) -> None:
        self._store, self._step = store, 0

    @property
    def rank(self) -> int:
        return self._store.rank if self._store else 0

    @property
    def size(self) -> int:
        return self._store.size if self._store else 1

    @property
    def leads(self) -> bool:
        """Whether this process locks, writes and publishes."""
        return self.rank == 0

    @property
    def processes(self) -> Processes:
        """The rank and the number of processes, in the library's type."""
        from grappa.core.distributed import Processes

        return Processes(self.rank, self.size)

    def announce(self, step: Mapping[str, Any] | None) -> None:
        """Announce a stage to the followers, as the leader; None announces the end."""
        if self._store:
            self._step += 1
            self._store.post(f"step/{self._step}", step)

    def steps(self) -> Iterator[Mapping[str, Any]]:
        """Yield the stages that the leader announces, as a follower, until the leader has finished."""
        assert self._store, "a single process has no leader to follow"
        while True:
            self._step += 1
            step = self._store.read(f"step/{self._step}")
            if step is None:
                return
            yield step

    def agree(self, name: str, value: T) -> T:
        """Return the leader's ``value`` (JSON) for the present step."""
        if self._store is None:
            return value
        key = f"step/{self._step}/{name}"
        if self.leads:
            self._store.post(key, value)
            return value
        agreed: T = self._store.read(key)
        return agreed

    def wait_for_all(self, name: str) -> None:
        """Return when every process has reached the point ``name`` of the present step (a barrier)."""
        if self._store:
            self._store.post(f"step/{self._step}/{name}/{self.rank}", None)
            for other in range(self.size):
                self._store.read(f"step/{self._step}/{name}/{other}")

    def check(self) -> None:
        """Raise ProcessesError when another process failed."""
        if self._store:
            self._store.check()

    def leave(self) -> None:
        """Leave the team in order: the leader, which may serve the store, is the last process to leave."""
        assert self._store, "a single process has no team to leave"
        if not self.leads:
            self._store.post(f"left/{self.rank}", None)
            return
        self.announce(None)
        for other in range(1, self.size):
            self._store.read(f"left/{other}")


ALONE = Team()


@contextmanager
def joined() -> Iterator[Team]:
    """Yield the team of this process: ``ALONE`` for a single process. When one process of a team fails, all end.

    Raises ProcessesError, with the reason, when another process failed, was stopped or gave no sign of life.
    """
    rank, size = place()
    if size == 1:
        yield ALONE
        return
    from grappa.core.distributed import GroupBrokenError

    store = WatchedStore(_open_store(rank, size), rank, size)
    try:
        team = Team(store)
        yield team
        team.leave()
    except GroupBrokenError as error:
        atexit.unregister(_leave)
        raise store.broken(error) from error
    except BaseException as error:
        atexit.unregister(_leave)
        kind = type(error).__name__
        store.fail(sentence_and_code(error)[0] or f"{kind}: {error}".removesuffix(": "), kind)
        raise
    finally:
        store.close()


def place() -> tuple[int, int]:
    """Return (RANK, WORLD_SIZE) of the environment, (0, 1) where neither is set; ValueError when they do not fit."""
    rank, size = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "1")
    if size == "1":
        return 0, 1
    if not (rank.isdecimal() and size.isdecimal() and int(rank) < int(size)):
        raise ValueError(
            f"the environment says RANK={rank or 'nothing'} of WORLD_SIZE={size}: start several processes with "
            "torchrun or Slurm, or unset both"
        )
    return int(rank), int(size)


def _open_store(rank: int, size: int) -> Any:
    """Return a store for this call of ``joined`` only; all processes call ``joined`` equally often."""
    from torch.distributed.distributed_c10d import PrefixStore

    return PrefixStore(f"join/{next(_JOINS)}", _group(rank, size))


@cache
def _group(rank: int, size: int) -> Any:
    """Meet the other processes and set up torch.distributed's default group, once; return the rendezvous' store."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else torch prints a page of addresses for a lost connection
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
