"""Copies of files: how many contents differ, and that little is read for it."""

from __future__ import annotations

import builtins
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
