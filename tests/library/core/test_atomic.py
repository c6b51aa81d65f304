"""A file is written whole or not at all, also where a folder cannot be synced."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import numpy as np
import pytest

from grappa.core.atomic import fsync_folder, write_whole
from grappa.images.pixels import PixelCache, write_index, write_shard


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_whole(tmp_path / "x", lambda file: file.write(b"old"))

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(tmp_path / "x", lambda file: file.write(b"new"))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"x": b"old"}


def refuse_folders(monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    fsync = os.fsync

    def selective(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(error, os.strerror(error))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", selective)


def test_a_file_system_that_cannot_sync_a_folder_takes_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_folders(monkeypatch, errno.EINVAL)
    write_whole(tmp_path / "x", lambda file: file.write(b"new"))
    assert (tmp_path / "x").read_bytes() == b"new"
    image = np.full((4, 5, 3), 7, dtype=np.uint8)
    write_index(tmp_path, write_shard(tmp_path, 0, [image]))
    np.testing.assert_array_equal(PixelCache.open(tmp_path).image(0), image)


def test_any_other_error_of_a_folder_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_folders(monkeypatch, errno.EIO)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        fsync_folder(tmp_path)
