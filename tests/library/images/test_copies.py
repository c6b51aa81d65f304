"""Copies of files: how many contents differ, and that little is read for it."""

from __future__ import annotations

import builtins
import io
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grappa.images.copies import count_distinct_files
from grappa.images.table import list_images

LONG = bytes(range(256)) * 64


def count(root: Path, **options: Any) -> int:
    listing = list_images([root])
    return count_distinct_files(listing, listing.attrs["roots"], **options)


def put(root: Path, *contents: bytes) -> Path:
    (root / "d").mkdir(parents=True, exist_ok=True)
    for number, content in enumerate(contents):
        (root / "d" / f"{number:03d}.jpg").write_bytes(content)
    return root


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that were opened."""
    names: list[str] = []
    real: Callable[..., Any] = builtins.open

    def noting(file: str, *arguments: Any, **options: Any) -> Any:
        names.append(str(file))
        return real(file, *arguments, **options)

    monkeypatch.setattr(builtins, "open", noting)
    return names


def test_contents_are_counted_not_names(tmp_path: Path) -> None:
    put(tmp_path, b"a", b"b", b"a", b"a", b"cc", b"", b"", LONG, LONG, LONG[::-1])
    assert count(tmp_path) == 6


@pytest.mark.parametrize("place", [0, 5000, -1])
def test_one_byte_makes_another_content(tmp_path: Path, place: int) -> None:
    changed = bytearray(LONG)
    changed[place] ^= 1
    assert count(put(tmp_path, LONG, LONG, bytes(changed))) == 2


def test_missing_files_have_no_content_and_unreadable_ones_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, b"a", b"a", b"a")
    (tmp_path / "d" / "gone.jpg").symlink_to("nowhere")
    assert count(tmp_path) == 1

    def refuse(file: str, *arguments: Any, **options: Any) -> Any:
        raise PermissionError(file)

    monkeypatch.setattr(builtins, "open", refuse)
    assert count(tmp_path) == 3


def test_only_files_of_one_size_are_opened(tmp_path: Path, opened: list[str]) -> None:
    put(tmp_path, *(b"x" * number for number in range(1, 30)), b"yy")
    opened.clear()
    assert count(tmp_path) == 30
    assert sorted(Path(name).name for name in opened) == ["001.jpg", "029.jpg"]
    opened.clear()
    assert count(tmp_path, enough=29) == 29
    assert opened == []


def put_tar(root: Path, *contents: bytes) -> Path:
    (root / "d").mkdir()
    with tarfile.open(root / "d" / "0.tar", "w") as archive:
        for number, content in enumerate(contents):
            member = tarfile.TarInfo(f"{number:05d}.jpg")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return root


def test_a_tar_is_opened_once_for_its_images(tmp_path: Path, opened: list[str]) -> None:
    listing = list_images([put_tar(tmp_path, *(bytes([number, 7]) for number in range(50)), b"\0\7")])
    opened.clear()
    assert count_distinct_files(listing, listing.attrs["roots"]) == 50
    assert len(opened) == 2  # for the ends of all, and for the two contents that may be equal


def test_memory_does_not_hold_what_is_read(tmp_path: Path) -> None:
    images = [number.to_bytes(4, "big") * 1024 for number in range(2000)]  # 8 MB
    listing = list_images([put_tar(tmp_path, *images)])
    tracemalloc.start()
    try:
        assert count_distinct_files(listing, listing.attrs["roots"]) == 2000
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()
