"""The bytes of a row's image through the one seam, and what identifies rows for a fingerprint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from grappa.images import ingest
from grappa.images.files import ImagesChangedError, RejectedFileError, UnansweredError
from grappa.images.originals import described, open_rows
from grappa.images.table import list_images


def test_a_row_gives_the_bytes_of_its_file(tmp_path: Path) -> None:
    (tmp_path / "birds").mkdir()
    for name in "ab":
        (tmp_path / "birds" / f"{name}.jpg").write_bytes(name.encode() * 5)
    listing = list_images([tmp_path])
    read = open_rows(listing, listing.attrs["roots"], max_pixels=100)
    assert [read(1), read(0)] == [b"bbbbb", b"aaaaa"]
    assert open_rows(listing.drop(columns="size"), listing.attrs["roots"], max_pixels=100)(1) == b"bbbbb"
    (tmp_path / "birds" / "a.jpg").write_bytes(b"longer now")
    with pytest.raises(ImagesChangedError, match="birds/a.jpg had 5 bytes"):
        read(0)
    with pytest.raises(RejectedFileError, match=r"are more than an image of -\d+ pixels"):
        open_rows(listing, listing.attrs["roots"], max_pixels=-(2**40))(1)


def test_what_identifies_the_rows_of_local_files_stays_what_it_was(tmp_path: Path) -> None:
    header = "path,domain,label,split,box_x0,box_y0,box_x1,box_y1"
    (tmp_path / "t.csv").write_text(f"{header}\na.jpg,b,,,,,,\nc.jpg,b,,train,1,2.5,3,4\n")
    (tmp_path / "a.jpg").write_bytes(b"x" * 17)
    rows = json.dumps(described(list_images([tmp_path / "t.csv"])))
    assert rows == '[["a.jpg", 0, "b", [NaN, NaN, NaN, NaN], 17], ["c.jpg", 0, "b", [1.0, 2.5, 3.0, 4.0], -1]]'


def test_a_shard_with_an_image_that_did_not_come_is_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "birds").mkdir()
    (tmp_path / "birds" / "a.jpg").write_bytes(b"no image")
    listing = list_images([tmp_path])

    def decode(reason: str, error: type[RejectedFileError]) -> str:
        def fails(*_: Any, **__: Any) -> Any:
            raise error(reason)

        monkeypatch.setattr(ingest, "decode_bytes", fails)
        how: dict[str, int] = {"cache_size": 8, "max_pixels": 100, "shard_size": 4}
        return str(ingest.decode_all(listing, listing.attrs["roots"], tmp_path / "pixels", **how)[2]["reason"][0])

    assert decode("no answer", UnansweredError) == "no answer"
    assert decode("no image", RejectedFileError) == "no image"
    assert decode("not asked for again", RejectedFileError) == "no image"
