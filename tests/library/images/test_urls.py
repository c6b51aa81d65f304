"""Images behind URLs: on fsspec's memory and over HTTP from a real server, with its failures."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pandas as pd
import pytest

from grappa.images.files import ImagesChangedError, RejectedFileError, UnansweredError
from grappa.images.originals import open_rows
from grappa.images.paths import bare
from grappa.images.sources import urls
from grappa.images.table import ImageTableError, list_images
from tests.helpers.shards import Served, served, write_images, write_tar


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(urls, "TIMEOUT", 1.0)
    monkeypatch.setattr(urls, "_PAUSE", 0.01)
    monkeypatch.setattr(urls, "_hosts", urls._Hosts())
    urls._system.cache_clear()
    fsspec.filesystem("memory").store.clear()
    yield
    urls._system.cache_clear()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Served]:
    with served(tmp_path / "served") as state:
        yield state


def rows(listing: pd.DataFrame) -> list[bytes]:
    read = open_rows(listing, listing.attrs["roots"], max_pixels=10_000)
    return [read(row) for row in range(len(listing))]


def put(server: Served, **files: bytes) -> None:
    for name, data in files.items():
        file = server.folder / name.replace("__", "/").replace("_jpg", ".jpg")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)


# ---------------------------------------------------------------- what is listed and read


def test_a_folder_in_an_object_store_is_read_as_a_local_one() -> None:
    memory = fsspec.filesystem("memory")
    for name in ("birds/a.jpg", "cars/b é.jpg", "cars/.hidden/c.jpg", "cars/notes.txt", "@eaDir/d.jpg"):
        memory.pipe_file(f"/bucket/photos/{name}", name.encode())
    listing = list_images(["memory://bucket/photos/"], layout="auto")
    assert listing[["path", "domain"]].to_numpy().tolist() == [["birds/a.jpg", "birds"], ["cars/b é.jpg", "cars"]]
    assert listing.attrs["roots"] == ["memory://bucket/photos"] and list(listing["size"]) == [11, 13]
    assert listing.attrs["passed_over"] == ["1 file (.txt 1)", "1 folder (@eaDir 1)"]
    assert rows(listing) == [b"birds/a.jpg", "cars/b é.jpg".encode()]
    memory.pipe_file("/bucket/photos/birds/a.jpg", b"birds/A.jpg")
    with pytest.raises(ImagesChangedError, match=r"birds/a.jpg had 11 bytes .* it is another one; run `grappa init`"):
        rows(listing)
    memory.rm("/bucket/photos/birds/a.jpg")
    with pytest.raises(ImagesChangedError, match="it has gone"):
        rows(listing)


def test_shards_and_tables_in_an_object_store(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    tar = write_tar(tmp_path / "0.tar", {"a/1.jpg": b"1" * 700, "a/2.jpg": b"2"}).read_bytes()
    parquet = write_images(tmp_path / "x.parquet", [b"3", b"4"], ["cat"], label=[0, 0]).read_bytes()
    for name, data in (("s/0.tar", tar), ("s/x.parquet", parquet), ("t/a.jpg", b"5")):
        memory.pipe_file(f"/bucket/{name}", data)
    memory.pipe_file("/bucket/t.csv", b"path,domain\nt/a.jpg,x\nmemory://bucket/t/a.jpg,y\n")
    listing = list_images(["memory://bucket/s"], layout="domain/class", loose_domain="loose")
    assert list(listing["path"]) == ["0.tar::a/1.jpg", "0.tar::a/2.jpg", "x.parquet::0", "x.parquet::1"]
    assert rows(listing) == [b"1" * 700, b"2", b"3", b"4"]
    table = list_images(["memory://bucket/t.csv"])
    assert rows(table) == [b"5", b"5"] and table.attrs["roots"] == ["memory://bucket", "memory://"]
    memory.pipe_file("/bucket/s/0.tar", tar)
    with pytest.raises(ImagesChangedError, match="its tar is another one"):
        rows(listing)


def test_a_folder_a_tar_and_a_parquet_file_over_http(server: Served) -> None:
    put(server, photos__birds__a_jpg=b"a", photos__cars__b_jpg=b"b")
    write_tar(server.folder / "0.tar", {f"a/{number}.jpg": bytes([number]) * 900 for number in range(5)})
    write_images(server.folder / "x.parquet", [b"3", b"4"])
    listing = list_images([f"{server.url}/photos"], layout="auto")
    assert listing[["path", "domain"]].to_numpy().tolist() == [["birds/a.jpg", "birds"], ["cars/b.jpg", "cars"]]
    assert rows(listing) == [b"a", b"b"]
    tar = list_images([f"{server.url}/0.tar"])
    assert rows(tar) == [bytes([number]) * 900 for number in range(5)]
    assert rows(list_images([f"{server.url}/x.parquet"], layout="flat")) == [b"3", b"4"]
    write_tar(server.folder / "0.tar", {"a/0.jpg": b"changed"})
    with pytest.raises(ImagesChangedError, match="its tar is another one"):
        rows(tar)


# ---------------------------------------------------------------- what goes wrong


def outcomes(server: Served, tmp_path: Path, *names: str) -> list[str]:
    lines = "".join(f"{server.url}/{name},d\n" for name in names)
    (tmp_path / "t.csv").write_text(f"path,domain\n{lines}")
    listing = list_images([tmp_path / "t.csv"])
    read = open_rows(listing, listing.attrs["roots"], max_pixels=10)
    found = []
    for row in range(len(listing)):
        try:
            found.append(read(row).decode())
        except RejectedFileError as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


def test_listing_a_table_of_urls_asks_for_nothing(server: Served, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(f"path,domain\n{server.url}/a.jpg,d\n")
    assert list(list_images([tmp_path / "t.csv"])["size"]) == [-2]
    assert server.asked == []


def test_what_does_not_come_is_a_reason_of_its_row(server: Served, tmp_path: Path) -> None:
    put(server, a_jpg=b"a", gone_jpg=b"x", half_jpg=b"half of it", locked_jpg=b"x", slow_jpg=b"x", worn_jpg=b"x")
    server.failing.update({"gone.jpg": 404, "half.jpg": "half", "locked.jpg": 403, "slow.jpg": "slow", "worn.jpg": 503})
    names = ("a.jpg", "gone.jpg", "half.jpg", "locked.jpg", "slow.jpg", "worn.jpg")
    whole, gone, half, locked, slow, worn = outcomes(server, tmp_path, *names)
    assert (whole, gone) == ("a", "RejectedFileError: missing")
    assert half == "UnansweredError: the answer ended before it was whole (3 tries)"
    assert locked.startswith("UnansweredError: not allowed (403") and "give credentials" in locked
    assert slow == "UnansweredError: no whole answer within 1 s (3 tries)"
    assert worn == "UnansweredError: the server answered 503 (3 tries)"


def test_a_host_that_never_answers_is_asked_no_more(
    server: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(urls, "PATIENCE", 2)
    server.failing[".jpg"] = 503
    put(server, **{f"{name}_jpg": b"x" for name in "abcd"})
    found = outcomes(server, tmp_path, "a.jpg", "b.jpg", "c.jpg", "d.jpg")
    assert found[:2] == ["UnansweredError: the server answered 503 (3 tries)"] * 2
    assert all("was not asked any more after 2 failures in a row" in reason for reason in found[2:])


def test_sources_that_cannot_be_listed_are_one_sentence(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    put(server, x_jpg=b"x")
    server.failing["locked"] = 403
    for source, sentence in {
        f"{server.url}/nowhere.tar": "no such folder or table",
        f"{server.url}/locked.csv": "not allowed",
        "memory://nowhere": "no such folder or table: memory://nowhere",
        "nosuch://x": "nosuch:// cannot be read: .*expected s3, gs, hf, https",
        "s3://bucket/images": "s3:// cannot be read: .*[Ii]nstall s3fs",
        "http://127.0.0.1:9/a.tar": "cannot read http://127.0.0.1:9/a.tar",
    }.items():
        if source.startswith("s3") and "s3fs" in sys.modules:
            continue
        server.failing["locked.csv"] = 403
        with pytest.raises(ImageTableError, match=sentence):
            list_images([source])
    monkeypatch.setattr(urls, "is_installed", lambda _: False)
    urls._system.cache_clear()
    with pytest.raises(ImageTableError, match=r"the package fsspec is missing; install it by .*\[remote\]"):
        list_images(["s3://bucket/images"])


def test_a_path_that_ate_a_slash_is_the_url_that_was_meant() -> None:
    assert urls.as_source(Path("s3://bucket/x")) == "s3://bucket/x"
    assert urls.as_source("file:///tmp/x") == Path("/tmp/x")
    assert isinstance(UnansweredError("x"), RejectedFileError)


def test_what_is_secret_in_a_url_is_not_said() -> None:
    with pytest.raises(ImageTableError) as error:
        list_images(["http://user:secret@127.0.0.1:9/images?token=abc"])
    assert "127.0.0.1:9/images" in str(error.value)
    assert "secret" not in str(error.value) and "token" not in str(error.value)
    assert bare("s3://bucket/a?versionId=1") == "s3://bucket/a" and bare("https://a:b@host/x") == "https://host/x"


@pytest.mark.parametrize("url", ["dir://x", "zip://x"])
def test_a_url_that_needs_more_than_itself_is_one_sentence(url: str) -> None:
    with pytest.raises(ImageTableError, match=f"{url.partition(':')[0]}://"):
        list_images([url])


def test_refusals_do_not_give_a_host_up_and_an_outage_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = urls._Hosts()
    for _ in range(urls.PATIENCE):
        hosts.count("https://h", failed=True)
    assert hosts.gone("https://h")
    monkeypatch.setattr(urls, "_REST", 0.0)
    assert not hosts.gone("https://h")
    refused = OSError("no")
    refused.status = 403  # type: ignore[attr-defined]
    assert urls._has_answered(refused) and not urls._has_answered(OSError("no route"))


def test_a_read_that_fails_once_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urls, "_PAUSE", 0.0)
    file = (tmp_path / "a.bin").open("w+b")
    file.write(b"0123456789")
    file.seek(2)
    failures = [OSError("reset"), OSError("reset")]

    class Shaky:
        tell, seek, close = file.tell, file.seek, file.close

        def read(self, size: int) -> bytes:
            part = file.read(size)
            if failures:
                raise failures.pop()
            return part

    opened = urls._Steady("https://steady/a.bin", Shaky())  # type: ignore[arg-type]
    assert opened.read(3) == b"234" and opened.tell() == 5
    failures += [OSError("reset")] * urls.TRIES
    with pytest.raises(urls.NoAnswerError, match="reset"):
        opened.read(3)
