"""Listing images: which files a run uses, with the domain, label, split and box that are given for them.

A source is a folder, whose layout says what its folders mean (see ``grappa.images.folders``), or a CSV or Parquet
table, which :func:`read_table` reads and checks. Listing opens no image: decoding finds out later which files cannot be
used, and reports their reasons.

A file name may hold bytes that are not UTF-8; paths stand in tables percent-escaped, see :func:`escape_path`.
"""

from __future__ import annotations

import csv
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

import pandas as pd

from grappa.core.arrays import Box
from grappa.core.names import MEAN
from grappa.images.folders import Found, find_files, passed_over, place, recognize
from grappa.images.paths import (
    MISSING,
    ImageTableError,
    escape_path,
    image_file,
    show,
    size_of,
    unescape_path,
)

__all__ = [
    "BOX_COLUMNS",
    "MISSING",
    "ImageTableError",
    "TableRow",
    "escape_path",
    "image_file",
    "list_images",
    "read_table",
    "unescape_path",
]

BOX_COLUMNS = ("box_x0", "box_y0", "box_x1", "box_y1")
_COLUMNS = ("path", "domain", "label", "split", *BOX_COLUMNS)
_SPLITS = ("train", "test")
_NO_BOX = (float("nan"),) * 4
_SEPARATORS = (",", ";", "\t")
_ENCODINGS = {b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
_WHOLE_FLOAT = re.compile(r"(-?\d+)\.0")
_EXACT_FLOATS = 2**53  # whole numbers below it are told apart as floats
# Why a path that a table names may lead nowhere, by what it looks like.
_HINTS = {
    r"[A-Za-z][A-Za-z0-9+.-]+:/": "it is a URL: fetch the file, and give its path",
    r"[A-Za-z]:[\\/]": "it begins with a drive letter: give the path on this machine",
    r"~": "`~` is not expanded: write the home folder out",
    r".*\\": "it has backslashes: write / between folders",
    r"\s|.*\s$": "it begins or ends with a blank: remove it",
}

_LARGEST = 2**31 - 1  # Thrift counts in 32 bits

Cells = list[str | None]


class _Listed(NamedTuple):
    """A file; ``written`` is its path as a table or a folder names it."""

    root: str
    path: str
    domain: str
    label: str | None
    split: str | None
    box: Box
    size: int
    written: str


def list_images(
    sources: Sequence[Path],
    *,
    domains: Sequence[tuple[str, Path]] = (),
    layout: str = "domain/class",
    loose_domain: str | None = None,
) -> pd.DataFrame:
    """List the files of all sources, one row a file, sorted by (domain, path, root).

    In folders hidden files and folders are skipped, links are followed, and what is evidently no image is passed over
    (``grappa.images.folders.find_files``). A table (``.csv``, ``.tsv``, ``.parquet``) has the columns ``path``
    (relative to the table's folder, or absolute), ``domain`` and optionally ``label``, ``split``, ``box_x0, box_y0,
    box_x1, box_y1``; other columns are ignored, every CSV cell is text, an empty cell is "not given".

    Args:
        sources: folders and tables.
        domains: further folders, each with the domain of all its images; a first level of folders is the label.
        layout: what the folders of ``sources`` mean, one of ``grappa.images.folders.LAYOUTS``, or ``auto``: for each
            source what :func:`recognize` says.
        loose_domain: the domain of files directly in a source folder; None: such files are refused where a domain is
            expected.

    Returns:
        columns ``path`` (relative to its root, "/" between folders, escaped), ``root`` (int64, number in
        ``attrs["roots"]``), ``domain``, ``label`` and ``split`` (object: str or None), ``box_*`` (float64 pixels of the
        EXIF-oriented original, NaN = none), ``size`` (int64 bytes, -1 = not there). ``attrs``: ``roots``, the absolute
        folders (str, escaped); ``layouts``, the layout recognised in each folder; ``passed_over``, what was
        passed over, in words; ``missing``, a sentence about listed files that are not there, or "".

    Raises:
        ImageTableError: nothing given or found, a file that has no place in the layout, a table that breaks a rule, or
            the same file twice.
    """
    if not sources and not domains:
        raise ImageTableError("no images given: name at least one folder or table")
    found: list[Found] = []
    layouts: dict[str, str] = {}
    listed: list[_Listed] = []
    for source in map(Path, sources):
        if source.is_dir():
            found.append(_found(source))
            root = show(os.path.abspath(source))
            if layout == "auto":
                layouts[root] = recognize(_paths(found[-1]))
            listed += _in_folder(source, found[-1], layouts.get(root, layout), loose_domain)
        else:
            listed += _list_table(source)
    for domain, folder in domains:
        found.append(_found(Path(folder)))
        inner = "split/class" if recognize(_paths(found[-1])).startswith("split") else "class"
        listed += _in_folder(Path(folder), found[-1], inner, domain)
    _refuse_repeats(listed)
    frame = _frame(listed)
    frame.attrs.update(layouts=layouts, passed_over=list(passed_over(found)), missing=_missing(listed))
    return frame


# ---------------------------------------------------------------- folders


def _found(folder: Path) -> Found:
    if not folder.is_dir():
        raise ImageTableError(f"no such folder: {show(folder)}")
    found = find_files(os.path.abspath(folder))
    if not found.files:
        passed = ", ".join(passed_over([found]))
        but = f" but what is no image: {passed}" if passed else ""
        raise ImageTableError(
            f"the folder {show(folder)} holds no files{but}; expected DOMAIN/CLASS/image, CLASS/image or images"
        )
    return found


def _paths(found: Found) -> list[str]:
    return [path for path, _ in found.files]


def _in_folder(folder: Path, found: Found, layout: str, domain: str | None) -> Iterator[_Listed]:
    root = os.path.abspath(folder)
    for path, size in found.files:
        meaning = place(layout, root, path, domain)
        yield _Listed(root, path, *meaning, _NO_BOX, size, path)


# ---------------------------------------------------------------- rows of a table


def _list_table(source: Path) -> Iterator[_Listed]:
    if not source.exists():
        raise ImageTableError(f"no such folder or table: {show(source)}")
    folder = os.path.abspath(source.parent)
    rows = read_table(source)
    if not rows:
        raise ImageTableError(f"the table {show(source)} has no rows: expected one row an image")
    for row in rows:
        root, path = ("/", row.path.lstrip("/")) if row.path.startswith("/") else (folder, row.path)
        path = os.path.normpath(path)
        size = size_of(os.path.join(root, path))
        yield _Listed(root, path, row.domain, row.label, row.split, row.box, size, row.path)


# ---------------------------------------------------------------- folders and tables alike


def _missing(listed: Sequence[_Listed]) -> str:
    """Return a sentence about the listed files that are not there, with the likely reason; "" where all are there."""
    gone = [row.written for row in listed if row.size == MISSING]
    if not gone:
        return ""
    hint = next((hint for look, hint in _HINTS.items() if re.match(look, gone[0])), "")
    first = f"first {show(gone[0])!r}" + (f" ({hint})" if hint else "")
    return f"{len(gone)} of {len(listed)} files are missing, {first}"


def _refuse_repeats(listed: Iterable[_Listed]) -> None:
    """The same file twice would be its own nearest neighbor; two copies of its bytes are allowed and reported."""
    real = {root: os.path.realpath(root) for root in {row.root for row in listed}}
    seen: set[str] = set()
    for row in listed:
        file = os.path.normpath(os.path.join(real[row.root], row.path))
        if file in seen:
            raise ImageTableError(f"the file {show(file)} is listed twice: name every file once, in one domain")
        if row.domain == MEAN:
            raise ImageTableError(f"a domain is named `{MEAN}`, which is the result tables' row of means: rename it")
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


# ---------------------------------------------------------------- reading a table


class TableRow(NamedTuple):
    """One checked row: ``path`` as written, ``box`` in pixels or four NaN."""

    path: str
    domain: str
    label: str | None
    split: str | None
    box: Box


def read_table(table: Path) -> list[TableRow]:
    """Read and check a table; cells are text, an empty cell (CSV) or a null (Parquet) is "not given".

    Raises:
        ImageTableError: neither .csv (.tsv) nor .parquet, unreadable, no ``path`` or ``domain`` column, or a row that
            breaks a rule: which one, and its number (from 1, the header not counted).
    """
    readers = {".csv": _read_csv, ".tsv": _read_csv, ".parquet": _read_parquet}
    if table.suffix.lower() not in readers:
        raise ImageTableError(f"{show(table)} is neither a folder nor a table: expected a name in .csv or .parquet")
    columns = readers[table.suffix.lower()](table)
    num_rows = len(columns["path"])
    cells = [columns.get(name, [None] * num_rows) for name in _COLUMNS]
    return [_check(f"{show(table)}, row {number}", row) for number, row in enumerate(zip(*cells, strict=True), start=1)]


def _check_columns(table: Path, found: Sequence[str]) -> list[str]:
    for name in ("path", "domain"):
        if name not in found:
            raise ImageTableError(
                f"{show(table)} has no column `{name}`: found {', '.join(found)}; expected path, domain"
            )
    for name in _COLUMNS:
        if found.count(name) > 1:
            raise ImageTableError(f"{show(table)} has the column `{name}` twice: keep one")
    num_box = sum(name in found for name in BOX_COLUMNS)
    if num_box not in (0, 4):
        raise ImageTableError(f"{show(table)} has {num_box} of the columns {', '.join(BOX_COLUMNS)}: give all or none")
    return [name for name in _COLUMNS if name in found]


def _read_csv(table: Path) -> dict[str, Cells]:
    try:
        with _cells_of_any_size(table), _open_text(table) as file:
            separator = _separator(file.readline())
            file.seek(0)
            lines = [line for line in csv.reader(file, delimiter=separator, strict=True) if line]
    except (OSError, UnicodeError, csv.Error) as error:
        raise ImageTableError(f"cannot read the table {show(table)}: {error}") from error
    if not lines:
        raise ImageTableError(f"the table {show(table)} is empty: expected a header with path, domain")
    header, rows = [name.strip() for name in lines[0]], lines[1:]
    for number, row in enumerate(rows, start=1):
        if len(row) != len(header):
            raise ImageTableError(
                f"{show(table)}, row {number} has {len(row)} cells, the header {len(header)}: quote cells that hold "
                f"{separator!r}"
            )
    names = _check_columns(table, header)
    columns = {name: [row[header.index(name)] or None for row in rows] for name in names}
    return columns | {name: _whole_numbers(columns[name]) for name in names if name == "label"}


def _open_text(table: Path) -> IO[str]:
    """Open a text file in UTF-8, or in UTF-16 or UTF-32 as its first bytes say."""
    with open(table, "rb") as file:
        start = file.read(4096)
    encoding = next((name for mark, name in _ENCODINGS.items() if start.startswith(mark)), None)
    if encoding is None and b"\0" in start:
        raise ImageTableError(f"{show(table)} is no UTF-8 text, it holds NUL bytes: save it as CSV in UTF-8")
    if encoding:
        return open(table, encoding=encoding, newline="")
    return open(table, encoding="utf-8-sig", errors="surrogateescape", newline="")


def _separator(header: str) -> str:
    """Return what parts the cells of a table: the character by which its header has the columns path and domain."""
    for separator in _SEPARATORS:
        names = {name.strip() for name in next(csv.reader([header], delimiter=separator), [])}
        if names >= {"path", "domain"}:
            return separator
    return _SEPARATORS[0]


def _whole_numbers(cells: Cells) -> Cells:
    """Return integers that pandas wrote as floats (a column with gaps) as integers; any other column as it is."""
    found = [None if cell is None else _WHOLE_FLOAT.fullmatch(cell) for cell in cells]
    if any(match is None and cell is not None for match, cell in zip(found, cells, strict=True)):
        return cells
    return [None if match is None else match[1] for match in found]


@contextmanager
def _cells_of_any_size(table: Path) -> Iterator[None]:
    """Let a cell be as large as its file: a column that is not read may hold captions or vectors."""
    former = csv.field_size_limit()
    csv.field_size_limit(max(former, os.stat(table).st_size))
    try:
        yield
    finally:
        csv.field_size_limit(former)


def _read_parquet(table: Path) -> dict[str, Cells]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # Its file is the limit of what lies in a header: a table may have millions of row groups, or long texts.
        file = pq.ParquetFile(table, thrift_string_size_limit=_LARGEST, thrift_container_size_limit=_LARGEST)
        names = _check_columns(table, file.schema_arrow.names)
        content = file.read(columns=names)
    except (OSError, pa.ArrowException) as error:
        raise ImageTableError(f"cannot read the table {show(table)}: {error}") from error
    return {name: [_as_text(table, name, value) for value in content[name].to_pylist()] for name in names}


def _as_text(table: Path, column: str, value: object) -> str | None:
    if value is None or value == "":
        return None
    if column == "label" and isinstance(value, float):  # what pandas makes of integers with gaps
        if math.isnan(value):
            return None
        if value.is_integer() and abs(value) < _EXACT_FLOATS:
            return str(int(value))
        raise ImageTableError(f"{show(table)}: column `label` holds {value!r}: expected text or whole numbers")
    number_allowed = (int, float) if column in BOX_COLUMNS else (int,)
    if isinstance(value, str) or (isinstance(value, number_allowed) and not isinstance(value, bool)):
        return str(value)
    raise ImageTableError(f"{show(table)}: column `{column}` holds {type(value).__name__} values: expected text")


def _check(where: str, row: tuple[str | None, ...]) -> TableRow:
    path, domain, label, split = row[:4]
    if path is None or domain is None:
        raise ImageTableError(f"{where} has no {'path' if path is None else 'domain'}: every row needs both")
    if "\0" in path:
        raise ImageTableError(f"{where}: the path holds a NUL character, which no file name has")
    if split is not None and split not in _SPLITS:
        raise ImageTableError(f"{where}: split is {split!r}: expected train, test or nothing")
    return TableRow(path, domain, label, split, _box(where, row[4:]))


def _box(where: str, cells: tuple[str | None, ...]) -> Box:
    x0, y0, x1, y1 = (_number(where, name, cell) for name, cell in zip(BOX_COLUMNS, cells, strict=True))
    box = (x0, y0, x1, y1)
    if all(math.isnan(value) for value in box):
        return box
    if any(math.isnan(value) for value in box):
        raise ImageTableError(f"{where} has half a box {box}: give all of {', '.join(BOX_COLUMNS)} or none")
    if not (x0 < x1 and y0 < y1):
        raise ImageTableError(f"{where}: the box {box} is empty: expected box_x0 < box_x1 and box_y0 < box_y1")
    return box


def _number(where: str, name: str, cell: str | None) -> float:
    try:
        value = math.nan if cell is None else float(cell)
    except ValueError:
        value = math.inf
    if math.isinf(value):
        raise ImageTableError(f"{where}: {name} is {cell!r}: expected a number of pixels")
    return value
