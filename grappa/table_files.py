"""Reading an image table from CSV or Parquet, everything explicit: no guessed types, no guessed missing values."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from grappa.path_text import escape_path

BOX_COLUMNS = ("box_x0", "box_y0", "box_x1", "box_y1")
_COLUMNS = ("path", "domain", "label", "split", *BOX_COLUMNS)
_SPLITS = ("train", "test")

Box = tuple[float, float, float, float]
Cells = list[str | None]


class ImageTableError(ValueError):
    """The listed images or the table that lists them break a rule; the message says which, and what to do."""


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
        with open(table, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
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


def _read_parquet(table: Path) -> dict[str, Cells]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        names = _check_columns(table, pq.read_schema(table).names)
        content = pq.read_table(table, columns=names)
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


def _show(path: Path) -> str:
    return escape_path(str(path))
