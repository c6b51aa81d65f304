"""`grappa embed`: killed at any moment it goes on to the same bytes, and keeps no more than a part in memory."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from grappa.model import save_model
from grappa.pipeline.commands import embed as command
from grappa.pipeline.commands import embedded_shards
from grappa.pipeline.commands.embed import embed
from grappa.pipeline.commands.embedded_shards import work_folder
from grappa.pipeline.store.locks import LockedError
from tests.helpers.tiny import draw_images, tiny_backbone, tiny_set

ROWS = 8  # a shard; 13 files are two shards
KILLED = """
import os, signal, sys
from pathlib import Path
from grappa.pipeline.commands import embed, embedded_shards
embedded_shards.SHARD = embed.BATCH = {rows}
def kill(done, total):
    if done >= {rows}:
        os.kill(os.getpid(), signal.SIGKILL)
embed.embed(*map(Path, sys.argv[1:]), kill)
"""


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded_shards, "SHARD", ROWS)
    monkeypatch.setattr(command, "BATCH", ROWS)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, tiny_backbone(), {"student": tiny_set(1)}, None, cache_size=40)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = draw_images(tmp_path_factory.mktemp("images"), num_classes=2, num_images=2)
    (folder / "discs" / "class_0" / "broken.png").write_bytes(b"no image")
    return folder


def steps(model: Path, images: Path, out: Path) -> list[int]:
    """Embed; return the numbers of files done that were reported."""
    seen: list[int] = []
    embed(model, images, out, lambda done, total: seen.append(done))
    return seen


def files_of(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in ([out] if out.is_file() else out.iterdir())}


@pytest.mark.parametrize("name", ["out", "out.parquet"])
def test_work_that_was_killed_goes_on_to_the_same_bytes(model: Path, images: Path, tmp_path: Path, name: str) -> None:
    out, whole = tmp_path / "killed" / name, tmp_path / "whole" / name
    whole.parent.mkdir()
    assert steps(model, images, whole) == [0, 8, 13]
    killed = subprocess.run([sys.executable, "-c", KILLED.format(rows=ROWS), model, images, out], check=False)
    assert killed.returncode == -signal.SIGKILL and not out.exists()
    assert steps(model, images, out) == [8, 13]  # the finished part is not computed again
    assert [path.name for path in out.parent.iterdir()] == [name]
    found, wanted = files_of(out), files_of(whole)
    assert {key.replace("out", "x"): value for key, value in found.items()} == {
        key.replace("out", "x"): value for key, value in wanted.items()
    }


def test_what_was_embedded_is_told_from_what_was_not(model: Path, images: Path, tmp_path: Path) -> None:
    said = embed(model, images, tmp_path / "out")
    assert said.startswith("12 embeddings of 32 dimensions, 1 files rejected, in ")
    vectors = np.load(tmp_path / "out" / "embeddings.npy", mmap_mode="r", allow_pickle=False)
    known = pd.read_parquet(tmp_path / "out" / "ids.parquet")
    rejected = pd.read_parquet(tmp_path / "out" / "rejected.parquet")
    assert vectors.shape == (12, 32) and vectors.dtype == np.float32 and len(known) == 12
    assert rejected["path"].tolist() == ["discs/class_0/broken.png"] and "image" in rejected["reason"][0]
    embed(model, images, tmp_path / "out.parquet")
    table = pq.read_table(tmp_path / "out.parquet")
    assert table.column_names == ["path", "domain", "embedding"] and table["path"].to_pylist() == [*known["path"]]
    np.testing.assert_array_equal(np.stack(table["embedding"].to_pylist()), vectors)


def interrupted(model: Path, images: Path, out: Path) -> list[Path]:
    """Stop after the first shard; return the files of the unfinished work."""

    def stop(done: int, total: int) -> None:
        if done >= ROWS:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed(model, images, out, stop)
    return list((out.parent / f".{out.name}.partial").iterdir())


def test_a_damaged_part_is_made_again(model: Path, images: Path, tmp_path: Path) -> None:
    (part,) = interrupted(model, images, tmp_path / "out")
    data = bytearray(part.read_bytes())
    data[200] ^= 1  # in the numbers
    part.write_bytes(data)
    assert steps(model, images, tmp_path / "out") == [0, 8, 13]
    embed(model, images, tmp_path / "whole")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_images_that_came_leave_the_work_before_them_as_it_is(model: Path, images: Path, tmp_path: Path) -> None:
    shutil.copytree(images, tmp_path / "images")
    interrupted(model, tmp_path / "images", tmp_path / "out")
    shutil.copy(next(images.rglob("*.png")), tmp_path / "images" / "stripes" / "class_1" / "new.png")
    assert steps(model, tmp_path / "images", tmp_path / "out") == [8, 14]


def test_a_file_that_was_replaced_by_one_of_its_size_is_embedded_again(
    model: Path, images: Path, tmp_path: Path
) -> None:
    shutil.copytree(images, tmp_path / "images")
    interrupted(model, tmp_path / "images", tmp_path / "out")
    first = min((tmp_path / "images").rglob("*.png"))
    os.utime(first, ns=(1, 1))  # as much as can be told of it without reading it
    assert steps(model, tmp_path / "images", tmp_path / "out") == [0, 8, 13]


def test_work_of_another_model_is_not_taken(model: Path, images: Path, tmp_path: Path) -> None:
    interrupted(model, images, tmp_path / "out")
    other = tmp_path / "other"
    other.mkdir()
    save_model(other, tiny_backbone(1), {"student": tiny_set(1)}, None, cache_size=40)
    assert steps(other, images, tmp_path / "out") == [0, 8, 13]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]


def test_two_commands_do_not_write_the_same_result(model: Path, images: Path, tmp_path: Path) -> None:
    with work_folder(tmp_path / "out"), pytest.raises(LockedError, match="the embeddings .*out"):
        embed(model, images, tmp_path / "out")


def test_files_of_which_none_can_be_used_leave_nothing(model: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "broken.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="none of the 1 files can be used; first: broken.png: "):
        embed(model, tmp_path / "images", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["images"]
