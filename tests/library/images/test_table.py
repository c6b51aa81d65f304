"""Listing folders and tables: what is listed, in which order, and one sentence for each way it can be wrong."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from grappa.images.table import BOX_COLUMNS, ImageTableError, escape_path, image_file, list_images, unescape_path

AWKWARD_NAMES = [
    "plain.jpg",
    "grüße 日本.jpg",
    "with 'single' and \"double\" quotes, comma.jpg",
    "line\nbreak.jpg",
    "100%.jpg",
    "50%25.jpg",
    "%FF.jpg",
    os.fsdecode(b"caf\xe9.jpg"),
    os.fsdecode(b"%\xff%80\xfe.jpg"),
]


def put(root: Path, *names: str, content: bytes = b"x") -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


def table(folder: Path, text: str, name: str = "images.csv") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    return folder / name


def test_a_folder_gives_domain_and_label(tmp_path: Path) -> None:
    put(tmp_path, "pets/cat/b.jpg", "pets/cat/deep/er/a.jpg", "cars/x.jpg", "pets/.hidden.jpg", ".git/cat/c.jpg")
    listing = list_images([tmp_path])
    assert listing["path"].tolist() == ["cars/x.jpg", "pets/cat/b.jpg", "pets/cat/deep/er/a.jpg"]
    assert listing["domain"].tolist() == ["cars", "pets", "pets"]
    assert listing["label"].tolist() == [None, "cat", "cat"]
    assert listing["split"].tolist() == [None] * 3
    assert listing["size"].tolist() == [1, 1, 1]
    assert listing.attrs["roots"] == [str(tmp_path)]
    assert listing[list(BOX_COLUMNS)].isna().all(axis=None)
    assert (listing["root"].dtype, listing["size"].dtype) == (np.int64, np.int64)


def test_several_roots_are_numbered_and_sorted_together(tmp_path: Path) -> None:
    put(tmp_path, "b/pets/x.jpg", "a/pets/x.jpg", "a/zoo/y.jpg")
    listing = list_images([tmp_path / "b", tmp_path / "a"])
    assert listing.attrs["roots"] == [str(tmp_path / "b"), str(tmp_path / "a")]
    assert listing[["domain", "path", "root"]].to_numpy().tolist() == [
        ["pets", "pets/x.jpg", 0],
        ["pets", "pets/x.jpg", 1],
        ["zoo", "zoo/y.jpg", 1],
    ]


def test_links_are_followed_loops_end_and_dangling_links_are_listed_as_missing(tmp_path: Path) -> None:
    put(tmp_path, "elsewhere/x.jpg", "images/pets/y.jpg")
    (tmp_path / "images/cars").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "images/pets/loop").symlink_to(tmp_path / "images/pets")
    (tmp_path / "images/pets/gone.jpg").symlink_to(tmp_path / "nowhere")
    listing = list_images([tmp_path / "images"])
    assert listing["path"].tolist() == ["cars/x.jpg", "pets/gone.jpg", "pets/y.jpg"]
    assert listing["size"].tolist() == [1, -1, 1]
    assert listing.attrs["passed_over"] == ["1 link to a folder that is listed already (pets/loop 1)"]


def test_csv_cells_stay_text(tmp_path: Path) -> None:
    put(tmp_path, "1.jpg", "2.jpg", "3.jpg", "4.jpg")
    text = "\ufefflabel,path,domain,split,note\nNA,1.jpg,d,train,\n007,2.jpg,NULL,test,x\n,3.jpg,1e5,,\n1.0,4.jpg,d,,\n"
    listing = list_images([table(tmp_path, text)]).set_index("path")
    assert listing["label"].to_dict() == {"1.jpg": "NA", "2.jpg": "007", "3.jpg": None, "4.jpg": "1.0"}
    assert listing["domain"].to_dict() == {"1.jpg": "d", "2.jpg": "NULL", "3.jpg": "1e5", "4.jpg": "d"}
    assert listing["split"].to_dict() == {"1.jpg": "train", "2.jpg": "test", "3.jpg": None, "4.jpg": None}


def test_parquet_equals_csv(tmp_path: Path) -> None:
    put(tmp_path, "x/1.jpg", "x/2.jpg")
    boxes = {name: [float(i), None] for i, name in enumerate(BOX_COLUMNS)}
    frame = pd.DataFrame({"path": ["x/2.jpg", "x/1.jpg"], "domain": "d", "label": [7, 8], "split": ["train", None]})
    frame = frame.assign(**boxes)
    frame.to_parquet(tmp_path / "images.parquet")
    frame.to_csv(tmp_path / "images.csv", index=False)
    first, second = (list_images([tmp_path / name]) for name in ("images.parquet", "images.csv"))
    pd.testing.assert_frame_equal(first, second)
    assert first["label"].tolist() == ["8", "7"]
    assert first[list(BOX_COLUMNS)].iloc[1].tolist() == [0.0, 1.0, 2.0, 3.0]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("blank", ["", " "])
def test_tables_as_spreadsheets_save_them_are_read(tmp_path: Path, encoding: str, separator: str, blank: str) -> None:
    put(tmp_path, "grüße, 1.jpg", "2.jpg")
    names = separator.join([f"{blank}path{blank}", "label", f"domain{blank}"])
    rows = [names, separator.join(['"grüße, 1.jpg"', "x", "d"]), separator.join(["2.jpg", "", "d"]), ""]
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    (tmp_path / "images.csv").write_bytes((mark + "\r\n".join(rows)).encode(encoding))
    listing = list_images([tmp_path / "images.csv"])
    assert listing["path"].tolist() == ["2.jpg", "grüße, 1.jpg"]
    assert listing["label"].tolist() == [None, "x"]
    assert (listing["size"] == 1).all()


@pytest.mark.parametrize("content", ["path,domain\nx,d\n".encode("utf-16-le"), b"PK\3\4\0\0\6\0rest of a workbook"])
def test_a_table_that_is_no_text_is_one_sentence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "images.csv").write_bytes(content)
    with pytest.raises(ImageTableError, match="is no UTF-8 text, it holds NUL bytes: save it as CSV in UTF-8"):
        list_images([tmp_path / "images.csv"])
    (tmp_path / "images.csv").write_bytes(b"\xff\xfe\0\xd8p")
    with pytest.raises(ImageTableError, match="cannot read the table"):
        list_images([tmp_path / "images.csv"])


@pytest.mark.parametrize("name", ["images.parquet", "images.csv"])
def test_integer_labels_that_pandas_made_float_are_integers(tmp_path: Path, name: str) -> None:
    put(tmp_path, "1", "2", "3")
    frame = pd.DataFrame({"path": ["1", "2", "3"], "domain": "d", "label": [0, None, 12]})
    assert frame["label"].dtype == float
    frame.to_parquet(tmp_path / name) if name.endswith("t") else frame.to_csv(tmp_path / name, index=False)
    assert list_images([tmp_path / name])["label"].tolist() == ["0", None, "12"]


@pytest.mark.parametrize("value", [1.5, float("inf"), 2.0**60])
def test_other_float_labels_are_refused(tmp_path: Path, value: float) -> None:
    pd.DataFrame({"path": ["1"], "domain": ["d"], "label": [value]}).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(ImageTableError, match="column `label` holds .*: expected text or whole numbers"):
        list_images([tmp_path / "x.parquet"])


HINTS = {
    "file:///x.jpg": "first '/x.jpg'",
    "C:\\photos\\x.jpg": "it begins with a drive letter",
    "D:/photos/x.jpg": "it begins with a drive letter",
    "d\\x.jpg": "it has backslashes: write / between folders",
    "~/x.jpg": "`~` is not expanded",
    "x.jpg ": "it begins or ends with a blank",
    " x.jpg": "it begins or ends with a blank",
    "y.jpg": "first 'y.jpg'",
}


@pytest.mark.parametrize("path", HINTS)
def test_files_that_are_not_there_are_counted_with_the_likely_reason(tmp_path: Path, path: str) -> None:
    put(tmp_path, "x.jpg", "d/x.jpg")
    listing = list_images([table(tmp_path, f"path,domain\nx.jpg,d\n{path},d\n")])
    assert (listing["size"] == -1).sum() == 1
    assert listing.attrs["missing"].startswith("1 of 2 files is missing, first ")
    assert HINTS[path] in listing.attrs["missing"]
    assert list_images([table(tmp_path, "path,domain\nx.jpg,d\n")]).attrs["missing"] == ""


def test_rows_shuffled_give_the_same_listing(tmp_path: Path) -> None:
    put(tmp_path, *(f"{i}.jpg" for i in range(5)))
    rows = [f"{i}.jpg,d{i % 2}\n" for i in range(5)]
    first = list_images([table(tmp_path, "path,domain\n" + "".join(rows), "a.csv")])
    second = list_images([table(tmp_path, "path,domain\n" + "".join(reversed(rows)), "b.csv")])
    pd.testing.assert_frame_equal(first, second)


def test_table_paths_may_be_absolute_or_missing(tmp_path: Path) -> None:
    put(tmp_path, "far/x.jpg")
    folder = tmp_path / "near"
    listing = list_images([table(folder, f"path,domain\n{tmp_path}/far/x.jpg,d\n../far/../none.jpg,d\n")])
    files = [image_file(listing.attrs["roots"][row.root], row.path) for row in listing.itertuples()]
    assert [os.path.normpath(file) for file in files] == [f"{tmp_path}/none.jpg", f"{tmp_path}/far/x.jpg"]
    assert listing["size"].tolist() == [-1, 1]


@pytest.mark.parametrize("name", AWKWARD_NAMES)
def test_escaping_is_reversible_and_plain_utf8(name: str) -> None:
    assert unescape_path(escape_path(name)) == name
    escape_path(name).encode("utf-8")


def test_escaping_leaves_proper_names_alone_and_keeps_names_apart() -> None:
    assert [escape_path(name) for name in AWKWARD_NAMES[:5]] == AWKWARD_NAMES[:5]
    assert escape_path(os.fsdecode(b"caf\xe9.jpg")) == "caf%E9.jpg"
    assert len({escape_path(name) for name in AWKWARD_NAMES}) == len(AWKWARD_NAMES)


def test_awkward_names_are_listed_saved_and_found_again(tmp_path: Path) -> None:
    root = tmp_path / os.fsdecode(b"r\xe4ts")
    put(root, *(f"{'d' * 255}/{'e' * 255}/{name}" for name in AWKWARD_NAMES))
    listing = list_images([root])
    listing.to_parquet(tmp_path / "listing.parquet")
    read = pd.read_parquet(tmp_path / "listing.parquet")
    found = {os.path.basename(image_file(listing.attrs["roots"][0], path)) for path in read["path"]}
    assert found == set(AWKWARD_NAMES)
    assert all(os.path.isfile(image_file(listing.attrs["roots"][0], path)) for path in read["path"])


def test_a_csv_names_awkward_files_too(tmp_path: Path) -> None:
    put(tmp_path, *AWKWARD_NAMES)
    with open(tmp_path / "images.csv", "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        csv.writer(file).writerows([["path", "domain"], *([name, "d"] for name in AWKWARD_NAMES)])
    from_table = list_images([tmp_path / "images.csv"])
    assert (from_table["size"] == 1).all()
    assert {unescape_path(path) for path in from_table["path"]} == set(AWKWARD_NAMES)


WRONG_TABLES = {
    "": "empty: expected a header",
    "path,domain\n": "has no rows",
    "file,domain\nx,d\n": "no column `path`: found file, domain",
    "path\nx\n": "no column `domain`",
    "path,domain,path\nx,d,y\n": "column `path` twice",
    "path,domain\nx\n": "row 1 has 1 cells, the header 2",
    'path,domain\n"x,d\n': "cannot read the table",
    "path,domain\nx,d\n,d\n": "row 2 has no path",
    "path,domain\nx,\n": "row 1 has no domain",
    "path,domain,split\nx,d,val\n": "split is 'val': expected train, test",
    "path,domain\nx,d\n./x,d\n": "listed twice",
    "path,domain\nx,_mean\n": "named `_mean`",
    "path,domain,box_x0\nx,d,1\n": "has 1 of the columns",
    "path,domain,box_x0,box_y0,box_x1,box_y1\nx,d,1,2,3,\n": "half a box",
    "path,domain,box_x0,box_y0,box_x1,box_y1\nx,d,1,2,1,4\n": "is empty: expected box_x0 < box_x1",
    "path,domain,box_x0,box_y0,box_x1,box_y1\nx,d,1,4,2,3\n": "is empty",
    "path,domain,box_x0,box_y0,box_x1,box_y1\nx,d,1,NA,2,3\n": "box_y0 is 'NA': expected a number",
    "path,domain,box_x0,box_y0,box_x1,box_y1\nx,d,1,inf,2,3\n": "expected a number",
}


@pytest.mark.parametrize("text", WRONG_TABLES)
def test_a_wrong_table_is_one_sentence(tmp_path: Path, text: str) -> None:
    with pytest.raises(ImageTableError) as caught:
        list_images([table(tmp_path, text)])
    assert WRONG_TABLES[text] in str(caught.value)
    assert "\n" not in str(caught.value)


WRONG_SOURCES: dict[str, tuple[Callable[[Path], object], str]] = {
    "absent": (lambda source: None, "no such folder or table"),
    "empty": (lambda source: source.mkdir(), "holds no files"),
    "flat": (lambda source: put(source, "x.jpg"), "x.jpg lies directly in"),
    "text.txt": (lambda source: source.write_text("x"), "neither a folder nor a table"),
    "broken.parquet": (lambda source: source.write_text("x"), "cannot read the table"),
}


@pytest.mark.parametrize("name", WRONG_SOURCES)
def test_a_wrong_source_is_one_sentence(tmp_path: Path, name: str) -> None:
    make, expected = WRONG_SOURCES[name]
    make(tmp_path / name)
    with pytest.raises(ImageTableError, match=expected):
        list_images([tmp_path / name])


def test_nothing_given_and_the_same_folder_twice_are_refused(tmp_path: Path) -> None:
    put(tmp_path, "a/d/x.jpg")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(ImageTableError, match="no images given"):
        list_images([])
    with pytest.raises(ImageTableError, match="listed twice"):
        list_images([tmp_path / "a", tmp_path / "b"])


def test_a_parquet_of_other_types_is_refused(tmp_path: Path) -> None:
    pd.DataFrame({"path": [1.5], "domain": ["d"]}).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(ImageTableError, match="column `path` holds float values: expected text"):
        list_images([tmp_path / "x.parquet"])


def test_loose_files_are_listed_where_a_domain_is_given_for_them(tmp_path: Path) -> None:
    (tmp_path / "birds").mkdir()
    (tmp_path / "birds" / "a.png").write_bytes(b"x")
    (tmp_path / "b.png").write_bytes(b"x")
    with pytest.raises(ImageTableError, match="lies directly in"):
        list_images([tmp_path])
    listing = list_images([tmp_path], loose_domain="")
    assert list(zip(listing["domain"], listing["path"], strict=True)) == [("", "b.png"), ("birds", "birds/a.png")]
