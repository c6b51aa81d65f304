"""The image table: which files a run is about, where they come from, what is said of them.

A source is a folder ``DOMAIN/[CLASS/...]file`` or a CSV or Parquet table. Listing opens no image: whether a file can be
decoded is found out later, and a file that cannot be is reported there with its reason.

Text that a file system allows and UTF-8 does not (undecodable bytes) is held percent-escaped, see :func:`escape_path`.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from grappa.path_text import escape_path
from grappa.table_files import BOX_COLUMNS, ImageTableError, read_table

__all__ = ["BOX_COLUMNS", "MISSING", "ImageTableError", "list_images"]

MISSING = -1  # the size of a listed file that is not there, or is not a regular file


class _Listed(NamedTuple):
    root: str
    path: str
    domain: str
    label: str | None
    split: str | None
    box: tuple[float, float, float, float]
    size: int


_NO_BOX = (float("nan"),) * 4


def list_images(sources: Sequence[Path], *, loose_domain: str | None = None) -> pd.DataFrame:
    """List the files of all sources, one row a file, sorted by (domain, path, root).

    A folder's first level is the domain, its second the label; hidden files and folders are skipped, links followed,
    every other regular file is listed. A table (``.csv``, ``.parquet``) has the columns ``path`` (relative to the
    table's folder, or absolute), ``domain`` and optionally ``label``, ``split``, ``box_x0, box_y0, box_x1, box_y1``;
    other columns are ignored, every CSV cell is text, an empty cell is "not given". ``loose_domain`` is the domain of
    files directly in a source folder; None: such files are refused.

    Returns:
        columns ``path`` (relative to its root, "/" between folders, escaped), ``root`` (int64, number in
        ``attrs["roots"]``), ``domain``, ``label`` and ``split`` (object: str or None), ``box_*`` (float64 pixels of the
        EXIF-oriented original, NaN = none), ``size`` (int64 bytes, -1 = not there). ``attrs["roots"]``: absolute
        folders (str, escaped).

    Raises:
        ImageTableError: nothing given or found, a file outside a domain folder, a table that breaks a rule, or the
            same file twice.
    """
    if not sources:
        raise ImageTableError("no images given: name at least one folder or table")
    listed = [row for source in sources for row in _list_source(Path(source), loose_domain)]
    _refuse_repeats(listed)
    return _frame(listed)


def _list_source(source: Path, loose_domain: str | None) -> list[_Listed]:
    if source.is_dir():
        return _list_folder(source, loose_domain)
    if not source.exists():
        raise ImageTableError(f"no such folder or table: {_show(source)}")
    return list(_list_table(source))


# ---------------------------------------------------------------- folders


def _list_folder(source: Path, loose_domain: str | None) -> list[_Listed]:
    root = os.path.abspath(source)
    listed = [_from_folder(root, path, size, loose_domain) for path, size in _walk(root, "", ())]
    if not listed:
        raise ImageTableError(f"the folder {_show(source)} holds no files: expected DOMAIN/image or DOMAIN/CLASS/image")
    return listed


def _walk(root: str, folder: str, above: tuple[tuple[int, int], ...]) -> Iterator[tuple[str, int]]:
    """Yield (relative path, size) of every visible regular file; ``above``: folders we are in, to end link loops."""
    here = os.path.join(root, folder)
    try:
        status = os.stat(here)
        entries = sorted(os.scandir(here), key=lambda entry: entry.name)
    except OSError as error:
        raise ImageTableError(f"cannot read the folder {_show(here)}: {error.strerror}; make it readable") from error
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        return
    for entry in entries:
        path = os.path.join(folder, entry.name)
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _walk(root, path, (*above, identity))
        elif entry.is_file() or entry.is_symlink():
            yield path, _size(entry.path)


def _from_folder(root: str, path: str, size: int, loose_domain: str | None) -> _Listed:
    parts = path.split("/")
    if len(parts) == 1 and loose_domain is not None:
        return _Listed(root, path, loose_domain, None, None, _NO_BOX, size)
    if len(parts) == 1:
        raise ImageTableError(
            f"{_show(path)} lies directly in {_show(root)}: expected DOMAIN/image; move it into a folder "
            "named after its domain, or give a table"
        )
    label = parts[1] if len(parts) > 2 else None
    return _Listed(root, path, parts[0], label, None, _NO_BOX, size)


# ---------------------------------------------------------------- tables


def _list_table(source: Path) -> Iterator[_Listed]:
    folder = os.path.abspath(source.parent)
    rows = read_table(source)
    if not rows:
        raise ImageTableError(f"the table {_show(source)} has no rows: expected one row an image")
    for row in rows:
        root, path = ("/", row.path.lstrip("/")) if row.path.startswith("/") else (folder, row.path)
        path = os.path.normpath(path)
        yield _Listed(root, path, row.domain, row.label, row.split, row.box, _size(os.path.join(root, path)))


# ---------------------------------------------------------------- both


def _size(file: str) -> int:
    try:
        status = os.stat(file)
    except OSError:
        return MISSING
    return status.st_size if stat.S_ISREG(status.st_mode) else MISSING


def _refuse_repeats(listed: Iterable[_Listed]) -> None:
    """The same file twice would be its own nearest neighbor; two copies of its bytes are allowed and reported."""
    real = {root: os.path.realpath(root) for root in {row.root for row in listed}}
    seen: set[str] = set()
    for row in listed:
        file = os.path.normpath(os.path.join(real[row.root], row.path))
        if file in seen:
            raise ImageTableError(f"the file {_show(file)} is listed twice: name every file once, in one domain")
        if row.domain == "_mean":
            raise ImageTableError("a domain is named `_mean`, which is the result tables' row of means: rename it")
        seen.add(file)


def _frame(listed: list[_Listed]) -> pd.DataFrame:
    roots = list(dict.fromkeys(row.root for row in listed))
    number = {root: position for position, root in enumerate(roots)}
    rows = [row._replace(path=escape_path(row.path), domain=escape_path(row.domain)) for row in listed]
    rows.sort(key=lambda row: (row.domain, row.path, number[row.root]))
    boxes = {name: pd.Series([row.box[i] for row in rows], dtype="float64") for i, name in enumerate(BOX_COLUMNS)}
    frame = pd.DataFrame(
        {
            "path": pd.Series([row.path for row in rows], dtype="str"),
            "root": pd.Series([number[row.root] for row in rows], dtype="int64"),
            "domain": pd.Series([row.domain for row in rows], dtype="str"),
            "label": pd.Series([None if row.label is None else escape_path(row.label) for row in rows], dtype="object"),
            "split": pd.Series([row.split for row in rows], dtype="object"),
            **boxes,
            "size": pd.Series([row.size for row in rows], dtype="int64"),
        }
    )
    frame.attrs["roots"] = [escape_path(root) for root in roots]
    return frame


def _show(path: str | Path) -> str:
    return escape_path(str(path))
