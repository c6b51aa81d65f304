"""Listing images: which files a run uses, with the domain, label, split and box that are given for them.

A source is a folder ``DOMAIN/[CLASS/...]file``, or a CSV or Parquet table, which :func:`read_table` reads and checks.
Listing opens no image: decoding finds out later which files cannot be used, and reports their reasons.

A file name may hold bytes that are not UTF-8; paths stand in tables percent-escaped, see :func:`escape_path`.
"""

from __future__ import annotations

import csv
import math
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from grappa.core.arrays import Box
from grappa.core.names import MEAN

BOX_COLUMNS = ("box_x0", "box_y0", "box_x1", "box_y1")
MISSING = -1  # the size of a listed file that is not there, or is not a regular file
_COLUMNS = ("path", "domain", "label", "split", *BOX_COLUMNS)
_SPLITS = ("train", "test")
_NO_BOX = (float("nan"),) * 4
# What the escape produces: an undecodable byte (80-FF), or the percent sign of a text that looks like an escape.
_ESCAPED = re.compile(r"%(25|[89A-F][0-9A-F])")
_TO_ESCAPE = re.compile(r"%(?=25|[89A-F][0-9A-F])|[\udc80-\udcff]")

_LARGEST = 2**31 - 1  # Thrift counts in 32 bits

Cells = list[str | None]


class ImageTableError(ValueError):
    """The listed images or the table that lists them break a rule; the message says which rule, and what to do."""


class _Listed(NamedTuple):
    root: str
    path: str
    domain: str
    label: str | None
    split: str | None
    box: Box
    size: int


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


# ---------------------------------------------------------------- rows of a table


def _list_table(source: Path) -> Iterator[_Listed]:
    folder = os.path.abspath(source.parent)
    rows = read_table(source)
    if not rows:
        raise ImageTableError(f"the table {_show(source)} has no rows: expected one row an image")
    for row in rows:
        root, path = ("/", row.path.lstrip("/")) if row.path.startswith("/") else (folder, row.path)
        path = os.path.normpath(path)
        yield _Listed(root, path, row.domain, row.label, row.split, row.box, _size(os.path.join(root, path)))


# ---------------------------------------------------------------- folders and tables alike


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


def _show(path: str | Path) -> str:
    return escape_path(str(path))


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
        ImageTableError: neither .csv nor .parquet, unreadable, no ``path`` or ``domain`` column, or a row that breaks a
            rule: which one, and its number (from 1, the header not counted).
    """
    readers = {".csv": _read_csv, ".parquet": _read_parquet}
    if table.suffix.lower() not in readers:
        raise ImageTableError(f"{_show(table)} is neither a folder nor a table: expected a name in .csv or .parquet")
    columns = readers[table.suffix.lower()](table)
    num_rows = len(columns["path"])
    cells = [columns.get(name, [None] * num_rows) for name in _COLUMNS]
    return [
        _check(f"{_show(table)}, row {number}", row) for number, row in enumerate(zip(*cells, strict=True), start=1)
    ]


def _check_columns(table: Path, found: Sequence[str]) -> list[str]:
    for name in ("path", "domain"):
        if name not in found:
            raise ImageTableError(
                f"{_show(table)} has no column `{name}`: found {', '.join(found)}; expected path, domain"
            )
    for name in _COLUMNS:
        if found.count(name) > 1:
            raise ImageTableError(f"{_show(table)} has the column `{name}` twice: keep one")
    num_box = sum(name in found for name in BOX_COLUMNS)
    if num_box not in (0, 4):
        raise ImageTableError(f"{_show(table)} has {num_box} of the columns {', '.join(BOX_COLUMNS)}: give all or none")
    return [name for name in _COLUMNS if name in found]


def _read_csv(table: Path) -> dict[str, Cells]:
    try:
        with (
            _cells_of_any_size(table),
            open(table, encoding="utf-8-sig", errors="surrogateescape", newline="") as file,
        ):
            lines = [line for line in csv.reader(file, strict=True) if line]
    except (OSError, csv.Error) as error:
        raise ImageTableError(f"cannot read the table {_show(table)}: {error}") from error
    if not lines:
        raise ImageTableError(f"the table {_show(table)} is empty: expected a header with path, domain")
    header, rows = lines[0], lines[1:]
    for number, row in enumerate(rows, start=1):
        if len(row) != len(header):
            raise ImageTableError(
                f"{_show(table)}, row {number} has {len(row)} cells, the header {len(header)}: quote cells with commas"
            )
    names = _check_columns(table, header)
    return {name: [row[header.index(name)] or None for row in rows] for name in names}


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
        raise ImageTableError(f"cannot read the table {_show(table)}: {error}") from error
    return {name: [_as_text(table, name, value) for value in content[name].to_pylist()] for name in names}


def _as_text(table: Path, column: str, value: object) -> str | None:
    if value is None or value == "":
        return None
    number_allowed = (int, float) if column in BOX_COLUMNS else (int,)
    if isinstance(value, str) or (isinstance(value, number_allowed) and not isinstance(value, bool)):
        return str(value)
    raise ImageTableError(f"{_show(table)}: column `{column}` holds {type(value).__name__} values: expected text")


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


# ---------------------------------------------------------------- paths as text


def escape_path(path: str) -> str:
    """Return ``path`` with each undecodable byte as ``%XX``; names that are proper UTF-8 stay as they are.

    Only a percent sign in front of ``25`` or of two digits ``80``-``FF`` becomes ``%25``, so that
    ``unescape_path(escape_path(path)) == path`` for every path of the file system (``os.fsdecode`` form).
    """
    return _TO_ESCAPE.sub(lambda found: f"%{ord(found[0]) & 0xFF:02X}", path)


def unescape_path(text: str) -> str:
    """Return the path (``os.fsdecode`` form, what ``open`` takes) whose escaped text is ``text``."""
    return _ESCAPED.sub(lambda found: _character(int(found[1], 16)), text)


def image_file(root: str, path: str) -> str:
    """Return the file to open for an image table's escaped ``root`` and ``path``."""
    return os.path.join(unescape_path(root), unescape_path(path))


def _character(byte: int) -> str:
    return "%" if byte == 0x25 else chr(0xDC00 + byte)
