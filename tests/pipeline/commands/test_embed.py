"""`grappa embed`: files, tars, Parquet files and URLs; killed at any moment it goes on to the same bytes."""

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

from grappa.images.sources import urls
from grappa.model import save_model
from grappa.pipeline.commands import embed as command
from grappa.pipeline.commands import embedded_shards
from grappa.pipeline.commands.embed import embed
from grappa.pipeline.commands.embedded_shards import work_folder
from grappa.pipeline.store.locks import LockedError
from tests.helpers.shards import served, write_images, write_tar
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


def steps(model: Path, images: Path | str, out: Path) -> list[int]:
    """Embed; return the numbers of files done that were reported."""
    seen: list[int] = []
    embed(model, images, out, lambda done, total: seen.append(done))
    return seen


def files_of(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in ([out] if out.is_file() else out.iterdir())}


@pytest.fixture(scope="module")
def shards(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images as two tars in ``tars``, and as a Parquet file."""
    desk = tmp_path_factory.mktemp("shards")
    named = {str(file.relative_to(images)): file.read_bytes() for file in sorted(images.rglob("*.png"))}
    for number in range(2):
        write_tar(desk / "tars" / f"{number}.tar", dict(list(named.items())[number::2]))
    write_images(desk / "all.parquet", [*named.values()], domain=[name.partition("/")[0] for name in named])
    return desk


@pytest.mark.parametrize(("name", "form"), [("out", "files"), ("out.parquet", "files"), ("out.npy", "tars")])
def test_work_that_was_killed_goes_on_to_the_same_bytes(
    model: Path, images: Path, shards: Path, tmp_path: Path, name: str, form: str
) -> None:
    images = images if form == "files" else shards / "tars"
    out, whole = tmp_path / "killed" / name, tmp_path / "whole" / name
    whole.parent.mkdir()
    assert steps(model, images, whole) == [0, 8, 13]
    killed = subprocess.run([sys.executable, "-c", KILLED.format(rows=ROWS), model, images, out], check=False)
    assert killed.returncode == -signal.SIGKILL and not out.exists()
    assert steps(model, images, out) == [8, 13]  # the finished part is not computed again
    ids = ["out.ids.parquet"] if name == "out.npy" else []
    assert sorted(path.name for path in out.parent.iterdir()) == sorted([name, *ids])
    for each in [name, *ids]:
        assert files_of(out.parent / each) == files_of(whole.parent / each)


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


@pytest.mark.parametrize("form", ["tars", "all.parquet"])
def test_packed_images_have_the_embeddings_of_their_files(
    model: Path, images: Path, shards: Path, tmp_path: Path, form: str
) -> None:
    embed(model, images, tmp_path / "files.npy")
    said = embed(model, shards / form, tmp_path / "packed.npy")
    assert said.startswith("12 embeddings of 32 dimensions, 1 files rejected, in ")
    assert "; first of the rejected: " in said and "::" in said and "not an image" in said
    known = pd.read_parquet(tmp_path / "packed.ids.parquet")
    vectors = [np.load(tmp_path / f"{name}.npy", allow_pickle=False) for name in ("files", "packed")]
    assert vectors[1].dtype == np.float32 and len(known) == len(vectors[1]) == 12
    assert sorted(known["domain"].unique()) == ["checks", "discs", "stripes"]
    for one, other in (vectors, vectors[::-1]):  # the order within a domain is that of the listing
        distances = np.abs(one[:, None] - other[None]).max(axis=2)
        np.testing.assert_allclose(distances.min(axis=1), 0, atol=1e-5)


def test_images_behind_a_url_that_do_not_come_are_counted(
    model: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(urls, "_PAUSE", 0.0)
    (tmp_path / "served" / "birds").mkdir(parents=True)
    draw_images(tmp_path / "drawn", num_classes=1, num_images=1)
    for number, file in enumerate(sorted((tmp_path / "drawn").rglob("*.png"))):
        shutil.copy(file, tmp_path / "served" / "birds" / f"{number}.png")
    with served(tmp_path / "served") as server:
        said = embed(model, f"{server.url}/birds", tmp_path / "all.npy")
        assert said == f"3 embeddings of 32 dimensions, 0 files rejected, in {tmp_path / 'all.npy'}"
        server.failing["/1.png"] = 500
        said = embed(model, f"{server.url}/birds", tmp_path / "some.npy")
        assert said.startswith(
            "2 embeddings of 32 dimensions, 1 files rejected, 1 of them did not come over the network"
        )
        assert said.endswith("; first of the rejected: 1.png: the server answered 500 (3 tries)")


def test_an_image_that_did_not_come_is_asked_for_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(urls, "_PAUSE", 0.0)
    (tmp_path / "served").mkdir()
    for number, file in enumerate(sorted(draw_images(tmp_path / "drawn", num_classes=3).rglob("*.png"))):
        shutil.copy(file, tmp_path / "served" / f"{number:02d}.png")
    with served(tmp_path / "served") as server:
        server.failing["/03.png"] = 500
        interrupted(model, server.url, tmp_path / "out")
        server.failing.clear()
        assert steps(model, server.url, tmp_path / "out")[0] == 0
    assert len(pd.read_parquet(tmp_path / "out" / "ids.parquet")) == 45


@pytest.mark.parametrize("then", ["is cut off", "is another one", "has gone"])
def test_a_tar_that_changes_meanwhile_is_one_sentence(model: Path, shards: Path, tmp_path: Path, then: str) -> None:
    tars = Path(shutil.copytree(shards / "tars", tmp_path / "tars"))

    def change(done: int, total: int) -> None:
        for tar in tars.iterdir():
            if then == "is cut off":
                os.truncate(tar, 100)
            elif then == "has gone":
                tar.unlink()
            else:
                tar.write_bytes(bytes(tar.stat().st_size))

    with pytest.raises(
        ValueError, match="images changed: .*; give the same command again, which lists the images anew"
    ):
        embed(model, tars, tmp_path / "out", change)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("gone.tar", "no such folder or table: .*gone.tar"),
        ("cut.tar", "the tar cut.tar .*get it whole, or leave it out"),
        ("empty.tar", "the tar empty.tar .*get it whole"),
        ("none.tar", "no image lies in none.tar"),
        ("cut.parquet", "cannot read the table .*cut.parquet"),
        ("none.parquet", "no image lies in none.parquet"),
        ("folder", "the folder .*folder holds no files"),
    ],
)
def test_a_source_without_images_is_one_sentence(
    model: Path, shards: Path, tmp_path: Path, given: str, words: str
) -> None:
    whole = write_tar(tmp_path / "whole.tar", {"a/1.png": b"1" * 2000}).read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:1500])
    (tmp_path / "empty.tar").write_bytes(b"")
    write_tar(tmp_path / "none.tar", {"a/1.txt": b"text"})
    (tmp_path / "cut.parquet").write_bytes((shards / "all.parquet").read_bytes()[:-20])
    write_images(tmp_path / "none.parquet", [], domain=[])
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=words) as found:
        embed(model, tmp_path / given, tmp_path / "out.npy")
    assert "\n" not in str(found.value)
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_odd_names_in_tars_stay_what_they_are(model: Path, images: Path, tmp_path: Path) -> None:
    data = next(images.rglob("0.png")).read_bytes()
    names = ["a,b/=1+1.png", 'a,b/q"\n.png', "a,b/x::y.png", "a,b/\udc80.png", "a,b/" + 120 * "n" + ".png"]
    write_tar(tmp_path / "o d,d::.tar", dict.fromkeys(names, data))
    embed(model, tmp_path / "o d,d::.tar", tmp_path / "out.npy")
    known = pd.read_parquet(tmp_path / "out.ids.parquet")
    wanted = {f"o d,d::.tar::{name}".replace("\udc80", "%80") for name in names}
    assert set(known["path"]) == wanted and set(known["domain"]) == {"a,b"}


def test_ids_of_an_array_that_a_kill_left_are_taken_and_those_of_others_are_not(
    model: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, ids, rename = tmp_path / "out.npy", tmp_path / "out.ids.parquet", os.rename
    ids.write_bytes(b"another one's")
    with pytest.raises(ValueError, match="out.ids.parquet exists already"):
        embed(model, images, out)
    ids.unlink()

    def rename_once(draft: Path, name: Path) -> None:
        if name == out:
            raise KeyboardInterrupt
        rename(draft, name)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(command.os, "rename", rename_once)
        embed(model, images, out)
    kept = ids.read_bytes()
    ids.write_bytes(b"another one's")
    with pytest.raises(ValueError, match="out.ids.parquet exists already"):
        embed(model, images, out)
    assert ids.read_bytes() == b"another one's" and not out.exists()
    ids.write_bytes(kept)
    assert steps(model, images, out) == [13]  # nothing was lost
    assert np.load(out, allow_pickle=False).shape == (12, 32) and ids.read_bytes() == kept


def interrupted(model: Path, images: Path | str, out: Path) -> list[Path]:
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


@pytest.mark.parametrize("name", ["vectors.csv", "vectors.NPZ"])
def test_a_file_that_is_not_written_is_no_folder(model: Path, images: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"is to be one file in \.npy or \.parquet, or a new folder"):
        embed(model, images, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_files_of_which_none_can_be_used_leave_nothing(model: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "broken.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="none of the 1 files can be used; first: broken.png: "):
        embed(model, tmp_path / "images", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["images"]
