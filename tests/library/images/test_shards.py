"""Images in tars and Parquet files: what is listed of them, their bytes, and what is refused."""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
from pathlib import Path

import fsspec
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from grappa.images.copies import count_distinct_files
from grappa.images.files import ImagesChangedError, RejectedFileError, UnansweredError
from grappa.images.ingest import decode_all
from grappa.images.originals import open_rows
from grappa.images.sources import parquet_shards, urls
from grappa.images.table import ImageTableError, list_images
from tests.helpers.shards import write_images, write_tar
from tests.helpers.tiny import draw_images

SETTINGS = {"cache_size": 16, "max_pixels": 10_000, "shard_size": 5}


def meanings(listing: pd.DataFrame) -> list[tuple[str, ...]]:
    return [tuple(row) for row in listing[["path", "domain", "label", "split"]].fillna("").to_numpy().tolist()]


def bytes_of(listing: pd.DataFrame) -> list[bytes]:
    read = open_rows(listing, listing.attrs["roots"], max_pixels=10_000)
    return [read(row) for row in range(len(listing))]


def sized(name: str, size: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size = size
    return info


# ---------------------------------------------------------------- the same images in each form


def test_files_tars_and_parquet_give_the_same_images(tmp_path: Path) -> None:
    root = draw_images(tmp_path / "files", num_classes=2, num_images=2)
    files = sorted(root.rglob("*.png"))
    named = {str(file.relative_to(root)): file.read_bytes() for file in files}
    write_tar(tmp_path / "tars" / "00000.tar", dict(list(named.items())[:7]))
    write_tar(tmp_path / "tars" / "00001.tar", dict(list(named.items())[7:]))
    above = [name.split("/") for name in named]
    write_images(
        tmp_path / "parquet" / "x.parquet",
        list(named.values()),
        ["class_0", "class_1"],
        domain=[each[0] for each in above],
        label=pa.array([int(each[1][-1]) for each in above]),
    )
    tables = []
    for form in ("files", "tars", "parquet"):
        listing = list_images([tmp_path / form], layout="auto")
        images, labels, rejected = decode_all(listing, listing.attrs["roots"], tmp_path / f"{form}_pixels", **SETTINGS)
        assert rejected.empty
        tables.append(images.merge(labels, on="image_id")[["image_id", "sha256", "domain", "label", "height"]])
        assert ("offset" in images) == (form != "files")
        assert (count_distinct_files(listing, listing.attrs["roots"])) == len(files)
    pd.testing.assert_frame_equal(tables[0], tables[1])
    pd.testing.assert_frame_equal(tables[0], tables[2])
    parts = [(tmp_path / f"{form}_pixels" / "index.npy").read_bytes() for form in ("files", "tars")]
    assert len(parts[0]) == len(parts[1])


# ---------------------------------------------------------------- tars


def test_what_lies_beside_an_image_in_a_tar_says_what_it_is(tmp_path: Path) -> None:
    members = {
        "./a/1.jpg": b"one",
        "a/1.cls": b"7\n",
        "a/1.txt": b"a caption, no class",
        "a/2.left.PNG": b"two",
        "a/2.right.png": b"three",
        "a/2.json": b'{"label": "x", "domain": "sea", "split": "val", "caption": "..."}',
        "a/._1.jpg": b"hidden",
        "a/3.pth": b"no image",
        "dir/": b"",
    }
    write_tar(tmp_path / "shards" / "0.tar", members)
    listing = list_images([tmp_path / "shards" / "0.tar"], layout="auto")
    assert meanings(listing) == [
        ("0.tar::a/1.jpg", "a", "7", ""),
        ("0.tar::a/2.left.PNG", "sea", "x", "test"),
        ("0.tar::a/2.right.png", "sea", "x", "test"),
    ]
    assert listing.attrs["roots"] == [str(tmp_path / "shards")]
    assert bytes_of(listing) == [b"one", b"two", b"three"]
    assert any(".txt 1" in words and ".pth 1" in words for words in listing.attrs["passed_over"])


def test_the_folders_of_tars_are_read_as_those_of_files(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_tar(tmp_path / "data" / split / "0.tar", {"dogs/1.jpg": b"1", "cats/2.jpg": b"2"})
    listing = list_images([tmp_path / "data"], layout="auto")
    assert meanings(listing)[1] == ("train/0.tar::dogs/1.jpg", "data", "dogs", "train")
    flat = list_images([write_tar(tmp_path / "birds" / "0.tar", {"1.jpg": b"1"})], layout="auto")
    assert meanings(flat) == [("0.tar::1.jpg", "birds", "", "")]
    named = list_images([], domains=[("fish", tmp_path / "birds" / "0.tar")])
    assert meanings(named) == [("0.tar::1.jpg", "fish", "", "")]
    both = [tmp_path / "data" / split / "0.tar" for split in ("train", "val")]
    assert len(list_images(both, layout="auto")) == 4


def test_the_names_of_members_and_folders_may_look_like_escapes_and_separators(tmp_path: Path) -> None:
    members = {"caf%C3%A9.jpg": b"1", "100%25.jpg": b"2", "é%FF.jpg": b"3", "a::b.tar::c.jpg": b"4"}
    write_tar(tmp_path / "data" / "x::y%80" / "0.tar", members)
    listing = list_images([tmp_path / "data"], layout="flat")
    assert "x::y%2580/0.tar::caf%25C3%25A9.jpg" in set(listing["path"])
    assert sorted(bytes_of(listing)) == [b"1", b"2", b"3", b"4"]


def test_tars_beside_images_are_passed_over_as_packed_copies(tmp_path: Path) -> None:
    write_tar(tmp_path / "all.tar", {"birds/1.jpg": b"1"})
    (tmp_path / "birds").mkdir()
    (tmp_path / "birds" / "1.jpg").write_bytes(b"1")
    listing = list_images([tmp_path])
    assert list(listing["path"]) == ["birds/1.jpg"] and "offset" not in listing
    assert listing.attrs["passed_over"] == ["1 file (.tar 1)"]
    with_it = list_images([tmp_path, tmp_path / "all.tar"])
    assert list(with_it["path"]) == ["all.tar::birds/1.jpg", "birds/1.jpg"]
    assert bytes_of(with_it) == [b"1", b"1"]
    assert count_distinct_files(with_it, with_it.attrs["roots"]) == 1, "the same bytes, once in a tar"


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda data: data[:1200], "0.tar is broken at byte 1024 after a/1.jpg: get it whole"),
        (
            lambda data: data[:1700],
            "0.tar cannot be read after .*end of data; get it whole, or leave it out",
        ),
        (lambda data: data[:1024] + b"x" * 512 + data[1536:], "0.tar is broken at byte 1024 after a/1.jpg"),
        (lambda data: data[:1024], "0.tar is cut off at byte 1024 after a/1.jpg: get it whole"),
        (lambda data: data[:2048] + b"\0" * 100, "0.tar is cut off at byte 2048 after a/2.jpg: get it whole"),
        (
            lambda data: data + b"\0" * 2**20 + data,
            f"0.tar goes on at byte {10_240 + 2**20}, behind its end after a/3.jpg: .* give each as a file of its own",
        ),
        (lambda data: gzip.compress(data), "0.tar cannot be read: .* it is compressed: unpack it"),
        (lambda data: b"no tar at all", "0.tar cannot be read"),
    ],
)
def test_a_tar_that_is_cut_off_broken_or_packed_is_refused(tmp_path: Path, spoil, sentence: str) -> None:  # type: ignore[no-untyped-def]
    file = write_tar(tmp_path / "0.tar", {"a/1.jpg": b"1" * 512, "a/2.jpg": b"2" * 512, "a/3.jpg": b"3"})
    file.write_bytes(spoil(file.read_bytes()))
    with pytest.raises(ImageTableError, match=sentence):
        list_images([file])


def test_links_in_a_tar_are_counted_as_passed_over(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        archive.addfile(sized("a/1.jpg", 1), io.BytesIO(b"1"))
        for name, kind in (("a/2.jpg", tarfile.LNKTYPE), ("a/3.PNG", tarfile.SYMTYPE), ("a/1.cls", tarfile.LNKTYPE)):
            link = sized(name, 0)
            link.type, link.linkname = kind, "a/1.jpg"
            archive.addfile(link)
        folder = sized("a/b.jpg", 0)
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
    listing = list_images([tmp_path / "0.tar"])
    assert list(listing["path"]) == ["0.tar::a/1.jpg"]
    assert listing.attrs["passed_over"] == ["3 files (links 3)"]


def test_a_header_may_shorten_a_long_name(tmp_path: Path) -> None:
    long = "/".join(("a" * 60, "b" * 60, "1.jpg"))
    info = sized("a" * 60 + "/1.jpg", 1)  # as libarchive does; the whole name is said before
    info.pax_headers = {"path": long}
    with tarfile.open(tmp_path / "0.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(info, io.BytesIO(b"1"))
    listing = list_images([tmp_path / "0.tar"], layout="flat")
    assert list(listing["path"]) == [f"0.tar::{long}"] and bytes_of(listing) == [b"1"]


def test_a_tars_name_says_no_split(tmp_path: Path) -> None:
    for name in ("train", "test"):
        write_tar(tmp_path / f"{name}-00000-of-00001.tar", {f"a/{name}.png": b"x"})
    assert list_images([tmp_path])["split"].isna().all()


def test_a_member_twice_and_a_tar_twice_are_refused(tmp_path: Path) -> None:
    file = write_tar(tmp_path / "0.tar", {"a/1.jpg": b"1", "./a/1.jpg": b"2"})
    with pytest.raises(ImageTableError, match="has the member a/1.jpg twice: pack every image once"):
        list_images([file])
    write_tar(file, {"a/1.jpg": b"1"})
    with pytest.raises(ImageTableError, match=r"0.tar::a/1.jpg is listed twice"):
        list_images([file, file])


def test_a_member_that_is_no_image_is_rejected(tmp_path: Path) -> None:
    good = next(draw_images(tmp_path / "drawn", num_classes=1, num_images=1).rglob("*.png")).read_bytes()
    listing = list_images([write_tar(tmp_path / "0.tar", {"a/1.png": good, "a/2.png": b"no image"})])
    _, _, rejected = decode_all(listing, listing.attrs["roots"], tmp_path / "pixels", **SETTINGS)
    assert rejected[["path", "reason"]].to_numpy().tolist() == [
        ["0.tar::a/2.png", "not an image in JPEG, PNG, WebP, BMP, TIFF, GIF, JPEG 2000, AVIF or HEIC format"]
    ]


def test_a_tar_that_changes_under_a_run_stops_it(tmp_path: Path) -> None:
    file = write_tar(tmp_path / "0.tar", {"a/1.jpg": b"1" * 600, "a/2.jpg": b"2" * 600})
    listing = list_images([file])
    write_tar(file, {"a/0.jpg": b"0" * 600, "a/2.jpg": b"2" * 600})
    read = open_rows(listing, listing.attrs["roots"], max_pixels=10_000)
    with pytest.raises(ImagesChangedError, match=r"0.tar::a/1.jpg .*its tar holds something else at its place"):
        read(0)
    assert read(1) == b"2" * 600
    file.write_bytes(file.read_bytes()[:2100])
    with pytest.raises(ImagesChangedError, match="its tar ends before it; run `grappa init` again"):
        read(1)
    file.unlink()
    with pytest.raises(ImagesChangedError, match="it has gone"):
        read(1)


# ---------------------------------------------------------------- Parquet


def test_a_parquet_file_of_images_is_listed_without_its_images(tmp_path: Path) -> None:
    images = [f"image {number}".encode() for number in range(11)]
    write_images(tmp_path / "data" / "train-00000-of-00001.parquet", images, ["cat", "dog"], label=[0, 1] * 5 + [-1])
    write_images(tmp_path / "data" / "test-00000-of-00001.parquet", images[:1], ["cat", "dog"], label=[1])
    (tmp_path / "data" / "README.md").write_text("a data set")
    listing = list_images([tmp_path / "data"], layout="auto")
    assert meanings(listing)[0] == ("test-00000-of-00001.parquet::0", "data", "dog", "test")
    assert meanings(listing)[2] == ("train-00000-of-00001.parquet::01", "data", "dog", "train")
    assert meanings(listing)[11] == ("train-00000-of-00001.parquet::10", "data", "", "train")
    assert set(listing["size"]) == {-2} and bytes_of(listing) == [images[0], *images]
    assert listing.attrs["passed_over"] == ["1 file (.md 1)"]


def test_rows_are_read_in_any_order_by_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_shards, "WINDOW_BYTES", 40)  # some rows of a row group of four
    images = [hashlib.sha256(bytes([number])).digest() for number in range(30)]
    listing = list_images([write_images(tmp_path / "a" / "x.parquet", images)], layout="flat")
    read = open_rows(listing, listing.attrs["roots"], max_pixels=10_000)
    for order in (range(30), range(29, -1, -1), [5, 4, 17, 0, 18, 5]):
        assert [read(row) for row in order] == [images[row] for row in order]


def test_plain_bytes_and_nulls(tmp_path: Path) -> None:
    pq.write_table(pa.table({"img": [b"1", None], "domain": ["a", "b"]}), tmp_path / "x.parquet")
    listing = list_images([tmp_path / "x.parquet"])
    assert meanings(listing) == [("x.parquet::0", "a", "", ""), ("x.parquet::1", "b", "", "")]
    read = open_rows(listing, listing.attrs["roots"], max_pixels=10_000)
    assert read(0) == b"1"
    with pytest.raises(RejectedFileError, match="no image: the cell of the column `img` holds no bytes"):
        read(1)


def test_a_parquet_file_that_changes_under_a_run_stops_it(tmp_path: Path) -> None:
    file = write_images(tmp_path / "a" / "x.parquet", [b"1", b"2"])
    listing = list_images([file], layout="flat")
    write_images(file, [b"1", b"22"])
    with pytest.raises(ImagesChangedError, match="x.parquet::0 .*its file is another one; run `grappa init` again"):
        bytes_of(listing)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ImagesChangedError, match="its file cannot be read"):
        bytes_of(listing)
    with pytest.raises(ImageTableError, match="cannot read the table"):
        list_images([file])


def test_a_table_without_paths_and_images_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"label": [1], "a": [b"1"], "b": [b"1"]}), tmp_path / "x.parquet")
    with pytest.raises(ImageTableError, match="has no column `path`: found label, a, b"):
        list_images([tmp_path / "x.parquet"])
    write_images(tmp_path / "y.parquet", [b"1"], ["cat"], label=[3])
    with pytest.raises(ImageTableError, match="the label 3 is none of the 1 that the file names"):
        list_images([tmp_path / "y.parquet"], layout="flat")


def test_a_broken_page_stops_with_the_name_of_the_file(tmp_path: Path) -> None:
    file = write_images(tmp_path / "a" / "x.parquet", [bytes([number]) * 100 for number in range(8)])
    listing = list_images([file], layout="flat")
    data = bytearray(file.read_bytes())
    data[4:40] = b"\xff" * 36
    file.write_bytes(data)
    read = open_rows(listing, listing.attrs["roots"], max_pixels=10_000)
    for row in (0, 1, 0):
        with pytest.raises(
            ImagesChangedError, match=r"x.parquet::\d .*its file cannot be read .*get it whole, or leave"
        ):
            read(row)
    assert read(5) == bytes([5]) * 100, "the other row groups are whole"


# ---------------------------------------------------------------- an answer that does not come


class Lost(io.BytesIO):
    """An opened file whose reads fail so many times."""

    left = 0

    def read(self, size: int | None = -1) -> bytes:
        if Lost.left:
            Lost.left -= 1
            raise urls.NoAnswerError("the connection was lost")
        return super().read(size)


def far(monkeypatch: pytest.MonkeyPatch, file: Path) -> str:
    """Return the URL of a file that is opened as ``Lost``."""
    fsspec.filesystem("memory").pipe_file(f"/far/{file.name}", file.read_bytes())
    monkeypatch.setattr(urls, "open_url", lambda url: Lost(file.read_bytes()))
    monkeypatch.setattr(Lost, "left", 0)
    return f"memory://far/{file.name}"


@pytest.mark.parametrize("name", ["0.tar", "x.parquet"])
def test_an_answer_that_ends_while_a_shard_is_listed_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    write_tar(tmp_path / "0.tar", {"a/1.jpg": b"1"})
    write_images(tmp_path / "x.parquet", [b"1"])
    url = far(monkeypatch, tmp_path / name)
    Lost.left = 1
    with pytest.raises(ImageTableError, match=f"^cannot read {url}: the connection was lost$"):
        list_images([url], layout="flat")


def test_a_row_whose_answer_did_not_come_can_be_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_shards, "WINDOW_BYTES", 1)
    images = [hashlib.sha256(bytes([number])).digest() for number in range(8)]
    listing = list_images([far(monkeypatch, write_images(tmp_path / "x.parquet", images))], layout="flat")
    read = open_rows(listing, listing.attrs["roots"], max_pixels=10_000)
    assert read(0) == images[0]
    for row in (4, 1, 3):  # each begins a row group
        Lost.left = 1
        with pytest.raises(UnansweredError, match="^the connection was lost$"):
            read(row)
        assert [read(each) for each in (row, 2, 6)] == [images[each] for each in (row, 2, 6)]
