"""Parquet files that hold the bytes of images, as Hugging Face data sets do: their rows, and an image by its row."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import OrderedDict
from collections.abc import Sequence
from threading import Lock
from typing import IO, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from grappa.images.files import RejectedFileError
from grappa.images.folders import is_split, split_of
from grappa.images.paths import UNKNOWN, ImageTableError, tell
from grappa.images.sources.columns import TEXT, constant, escaped, mapped
from grappa.images.sources.path_table import LARGEST_HEADER, as_texts
from grappa.images.sources.tar_shards import SEPARATOR

WINDOW_BYTES = 64 * 2**20  # of a column that are in memory at a time, where its row groups are larger
# Of each open file, beside the compressed row group that is being read: rows are asked for in order, by threads that
# are some rows apart.
_WINDOWS = 3
_VERSION_DIGITS = 16
_HF_SPLIT = re.compile(r"([A-Za-z]+)-\d{5}-of-\d{5}")  # how data sets of the hub name their files


class _Columns(NamedTuple):
    """Where images, labels, domains and splits are; ``path`` is the leaf that holds the bytes, None: not there."""

    image: str
    path: str
    label: str | None
    names: list[str] | None
    domain: str | None
    split: str | None


def holds_images(schema: pa.Schema) -> bool:
    """Tell whether a file has a column of images; one with the column ``path`` is a table of paths."""
    return "path" not in schema.names and _image_column(schema) is not None


def open_parquet(place: str | IO[bytes], name: str) -> pq.ParquetFile:
    """Open a Parquet file; ImageTableError where it is none, or cut off."""
    try:
        return pq.ParquetFile(
            place,
            thrift_string_size_limit=LARGEST_HEADER,
            thrift_container_size_limit=LARGEST_HEADER,
            pre_buffer=True,
        )
    except (OSError, pa.ArrowException) as error:
        raise ImageTableError(f"cannot read the table {tell(name)}: {error}") from error


def version_of(file: pq.ParquetFile) -> str:
    """Return what tells whether a file is still the listed one: a digest of where everything in it lies."""
    parts = [f"{file.metadata.num_rows} {file.metadata.num_columns}"]
    for number in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(number)
        for position in range(group.num_columns):
            column = group.column(position)
            sizes = f"{column.total_compressed_size} {column.total_uncompressed_size}"
            parts.append(f"{column.num_values} {column.data_page_offset} {sizes}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:_VERSION_DIGITS]


def list_parquet(file: pq.ParquetFile, name: str) -> pa.Table:
    """List the images of a file; no image is read.

    Args:
        name: its path below its root (``os.fsdecode`` form).

    Returns:
        columns ``path`` (``name::row``, the row with leading zeros), ``folder``, ``label``, ``domain``, ``split``
        (those that the file gives, else null), ``size`` (``UNKNOWN``), ``offset`` (the row) and ``version``.

    Raises:
        ImageTableError: no column of images, or one of labels, domains or splits that is no text.
    """
    columns, number = _columns(file.schema_arrow, name), file.metadata.num_rows
    told = [each for each in (columns.label, columns.domain, columns.split) if each is not None]
    try:
        content = file.read(columns=told)
    except (OSError, pa.ArrowException) as error:
        raise ImageTableError(f"cannot read the table {tell(name)}: {error}") from error
    rows = pa.array(np.arange(number))
    digits = pc.utf8_lpad(rows.cast(TEXT), len(str(max(number - 1, 0))), "0")
    before = escaped([f"{name}{SEPARATOR}"])[0]
    texts = {each: as_texts(name, each, content[each]) for each in told}
    given = {
        "label": _labels(texts.get(columns.label or ""), columns.names, name),
        "domain": texts.get(columns.domain or ""),
        "split": _splits(texts.get(columns.split or ""), name),
    }
    return pa.table(
        {
            "path": pc.binary_join_element_wise(before, digits, pa.scalar("", TEXT)),
            "folder": constant(escaped([os.path.dirname(name)])[0].as_py(), number, TEXT).dictionary_encode(),
            "size": constant(UNKNOWN, number, pa.int64()),
            "offset": rows,
            "version": constant(version_of(file), number, TEXT),
            **{each: column for each, column in given.items() if column is not None},
        }
    )


def splits_of_names(names: Sequence[str]) -> list[str | None]:
    """Return the split of each file by its name, where all are called as the hub does and some are to learn from."""
    found = [_HF_SPLIT.match(os.path.basename(name)) for name in names]
    splits = [split_of(match[1]) if match and is_split(match[1]) else None for match in found]
    return splits if None not in splits and "train" in splits else [None] * len(splits)


def _labels(cells: pa.ChunkedArray | None, names: list[str] | None, file: str) -> pa.ChunkedArray | None:
    if cells is None or names is None:
        return cells
    known = {str(number): text for number, text in enumerate(names)} | {"-1": ""}  # -1: a test image without label

    def name_of(cell: str) -> str:
        if cell not in known:
            raise ImageTableError(f"{tell(file)}: the label {cell} is none of the {len(names)} that the file names")
        return known[cell]

    found = mapped(cells, name_of)
    return pc.if_else(pc.equal(found, ""), pa.scalar(None, TEXT), found)


def _splits(cells: pa.ChunkedArray | None, file: str) -> pa.ChunkedArray | None:
    def meaning(cell: str) -> str:
        if not is_split(cell):
            raise ImageTableError(f"{tell(file)}: split is {cell!r}: expected train, val or test")
        return split_of(cell)

    return None if cells is None else mapped(cells, meaning)


# ---------------------------------------------------------------- which columns


def _features(schema: pa.Schema) -> dict[str, Any]:
    """Return what the library ``datasets`` wrote of the columns, by name; empty where it wrote nothing."""
    try:
        found = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    return {name: each for name, each in found.items() if isinstance(each, dict)} if isinstance(found, dict) else {}


def _image_column(schema: pa.Schema) -> str | None:
    """Return the column of images: the one that the file calls so, else ``image``, else the only one that holds bytes.

    None where there is none, or several that could be meant.
    """
    holding = [column.name for column in schema if _leaf(column) is not None]
    features = _features(schema)
    called = [name for name in holding if features.get(name, {}).get("_type") == "Image"]
    for candidates in (called, [name for name in holding if name == "image"], holding):
        if "image" in candidates or len(candidates) == 1:
            return "image" if "image" in candidates else candidates[0]
    return None


def _leaf(column: pa.Field) -> str | None:
    """Return the leaf of a column that holds bytes: itself, or the field ``bytes`` of a struct."""
    if pa.types.is_struct(column.type):
        position = column.type.get_field_index("bytes")
        inner = column.type.field(position) if position >= 0 else None
        return f"{column.name}.bytes" if inner is not None and _is_bytes(inner.type) else None
    return column.name if _is_bytes(column.type) else None


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _columns(schema: pa.Schema, name: str) -> _Columns:
    image = _image_column(schema)
    if image is None:
        raise ImageTableError(
            f"{tell(name)} has no column `path` and no column of images: found {', '.join(schema.names)}; expected "
            "path and domain, or image"
        )
    features = _features(schema)
    classes = [each for each in schema.names if features.get(each, {}).get("_type") == "ClassLabel"]
    label = "label" if "label" in schema.names else classes[0] if len(classes) == 1 else None
    names = features.get(label or "", {}).get("names")
    whole = isinstance(names, list) and label is not None and pa.types.is_integer(schema.field(label).type)
    domain, split = (each if each in schema.names else None for each in ("domain", "split"))
    leaf = _leaf(schema.field(image))
    assert leaf is not None, "the column was found by what it holds"
    return _Columns(image, leaf, label, [str(each) for each in names] if whole else None, domain, split)


# ---------------------------------------------------------------- reading


class ParquetImages:
    """The images of one file by their rows, read a row group or a window of one at a time. Threads may share it."""

    def __init__(self, file: pq.ParquetFile, name: str) -> None:
        self.version = version_of(file)
        self._file, self._columns = file, _columns(file.schema_arrow, name)
        self._starts = [0]
        for number in range(file.metadata.num_row_groups):
            self._starts.append(self._starts[-1] + file.metadata.row_group(number).num_rows)
        self._windows: OrderedDict[int, pa.Array] = OrderedDict()  # by the first row
        self._batches: Any = None  # of the row group that is being read
        self._next = self._stop = 0  # the row at which the next of them begins, and the end of the row group
        self._lock = Lock()

    def read(self, row: int) -> bytes:
        """Return the bytes of the image of a row.

        Raises:
            RejectedFileError: its cell is null.
            pa.ArrowException, OSError, or what the opened file raises: it cannot be read; it may be asked for again.
        """
        with self._lock:
            try:
                first, window = self._window(row)
            except BaseException:
                self._batches, self._next, self._stop = None, 0, 0  # else the next row would go on behind the gap
                raise
        cell = window[row - first].as_py()
        if cell is None:
            raise RejectedFileError(f"no image: the cell of the column `{self._columns.image}` holds no bytes")
        data: bytes = cell
        return data

    def _window(self, row: int) -> tuple[int, pa.Array]:
        for first, window in self._windows.items():
            if first <= row < first + len(window):
                return first, window
        if not self._next <= row < self._stop:
            self._begin(row)
        while True:
            first, window = self._next, self._following()
            self._windows[first] = window
            while len(self._windows) > _WINDOWS:
                self._windows.popitem(last=False)
            if row < first + len(window):
                return first, window

    def _begin(self, row: int) -> None:
        """Begin to read the row group of a row, in batches of some ``WINDOW_BYTES``."""
        group = next(at for at, end in enumerate(self._starts[1:]) if row < end)
        about = self._file.metadata.row_group(group)
        size = next(
            about.column(at).total_uncompressed_size
            for at in range(about.num_columns)
            if about.column(at).path_in_schema == self._columns.path
        )
        rows = max(1, min(about.num_rows, about.num_rows * WINDOW_BYTES // max(size, 1)))
        self._batches = self._file.iter_batches(rows, row_groups=[group], columns=[self._columns.path])
        self._next, self._stop = self._starts[group : group + 2]

    def _following(self) -> pa.Array:
        batch = next(self._batches, None)
        if batch is None:
            raise pa.ArrowInvalid("a row group ends before its last row")
        column = batch.column(0)
        cells = column.field("bytes") if pa.types.is_struct(column.type) else column
        cells = pc.if_else(column.is_valid(), cells, pa.scalar(None, cells.type))
        self._next += len(cells)
        return cells
