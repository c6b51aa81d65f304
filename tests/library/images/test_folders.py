"""Folders as people have them: what is listed, what is passed over, and what the names of the folders mean."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pandas as pd
import pytest

from grappa.images.folders import LAYOUTS, find_files, passed_over, recognize
from grappa.images.table import ImageTableError, list_images


def put(root: Path, *names: str, content: bytes = b"x") -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def meanings(listing: pd.DataFrame) -> dict[str, tuple[str, str | None, str | None]]:
    columns = ("path", "domain", "label", "split")
    rows = zip(*(listing[name].tolist() for name in columns), strict=True)
    return {path: (domain, label, split) for path, domain, label, split in rows}


# ---------------------------------------------------------------- what is listed


@pytest.mark.parametrize(
    "name",
    "README README.txt LICENSE notes.md boxes.xml list.json Thumbs.db desktop.ini table.CSV clip.mp4 x.zip".split(),
)
@pytest.mark.parametrize("folder", ["", "birds/", "birds/robin/"])
def test_what_is_evidently_no_image_is_passed_over_and_counted(tmp_path: Path, name: str, folder: str) -> None:
    put(tmp_path, "birds/robin/a.jpg", f"{folder}{name}")
    listing = list_images([tmp_path])
    assert listing["path"].tolist() == ["birds/robin/a.jpg"]
    kind = os.path.splitext(name)[1].lower() or name
    assert listing.attrs["passed_over"] == [f"1 file ({kind} 1)"]


@pytest.mark.parametrize("name", ["a.JPG", "b.heic", "c.cr2", "0a1b2c", "photo.of.me", "readme.png", "x.database"])
def test_what_could_be_an_image_is_listed(tmp_path: Path, name: str) -> None:
    assert list_images([put(tmp_path, f"birds/{name}")])["path"].tolist() == [f"birds/{name}"]


@pytest.mark.parametrize(
    "name", ["@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found", "__MACOSX", "#recycle"]
)
def test_folders_of_systems_are_passed_over(tmp_path: Path, name: str) -> None:
    put(tmp_path, "birds/a.jpg", f"birds/{name}/a.jpg/THUMB_SM.jpg", f"{name}/b.jpg")
    listing = list_images([tmp_path])
    assert listing["path"].tolist() == ["birds/a.jpg"]
    assert listing.attrs["passed_over"] == [f"2 folders ({name} 2)"]


MADE = [
    {"run.json": b'{"format": 1}'},
    {"model.json": b"", "weights.safetensors": b""},
    {"index.html": b"", "results.md": b""},
]


@pytest.mark.parametrize("files", MADE)
def test_what_grappa_made_is_never_listed(tmp_path: Path, files: dict[str, bytes]) -> None:
    put(tmp_path, "birds/a.jpg", "runs/mine/images/one.jpg", "runs/photo.jpg")
    for name, content in files.items():
        put(tmp_path, f"runs/mine/{name}", content=content)
    listing = list_images([tmp_path])
    assert listing["path"].tolist() == ["birds/a.jpg", "runs/photo.jpg"]
    assert listing.attrs["passed_over"] == ["1 folder (runs/mine 1)"]
    with pytest.raises(ImageTableError, match="holds no files but what is no image"):
        list_images([tmp_path / "runs" / "mine"])


@pytest.mark.parametrize("content", ["{", "[]", json.dumps({"format": 1, "camera": "x"}), "[" * 4000])
def test_a_file_of_the_users_called_run_json_hides_no_photos(tmp_path: Path, content: str) -> None:
    put(tmp_path, "birds/run.json", content=content.encode())
    assert list_images([put(tmp_path, "birds/a.jpg")])["path"].tolist() == ["birds/a.jpg"]


def test_a_link_to_itself_is_one_missing_file(tmp_path: Path) -> None:
    put(tmp_path, "birds/a.jpg")
    (tmp_path / "birds/loop.jpg").symlink_to("loop.jpg")
    (tmp_path / "one").symlink_to("two")
    (tmp_path / "two").symlink_to("one")
    listing = list_images([tmp_path], loose_domain="")
    sizes = dict(zip(listing["path"], listing["size"], strict=True))
    assert sizes == {"birds/a.jpg": 1, "birds/loop.jpg": -1, "one": -1, "two": -1}
    assert listing.attrs["missing"] == f"3 of 4 files are missing, first 'one' in {tmp_path}"


def test_folders_that_link_to_each_other_are_listed_once(tmp_path: Path) -> None:
    names = [f"d{number}" for number in range(9)]
    for name in names:
        put(tmp_path, f"{name}/{name}.jpg")
        for other in names:
            (tmp_path / name / f"to_{other}").symlink_to(tmp_path / other)
    found = find_files(str(tmp_path))
    assert found.files["path"].to_pylist() == [f"{name}/{name}.jpg" for name in reversed(names)]
    words = "81 links to folders that are listed already (d0/to_d0 1, d0/to_d1 1, d0/to_d2 1 and 78 more)"
    assert list(passed_over([found])) == [words]


def test_many_links_to_one_folder_open_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "data", "inner/x.jpg")
    (tmp_path / "images").mkdir()
    for number in range(1000):
        (tmp_path / "images" / f"{number:03d}").symlink_to(tmp_path / "data")
    opened: list[str] = []
    scan = os.scandir

    def counted(folder: str) -> object:
        opened.append(folder)
        return scan(folder)

    monkeypatch.setattr(os, "scandir", counted)
    (tmp_path / "way").symlink_to(tmp_path / "images")
    found = find_files(str(tmp_path / "way"))
    assert found.files["path"].to_pylist() == ["000/inner/x.jpg"] and len(opened) == 3
    assert found.passed_links.total() == 999


def test_a_folder_is_listed_where_it_lies_and_not_by_a_link(tmp_path: Path) -> None:
    put(tmp_path, "z/birds/a.jpg")
    (tmp_path / "a").symlink_to("z/birds")
    assert find_files(str(tmp_path)).files["path"].to_pylist() == ["z/birds/a.jpg"]


def test_folders_in_folders_without_end_are_walked(tmp_path: Path) -> None:
    deep = tmp_path
    os.mkdir(deep / "d")
    here = os.open(deep / "d", os.O_RDONLY)
    for _ in range(1200):  # deeper than Python's calls may be
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(os.open("a.jpg", os.O_CREAT, dir_fd=here))
    os.close(here)
    assert len(find_files(str(tmp_path)).files) == 1
    subprocess.run(["rm", "-rf", str(tmp_path / "d")], check=True)


# ---------------------------------------------------------------- what folders mean

LAID_OUT = {
    "domain/class": ["birds/robin/a.jpg", "birds/wren/b.jpg", "cars/mini/c.jpg"],
    "class": [f"{kind}/a.jpg" for kind in ("robin", "wren", "owl", "kite", "swan", "crow")],
    "flat": ["a.jpg", "b.jpg"],
    "split/domain/class": ["train/birds/robin/a.jpg", "test/cars/mini/b.jpg"],
    "split/class": ["train/robin/a.jpg", "val/robin/b.jpg", "test2017/wren/c.jpg"],
    "split/flat": ["Train/a.jpg", "validation/b.jpg"],
    "domain/split/class": ["bottle/train/good/a.jpg", "bottle/test/broken/b.jpg"],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_recognised_and_read(tmp_path: Path, layout: str) -> None:
    root = put(tmp_path / "photos", *LAID_OUT[layout])
    listing = list_images([root], layout="auto")
    assert recognize(LAID_OUT[layout]) == layout == listing.attrs["layouts"][str(root)]
    pd.testing.assert_frame_equal(listing, list_images([root], layout=layout))
    roles = layout.removesuffix("/flat").split("/") if layout != "flat" else []
    for path, (domain, label, split) in meanings(listing).items():
        names = dict(zip(roles, path.split("/"), strict=False))
        assert (domain, label) == (names.get("domain", "photos"), names.get("class"))
        expected = {None: None, "t": "train" if names.get("split", "").lower() == "train" else "test", "v": "test"}
        assert split == expected[names["split"].lower()[0] if "split" in names else None]


def test_a_few_folders_of_images_are_domains(tmp_path: Path) -> None:
    assert recognize(["birds/a.jpg", "cars/b.jpg"]) == "domain/class"
    put(tmp_path / "photos", *LAID_OUT["class"])
    said = list_images([tmp_path / "photos"], layout="domain/class")
    assert said["domain"].nunique() == 6


def test_folders_beside_splits_are_no_splits() -> None:
    assert recognize(["train/a/x.jpg", "birds/a/x.jpg"]) == "domain/class"
    assert recognize(["test/a/x.jpg", "val/a/x.jpg"]) == "domain/class", "nothing would be left to learn from"


def test_a_domain_is_given_its_folder(tmp_path: Path) -> None:
    put(tmp_path, "x/robin/a.jpg", "x/b.jpg", "y/train/mini/c.jpg", "y/test/mini/d.jpg", "z/food/e.jpg")
    listing = list_images([tmp_path / "z"], domains=[("birds", tmp_path / "x"), ("cars", tmp_path / "y")])
    assert meanings(listing) == {
        "robin/a.jpg": ("birds", "robin", None),
        "b.jpg": ("birds", None, None),
        "train/mini/c.jpg": ("cars", "mini", "train"),
        "test/mini/d.jpg": ("cars", "mini", "test"),
        "food/e.jpg": ("food", None, None),
    }
    with pytest.raises(ImageTableError, match="no such folder"):
        list_images([], domains=[("birds", tmp_path / "nowhere")])


@pytest.mark.parametrize(
    ("layout", "path", "expected"),
    [
        ("domain/class", "a.jpg", "lies directly in .* say --layout flat"),
        (
            "split/class",
            "extra/robin/a.jpg",
            "lies in no split: by the layout split/class expected folders called train",
        ),
        ("split/flat", "a.jpg", "lies in no split"),
        ("domain/split/class", "birds/a.jpg", "lies in no split"),
    ],
)
def test_a_file_without_a_place_in_the_layout_is_one_sentence(
    tmp_path: Path, layout: str, path: str, expected: str
) -> None:
    with pytest.raises(ImageTableError, match=expected):
        list_images([put(tmp_path, path)], layout=layout)
