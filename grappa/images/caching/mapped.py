"""Shards as memory maps: opened when they are first read, and closed again when many others were read since."""

from __future__ import annotations

import errno
import os
import resource
import weakref
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST_OPEN = 4096  # shards of a cache; the kernel allows a process 65,530 maps
REDO = "decode the images again"
_ALIGNMENT = 64  # bytes: the header of an .npy file is a multiple of them
_OTHERS = 256  # files that a process has open beside
_TOO_MANY = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # descriptors of the process, of the system; maps


class MappedShards:
    """The flat uint8 arrays of a folder by number; threads may read them at the same time.

    sizes: (S,) int64, the number of values of each shard, 0: it is never read. The folder stays the one that was opened
    when its name is given to another: the files of two results are never mixed.
    """

    def __init__(self, folder: Path, sizes: NDArray[np.int64], name: Callable[[Path, int], Path]) -> None:
        self._folder, self._sizes, self._name = folder, sizes, name
        self._handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        weakref.finalize(self, os.close, self._handle)
        self._most = _allowed(int(np.count_nonzero(sizes)))
        self._open: OrderedDict[int, NDArray[np.uint8]] = OrderedDict()
        for shard in np.flatnonzero(sizes).tolist():
            self._check_size(shard)

    def __getitem__(self, shard: int) -> NDArray[np.uint8]:
        """Return a shard, read-only; ValueError where it cannot be opened, or is not what the index says."""
        found = self._open.get(shard)
        if found is None:
            found = self._open[shard] = self._loaded(shard)
        with suppress(KeyError):  # another thread has closed it; an array that is in use stays open
            self._open.move_to_end(shard)
            while len(self._open) > self._most:
                self._open.popitem(last=False)
        return found

    def file(self, shard: int) -> Path:
        """Return the file of a shard."""
        return self._name(self._folder, shard)

    def _loaded(self, shard: int) -> NDArray[np.uint8]:
        try:
            return self._mapped(shard)
        except OSError as error:
            if error.errno not in _TOO_MANY:
                raise ValueError(self._unreadable(shard, error.strerror)) from error
        self._open.clear()
        try:
            return self._mapped(shard)
        except OSError as error:
            raise ValueError(f"too many open files at {self.file(shard)}: raise `ulimit -n`") from error

    def _mapped(self, shard: int) -> NDArray[np.uint8]:
        with open(self.file(shard).name, "rb", opener=self._opener) as file:
            try:
                version = np.lib.format.read_magic(file)
                if version != (1, 0):
                    raise ValueError(f"version {version} of the format, expected (1, 0)")
                shape, fortran, kind = np.lib.format.read_array_header_1_0(file)
                if kind != np.uint8 or shape != (self._sizes[shard],) or fortran:
                    raise _Other(
                        f"{self.file(shard)} is {kind} {shape}, the index says uint8 ({self._sizes[shard]},): {REDO}"
                    )
                mapped = np.memmap(file, dtype=np.uint8, mode="r", offset=file.tell(), shape=shape)
            except _Other:
                raise
            except ValueError as error:
                raise ValueError(self._unreadable(shard, str(error))) from error
        return mapped.view(np.ndarray)

    def _opener(self, name: str, flags: int) -> int:
        return os.open(name, flags, dir_fd=self._handle)

    def _check_size(self, shard: int) -> None:
        """Refuse a shard whose size cannot be right; reading its header then tells what is wrong."""
        try:
            size = os.stat(self.file(shard).name, dir_fd=self._handle).st_size
        except OSError as error:
            raise ValueError(self._unreadable(shard, error.strerror)) from error
        header = size - int(self._sizes[shard])
        if header <= 0 or header % _ALIGNMENT:
            self._mapped(shard)

    def _unreadable(self, shard: int, why: str | None) -> str:
        with suppress(OSError):
            if not os.path.samestat(os.stat(self._folder), os.fstat(self._handle)):
                return f"the pixel cache {self._folder} was made again since it was opened: give the command again"
        return f"cannot read {self.file(shard)} of the pixel cache ({why}): {REDO}"


class _Other(ValueError):
    """The file of a shard is whole, but not the one of the index."""


def load_array(file: Path) -> NDArray[Any]:
    """Return an array file of a pixel cache as a memory map; ValueError where it cannot be read."""
    try:
        loaded: NDArray[Any] = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        if isinstance(error, OSError) and error.errno in _TOO_MANY:
            raise
        raise ValueError(f"cannot read {file} of the pixel cache ({error}): {REDO}") from error
    return loaded.view(np.ndarray)


def _allowed(num_shards: int) -> int:
    """Return how many shards may be open: each keeps a file open. This process's soft limit is raised where it can."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(num_shards, MOST_OPEN) + _OTHERS
    if soft == resource.RLIM_INFINITY:
        return MOST_OPEN
    if soft < wanted:
        soft = max(soft, wanted if hard == resource.RLIM_INFINITY else min(wanted, hard))
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return max(1, min(MOST_OPEN, soft - _OTHERS))
