"""A run on images in tars and in a Parquet file: the same images and clusters as from their files; found and shown."""

from __future__ import annotations

import io
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest
from PIL import Image

from grappa.images.sources import urls
from grappa.pipeline.commands.add import add, remove
from grappa.pipeline.commands.search import search
from grappa.pipeline.engine.progress import Progress
from grappa.pipeline.engine.sources import changed_files
from grappa.pipeline.pages.explore.thumbnails import NoPictureError, large
from grappa.pipeline.pages.explore.web.described import image_details
from grappa.pipeline.pages.explore.workspace import Workspace
from grappa.pipeline.store.artifacts import RunFolder
from tests.helpers.shards import served, write_images, write_tar
from tests.helpers.tiny import draw_images, make_run, run_all, write_weights

FORMS = ("files", "tars", "parquet")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunFolder]:
    desk = tmp_path_factory.mktemp("desk")
    weights, root = write_weights(desk / "weights.safetensors"), draw_images(desk / "files", num_images=3)
    named = {str(file.relative_to(root)): file.read_bytes() for file in sorted(root.rglob("*.png"))}
    for shard in range(2):
        write_tar(desk / "tars" / f"{shard:05d}.tar", dict(list(named.items())[shard::2]))
    above = [name.split("/") for name in named]
    write_images(
        desk / "parquet" / "images.parquet",
        list(named.values()),
        [f"class_{number}" for number in range(4)],
        domain=[each[0] for each in above],
        label=pa.array([int(each[1][-1]) for each in above]),
    )
    found = {}
    for form in FORMS:
        found[form] = make_run(desk / f"run_{form}", [desk / form], weights)
        run_all(found[form], until="clusters")
    return found


def table(run: RunFolder, name: str, file: str) -> pd.DataFrame:
    return pd.read_parquet(run.artifact(name).home / file)


@pytest.mark.parametrize("form", FORMS[1:])
def test_the_form_of_the_images_changes_no_id_and_no_cluster(runs: dict[str, RunFolder], form: str) -> None:
    for name, file, columns in (
        ("images", "images.parquet", ["image_id", "sha256", "domain", "height", "width"]),
        ("images", "labels.parquet", ["image_id", "label"]),
        ("clusters/k00004", "assignments.parquet", ["image_id", "pseudo_label"]),
        ("clusters/k00008", "assignments.parquet", ["image_id", "pseudo_label"]),
    ):
        expected, found = table(runs["files"], name, file), table(runs[form], name, file)
        columns = [each for each in columns if each in expected]
        assert len(columns) > 1
        pd.testing.assert_frame_equal(found[columns], expected[columns])


def test_a_run_on_packed_images_is_read_again_and_compared(runs: dict[str, RunFolder]) -> None:
    for form in FORMS:
        assert changed_files(runs[form]) == []
    tar = Path(table(runs["tars"], "sources", "sources.parquet")["path"][0].partition("::")[0])
    assert tar == Path("00000.tar")
    file = runs["tars"].root.parent / "tars" / tar
    data = file.read_bytes()
    file.write_bytes(data[:600] + bytes([data[600] ^ 1]) + data[601:])
    changed = changed_files(runs["tars"])
    file.write_bytes(data)
    assert len(changed) == 1 and changed[0].endswith("other content than was decoded")
    assert "sources.parquet" in {path.name for path in runs["files"].artifact("sources").home.iterdir()}
    assert "offset" not in table(runs["files"], "sources", "sources.parquet")
    assert "offset" not in table(runs["files"], "images", "images.parquet")


# ---------------------------------------------------------------- a finished run


@pytest.fixture(scope="module")
def finished(runs: dict[str, RunFolder]) -> RunFolder:
    """The run on tars, with all its stages."""
    run_all(runs["tars"])
    return runs["tars"]


def test_an_image_in_a_tar_is_searched_with_as_its_file_is(finished: RunFolder, tmp_path: Path) -> None:
    tars = finished.root.parent / "tars"
    file = f"{tars}/00000.tar::checks/class_0/0.png"
    found = search(finished.root, file, 3)
    assert found == search(finished.root, finished.root.parent / "files" / "checks" / "class_0" / "0.png", 3)
    assert all("tar::" in each["file"] and each["file"] != file for each in found)
    assert search(finished.root, found[0]["file"], 35)[-1]["image_id"]  # what is printed can be searched with
    for asked, words in (
        (
            f"{tars}/00000.tar::nothing.png",
            "there is no image .*the file holds 18 images, such as .*::checks/class_0/0.png",
        ),
        (f"{tars}/gone.tar::a.png", "cannot read .*gone.tar: No such file or directory"),
        (str(write_tar(tmp_path / "note.tar", {"a.txt": b"a"})) + "::a.txt", "the file holds 0 images"),
    ):
        with pytest.raises(ValueError, match=words) as error:
            search(finished.root, asked, 3)
        assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError):
        search(finished.root, "gone.png", 3)


def test_an_image_behind_a_url_is_searched_with_as_its_file_is(
    finished: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(urls, "_PAUSE", 0.0)
    with served(finished.root.parent) as server:
        file = f"{finished.root.parent}/files/checks/class_0/0.png"
        assert search(finished.root, f"{server.url}/files/checks/class_0/0.png", 3) == search(finished.root, file, 3)
        packed = f"{server.url}/tars/00000.tar::checks/class_0/0.png"
        assert search(finished.root, packed, 3) == search(finished.root, file, 3)
        server.failing["2.png"] = 403
        for name, words in (("1.png", "cannot be read: missing"), ("2.png", "cannot be read: not allowed")):
            with pytest.raises(ValueError, match=words):
                search(finished.root, f"{server.url}/nowhere/{name}", 3)


def test_explore_shows_the_original_in_a_tar_at_full_size(finished: RunFolder) -> None:
    workspace = Workspace.open(finished.root)
    try:
        collection = workspace.collection
        assert "::" in collection.files[3] and image_details(workspace, 3)["original"]
        shown = Image.open(io.BytesIO(large(collection.originals, 3)))
        assert shown.size == (52, 44), "the cache has 47 x 40"
        tar = Path(collection.files[3].partition("::")[0])
        kept = tar.read_bytes()
        try:
            tar.write_bytes(bytes(len(kept)))
            with pytest.raises(NoPictureError, match="the original .*::.* cannot be read now .*bring it back"):
                large(collection.originals, 3)
            tar.unlink()
            with pytest.raises(NoPictureError, match="the original .*::.* cannot be read now .*bring it back"):
                large(collection.originals, 3)
            assert not image_details(workspace, 3)["original"]
        finally:
            tar.write_bytes(kept)
    finally:
        workspace.close()


def test_tars_are_added_to_a_run_and_taken_out_by_their_members(finished: RunFolder, tmp_path: Path) -> None:
    lines: list[str] = []
    root = draw_images(tmp_path / "more", num_classes=1, num_images=1, seed=7)
    members = {f"{file.relative_to(root)}": file.read_bytes() for file in sorted(root.rglob("*.png"))}
    tar = write_tar(tmp_path / "more.tar", members)
    add(finished.root, [str(tar)], layout=None, progress=Progress(), say=lines.append)
    assert lines[-1] == "additions: 3 images added, 0 removed"
    file = f"{tar}::checks/class_0/0.png"
    assert file in {each["file"] for each in search(finished.root, f"{tar}::discs/class_0/0.png", 38)}
    remove(finished.root, [file], say=lines.append)
    assert lines[-1] == "1 image removed; 38 left"
    (tmp_path / "cut.tar").write_bytes(tar.read_bytes()[:700])
    with pytest.raises(ValueError, match="the tar cut.tar .*get it whole, or leave it out"):
        add(finished.root, [str(tmp_path / "cut.tar")], layout=None, progress=Progress(), say=lines.append)
    with pytest.raises(ValueError, match="no such folder or table: .*gone.tar"):
        add(finished.root, [str(tmp_path / "gone.tar")], layout=None, progress=Progress(), say=lines.append)
