"""Reading a table (CSV, TSV, Parquet) that names images by their paths: every cell checked, the first bad row named."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from grappa.core.arrays import Box
from grappa.images.paths import ImageTableError, show, tell
from grappa.images.sources.columns import BLOCK, BOX_COLUMNS, TEXT, blocks, escaped
from grappa.images.sources.urls import is_url, read_url

_COLUMNS = ("path", "domain", "label", "split", *BOX_COLUMNS)
_SPLITS = ("train", "test")
_SEPARATORS = (",", ";", "\t")
_ENCODINGS = {b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
_WHOLE_FLOAT = r"^-?\d+\.0$"
_EXACT_FLOATS = 2**53  # whole numbers below it are told apart as floats
LARGEST_HEADER = 2**31 - 1  # Thrift counts in 32 bits

Source = Path | str
Columns = dict[str, pa.ChunkedArray]


def read_table(table: Source) -> pa.Table:
    """Read and check a table; cells are text, an empty cell (CSV) or a null (Parquet) is "not given".

    Returns:
        columns path, domain, label and split (text, escaped; null: not given) and box_* (float64 pixels, NaN: none);
        label, split and box_* only where the table has them.

    Raises:
        ImageTableError: neither .csv (.tsv) nor .parquet, unreadable, no ``path`` or ``domain`` column, or a row that
            breaks a rule: which one, and its number (from 1, the header not counted).
    """
    readers = {".csv": _read_csv, ".tsv": _read_csv, ".parquet": _read_parquet}
    suffix = os.path.splitext(str(table))[1].lower()
    if suffix not in readers:
        raise ImageTableError(
            f"{tell(table)} is neither a folder nor a table: expected a name in .csv, .parquet or .tar"
        )
    columns = readers[suffix](table)
    _check(show(table), columns)
    numbers = {name: pa.array(_numbers(columns[name])) for name in BOX_COLUMNS if name in columns}
    return pa.table({**columns, **numbers})


def _check_columns(table: Source, found: Sequence[str]) -> list[str]:
    for name in ("path", "domain"):
        if name not in found:
            raise ImageTableError(
                f"{tell(table)} has no column `{name}`: found {', '.join(found)}; expected path, domain"
            )
    for name in _COLUMNS:
        if found.count(name) > 1:
            raise ImageTableError(f"{tell(table)} has the column `{name}` twice: keep one")
    num_box = sum(name in found for name in BOX_COLUMNS)
    if num_box not in (0, 4):
        raise ImageTableError(f"{tell(table)} has {num_box} of the columns {', '.join(BOX_COLUMNS)}: give all or none")
    return [name for name in _COLUMNS if name in found]


# ---------------------------------------------------------------- CSV


def _read_csv(table: Source) -> Columns:
    try:
        with _cells_of_any_size(), _open_text(table) as file:
            separator = _separator(file.readline())
            file.seek(0)
            lines = (line for line in csv.reader(file, delimiter=separator, strict=True) if line)
            header = next(lines, None)
            if header is None:
                raise ImageTableError(f"the table {tell(table)} is empty: expected a header with path, domain")
            columns = _cells(table, [name.strip() for name in header], lines, separator)
    except (OSError, UnicodeError, csv.Error) as error:
        raise ImageTableError(f"cannot read the table {tell(table)}: {error}") from error
    return columns | {name: _whole_numbers(columns[name]) for name in columns if name == "label"}


def _cells(table: Source, header: list[str], lines: Iterator[list[str]], separator: str) -> Columns:
    """Return the known columns of the lines, a block of lines at a time."""
    parts: list[list[pa.Array]] = []
    names: list[str] = []
    done = 0
    while block := list(islice(lines, BLOCK)):
        odd = next((at for at, line in enumerate(block) if len(line) != len(header)), None)
        if odd is not None:
            raise ImageTableError(
                f"{tell(table)}, row {done + odd + 1} has {len(block[odd])} cells, the header {len(header)}: quote "
                f"cells that hold {separator!r}"
            )
        names = names or _check_columns(table, header)
        parts.append([escaped([line[header.index(name)] or None for line in block]) for name in names])
        done += len(block)
    names = names or _check_columns(table, header)
    return {name: pa.chunked_array([part[i] for part in parts], TEXT) for i, name in enumerate(names)}


def _open_text(table: Source) -> IO[str]:
    """Open a text file in UTF-8, or in UTF-16 or UTF-32 as its first bytes say."""
    binary: Any = io.BytesIO(read_url(str(table))) if is_url(table) else open(table, "rb")  # noqa: SIM115 - returned
    start = binary.read(4096)
    binary.seek(0)
    encoding = next((name for mark, name in _ENCODINGS.items() if start.startswith(mark)), None)
    if encoding is None and b"\0" in start:
        binary.close()
        raise ImageTableError(f"{tell(table)} is no UTF-8 text, it holds NUL bytes: save it as CSV in UTF-8")
    if encoding:
        return io.TextIOWrapper(binary, encoding=encoding, newline="")
    return io.TextIOWrapper(binary, encoding="utf-8-sig", errors="surrogateescape", newline="")


def _separator(header: str) -> str:
    """Return what parts the cells of a table: the character by which its header has the columns path and domain."""
    for separator in _SEPARATORS:
        names = {name.strip() for name in next(csv.reader([header], delimiter=separator), [])}
        if names >= {"path", "domain"}:
            return separator
    return _SEPARATORS[0]


def _whole_numbers(cells: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return integers that pandas wrote as floats (a column with gaps) as integers; any other column as it is."""
    if pc.all(pc.match_substring_regex(cells, _WHOLE_FLOAT)).as_py() is not True:
        return cells
    return pc.replace_substring_regex(cells, r"\.0$", "")


@contextmanager
def _cells_of_any_size() -> Iterator[None]:
    """Let a cell be as large as its file: a column that is not read may hold captions or vectors."""
    former = csv.field_size_limit()
    csv.field_size_limit(LARGEST_HEADER)
    try:
        yield
    finally:
        csv.field_size_limit(former)


# ---------------------------------------------------------------- Parquet


def _read_parquet(table: Source) -> Columns:
    import pyarrow.parquet as pq

    try:
        place: Any = pa.BufferReader(read_url(str(table))) if is_url(table) else table
        # Its file is the limit of what lies in a header: a table may have millions of row groups, or long texts.
        file = pq.ParquetFile(
            place, thrift_string_size_limit=LARGEST_HEADER, thrift_container_size_limit=LARGEST_HEADER
        )
        names = _check_columns(table, file.schema_arrow.names)
        content = file.read(columns=names)
    except (OSError, pa.ArrowException) as error:
        raise ImageTableError(f"cannot read the table {tell(table)}: {error}") from error
    return {name: as_texts(table, name, content[name]) for name in names}


def as_texts(table: Source, name: str, cells: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return the cells of a Parquet column as escaped texts; "" counts as null, whole numbers become digits.

    Raises:
        ImageTableError: the column ``name`` of ``table`` holds values of another kind.
    """
    kind = cells.type.value_type if pa.types.is_dictionary(cells.type) else cells.type
    if pa.types.is_null(kind) or pa.types.is_integer(kind):
        return cells.cast(kind).cast(TEXT)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        texts = cells.cast(TEXT)
        if pc.any(pc.match_substring(texts, "%")).as_py():
            texts = pa.chunked_array(map(escaped, blocks(texts)), TEXT)
        return pc.if_else(pc.equal(texts, ""), pa.scalar(None, TEXT), texts)
    if pa.types.is_floating(kind) and name in BOX_COLUMNS:
        return cells.cast(pa.float64())
    if pa.types.is_floating(kind) and name == "label":  # what pandas makes of integers with gaps
        return _whole_labels(table, cells.cast(pa.float64()))
    given = pc.drop_null(cells)
    if not len(given):
        return pa.chunked_array([pa.nulls(len(cells), TEXT)], TEXT)
    raise ImageTableError(
        f"{tell(table)}: column `{name}` holds {type(given[0].as_py()).__name__} values: expected text"
    )


def _whole_labels(table: Source, cells: pa.ChunkedArray) -> pa.ChunkedArray:
    cells = pc.if_else(pc.is_nan(cells), pa.scalar(None, pa.float64()), cells)
    given = pc.drop_null(cells)
    whole = pc.and_(pc.equal(pc.floor(given), given), pc.less(pc.abs(given), float(_EXACT_FLOATS)))
    odd = given.filter(pc.invert(whole))
    if len(odd):
        raise ImageTableError(f"{tell(table)}: column `label` holds {odd[0].as_py()!r}: expected text or whole numbers")
    return cells.cast(pa.int64()).cast(TEXT)


# ---------------------------------------------------------------- rules of a row


def _check(table: str, columns: Columns) -> None:
    """Refuse the first row that breaks a rule."""
    path, domain = columns["path"], columns["domain"]
    bad = [pc.is_null(path), pc.is_null(domain), pc.match_substring(path, "\0")]
    if "split" in columns:
        bad.append(pc.invert(pc.is_in(columns["split"], pa.array([*_SPLITS, None], TEXT))))
    masks = [pc.fill_null(mask, False).to_numpy() for mask in bad]
    if BOX_COLUMNS[0] in columns:
        masks.append(_bad_boxes(np.stack([_numbers(columns[name]) for name in BOX_COLUMNS])))
    wrong = np.flatnonzero(np.logical_or.reduce(masks))
    if len(wrong):
        row = int(wrong[0])
        cells = {name: column[row].as_py() for name, column in columns.items()}
        _refuse(f"{table}, row {row + 1}", cells)


def _refuse(where: str, cells: dict[str, Any]) -> None:
    path, domain, split = (cells.get(name) for name in ("path", "domain", "split"))
    if path is None or domain is None:
        raise ImageTableError(f"{where} has no {'path' if path is None else 'domain'}: every row needs both")
    if "\0" in path:
        raise ImageTableError(f"{where}: the path holds a NUL character, which no file name has")
    if split is not None and split not in _SPLITS:
        raise ImageTableError(f"{where}: split is {split!r}: expected train, test or nothing")
    box = _box(where, [cells[name] for name in BOX_COLUMNS])
    if any(math.isnan(value) for value in box):
        raise ImageTableError(f"{where} has half a box {box}: give all of {', '.join(BOX_COLUMNS)} or none")
    raise ImageTableError(f"{where}: the box {box} is empty: expected box_x0 < box_x1 and box_y0 < box_y1")


def _box(where: str, cells: Sequence[Any]) -> Box:
    values = [_number(cell) for cell in cells]
    for name, cell, value in zip(BOX_COLUMNS, cells, values, strict=True):
        if math.isinf(value):
            raise ImageTableError(f"{where}: {name} is {cell!r}: expected a number of pixels")
    x0, y0, x1, y1 = values
    return x0, y0, x1, y1


def _bad_boxes(boxes: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return which boxes, (4, n), break a rule: not a number, half a box, or empty."""
    none = np.isnan(boxes)
    x0, y0, x1, y1 = boxes
    whole = (x0 < x1) & (y0 < y1) & np.isfinite(boxes).all(axis=0)
    return ~(whole | none.all(axis=0))


def _numbers(cells: pa.ChunkedArray) -> NDArray[np.float64]:
    """Return cells as float64, NaN for null, infinite for what is no number."""
    try:
        found = cells.cast(pa.float64())
    except pa.ArrowInvalid:
        return np.array([_number(cell) for cell in cells.to_pylist()], np.float64)
    return pc.fill_null(found, math.nan).to_numpy().astype(np.float64)


def _number(cell: str | float | None) -> float:
    """Return a cell's number, NaN for null, infinite for what is none."""
    try:
        return math.nan if cell is None else float(cell)
    except ValueError:
        return math.inf
