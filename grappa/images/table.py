"""Listing images: which images a run uses, with the domain, label, split and box that are given for them.

A source is a folder, whose layout says what its folders mean (see ``grappa.images.folders``), a CSV or Parquet table of
paths, a tar or a Parquet file that holds images, or a URL of one of these. Listing opens no image: decoding finds out
later which ones cannot be used, and reports their reasons.

A file name may hold bytes that are not UTF-8; paths stand in tables percent-escaped, see :func:`escape_path`.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from grappa.core.names import MEAN
from grappa.images.folders import SHARDS, Found, find_files, passed_over, place, recognize
from grappa.images.paths import (
    MISSING,
    PLACE_COLUMNS,
    UNKNOWN,
    ImageTableError,
    escape_path,
    image_file,
    show,
    size_of,
    tell,
    unescape_path,
)
from grappa.images.sources.columns import (
    BOX_COLUMNS,
    TEXT,
    constant,
    escaped,
    folders_of,
    give_back,
    mapped,
    numbers,
)
from grappa.images.sources.parquet_shards import splits_of_names
from grappa.images.sources.path_table import read_table
from grappa.images.sources.shards import is_tar, list_shards, with_images
from grappa.images.sources.urls import as_source, find_urls, is_url

__all__ = [
    "BOX_COLUMNS",
    "MISSING",
    "ImageTableError",
    "escape_path",
    "image_file",
    "list_images",
    "read_table",
    "unescape_path",
]

# Why a path that a table names may lead nowhere, by what it looks like.
_HINTS = {
    r"[A-Za-z]:[\\/]": "it begins with a drive letter: give the path on this machine",
    r"~": "`~` is not expanded: write the home folder out",
    r".*\\": "it has backslashes: write / between folders",
    r"\s|.*\s$": "it begins or ends with a blank: remove it",
}
_ROOTED = r"^(/|[A-Za-z][A-Za-z0-9+.-]+://)"  # how an absolute path and a URL begin
_UNTIDY = r"(^|/)\.{0,2}(/|$)"  # what os.path.normpath changes

Source = Path | str


class _Piece(NamedTuple):
    """Rows that share a root (a folder or a URL, ``os.fsdecode`` form): some of the columns of ``SCHEMA``."""

    root: str
    rows: pa.Table


@dataclass
class _Given:
    """A source with images of its own: a folder, or shards in one; ``names``: the shards that were given by name."""

    root: str
    names: list[str] = field(default_factory=list)


def list_images(
    sources: Sequence[Source],
    *,
    domains: Sequence[tuple[str, Source]] = (),
    layout: str = "domain/class",
    loose_domain: str | None = None,
) -> pd.DataFrame:
    """List the images of all sources, one row an image, sorted by (domain, path, root).

    In folders what is hidden is skipped, links are followed, each folder once, and what is evidently no image is passed
    over (``grappa.images.folders.find_files``). The tars and Parquet files of a folder are read where it holds no other
    images; else they are taken for packed copies. A table (``.csv``, ``.tsv``, ``.parquet``) has the columns ``path``
    (relative to the table's folder, absolute, or a URL), ``domain`` and optionally ``label``, ``split``, ``box_x0,
    box_y0, box_x1, box_y1``; other columns are ignored, CSV cells are text, an empty one is "not given".

    Args:
        sources: folders, tables, tars and Parquet files with a column of images (``grappa.images.sources.tar_shards``
            and ``parquet_shards`` say what is read of them), or URLs of these.
        domains: further folders, tars or Parquet files, each with the domain of all its images; a first level of
            folders is the label.
        layout: what the folders of ``sources`` mean, one of ``grappa.images.folders.LAYOUTS``, or ``auto``: for each
            source what :func:`recognize` says. Of an image in a tar the folders are the tar's and then its own.
        loose_domain: the domain of files directly in a source folder; None: such files are refused where a domain is
            expected.

    Returns:
        columns ``path`` (relative to its root, "/" between folders, escaped; ``shard::member`` of an image in a shard),
        ``root`` (int64, number in ``attrs["roots"]``), ``domain``, ``label`` and ``split`` (object: str or None),
        ``box_*`` (float64 pixels of the EXIF-oriented original, NaN = none), ``size`` (int64 bytes, -1 = not there, -2
        = not known yet), and ``PLACE_COLUMNS`` where not all images are local files of their own. ``attrs``: ``roots``,
        the absolute folders and URLs (str, escaped); ``layouts``, the layout recognised in each folder;
        ``passed_over``, what was passed over, in words; ``missing``, a sentence about listed files that are not there,
        or "".

    Raises:
        ImageTableError: nothing found, no place in the layout, a rule broken, unreadable, or the same image twice.
    """
    if not sources and not domains:
        raise ImageTableError("no images given: name at least one folder or table")
    found: list[Found] = []
    layouts: dict[str, str] = {}
    pieces: list[_Piece] = []
    for given in _grouped(sources):
        if not isinstance(given, _Given):
            pieces += _list_table(given)
            continue
        rows, root = _rows_of(given, found), show(given.root)
        if layout == "auto":
            layouts[root] = recognize(_places(rows))
        pieces.append(_meant(given.root, rows, layouts.get(root, layout), loose_domain))
    for domain, source in domains:
        given = _given(as_source(source))
        rows = _rows_of(given, found)
        inner = "split/class" if recognize(_places(rows)).startswith("split") else "class"
        pieces.append(_meant(given.root, rows, inner, domain))
    _refuse_repeats(pieces)
    said = {"layouts": layouts, "passed_over": list(passed_over(found)), "missing": _missing(pieces)}
    frame = _frame(pieces)
    frame.attrs.update(said)
    return frame


def _grouped(sources: Sequence[Source]) -> list[_Given | Source]:
    """Return sources as they are read: the shards of one folder together, as if it held nothing else."""
    grouped: list[_Given | Source] = []
    for source in map(as_source, sources):
        given = _given(source) if _is_folder(source) or _is_shard(source) else source
        known = next(
            (
                each
                for each in grouped
                if isinstance(each, _Given)
                and isinstance(given, _Given)
                and each.names
                and given.names
                and each.root == given.root
            ),
            None,
        )
        if known and isinstance(given, _Given):
            known.names += given.names
        else:
            grouped.append(given)
    return grouped


def _given(source: Source) -> _Given:
    if not _is_shard(source):
        return _Given(str(source) if is_url(source) else os.path.abspath(source))
    place = str(source) if is_url(source) else os.path.abspath(source)
    root, _, name = place.rpartition("/")
    return _Given(root or "/", [name])


def _is_folder(source: Source) -> bool:
    if isinstance(source, str):
        return os.path.splitext(source)[1].lower() not in (".csv", ".tsv", *SHARDS)
    return source.is_dir()


def _is_shard(source: Source) -> bool:
    """Tell whether a source is one file with many images."""
    text = str(source)
    if text.lower().endswith(".tar"):
        return is_url(source) or os.path.isfile(source)
    if not text.lower().endswith(".parquet") or not (is_url(source) or os.path.isfile(source)):
        return False
    root, _, name = (text if is_url(source) else os.path.abspath(source)).rpartition("/")
    return bool(with_images(root or "/", [name]))


# ---------------------------------------------------------------- folders and shards


def _rows_of(given: _Given, found: list[Found]) -> pa.Table:
    """Return the rows of a folder or of shards, with the column ``folder``, and count what is passed over."""
    if given.names:
        found.append(Found())
        return _rows_of_shards(given.root, given.names, found[-1])
    found.append(_found(given.root))
    files = found[-1].files
    if len(files):
        return files.append_column("folder", folders_of(files["path"]))
    names = with_images(given.root, sorted(found[-1].shards))
    found[-1].passed_files -= Counter(os.path.splitext(name)[1].lower() for name in names)
    if not names:
        passed = ", ".join(passed_over(found[-1:]))
        but = f" but what is no image: {passed}" if passed else ""
        raise ImageTableError(
            f"the folder {tell(given.root)} holds no files{but}; expected DOMAIN/CLASS/image, CLASS/image or images"
        )
    return _rows_of_shards(given.root, names, found[-1])


def _found(root: str) -> Found:
    if not is_url(root):
        if not os.path.isdir(root):
            raise ImageTableError(f"no such folder: {tell(root)}")
        return find_files(root)
    found = Found()
    for remote in find_urls(root):
        found.add_remote(remote)
    if not (len(found.files) or found.passed_files):
        raise ImageTableError(f"no such folder or table: {tell(root)}")
    return found


def _rows_of_shards(root: str, names: list[str], found: Found) -> pa.Table:
    tables = []
    for name, split, (rows, passed) in zip(names, splits_of_names(names), list_shards(root, names), strict=True):
        found.passed_files += passed
        if split is not None and not is_tar(name) and "split" not in rows.column_names:
            rows = rows.append_column("split", constant(split, len(rows), TEXT))
        tables.append(rows)
    joint = pa.concat_tables(tables, promote_options="default")
    if not len(joint):
        raise ImageTableError(f"no image lies in {tell(names[0])}{' and others' if len(names) > 1 else ''}")
    return joint


def _places(rows: pa.Table) -> list[str]:
    """Return, for each folder of some rows, the path that a file in it has; folders in a shard count as others."""
    encoded = rows["folder"].combine_chunks().dictionary_encode()
    first = np.unique(encoded.indices.to_numpy(), return_index=True)[1]
    names = [re.split("/|::", path)[-1] for path in rows["path"].take(pa.array(first)).to_pylist()]
    folders = encoded.dictionary.to_pylist()
    return [f"{folder}/{name}" if folder else name for folder, name in zip(folders, names, strict=True)]


def _meant(root: str, rows: pa.Table, layout: str, domain: str | None) -> _Piece:
    """Return rows with domain, label and split: what a shard says, else what the layout says of the folder."""
    own = {name: rows[name] for name in ("domain", "label", "split") if name in rows.column_names}
    if domain is None and "domain" in own and not own["domain"].null_count:
        domain = ""
    meant = [place(layout, root, unescape_path(path), domain) for path in _places(rows)]
    indices = rows["folder"].combine_chunks().dictionary_encode().indices
    for name, texts in zip(("domain", "label", "split"), zip(*meant, strict=True), strict=True):
        column = escaped(texts).take(indices)
        rows = rows.drop_columns([name]) if name in own else rows
        rows = rows.append_column(name, pc.coalesce(own[name], column) if name in own else column)
    return _Piece(root, rows.drop_columns(["folder"]))


# ---------------------------------------------------------------- rows of a table


def _list_table(source: Source) -> Iterator[_Piece]:
    if not (is_url(source) or os.path.exists(source)):
        raise ImageTableError(f"no such folder or table: {tell(source)}")
    rows = read_table(source)
    if not len(rows):
        raise ImageTableError(f"the table {tell(source)} has no rows: expected one row an image")
    folder = str(source).rpartition("/")[0] if is_url(source) else os.path.dirname(os.path.abspath(source))
    paths, rows = rows["path"], rows.drop_columns(["path"])
    if not pc.any(pc.match_substring_regex(paths, _ROOTED)).as_py():
        yield _of_table(folder, paths, rows)
        return
    paths = pc.replace_substring_regex(paths, "(?i)^file://", "")
    rooted = pc.match_substring_regex(paths, _ROOTED)
    roots = pc.if_else(rooted, pc.replace_substring_regex(paths, f"(?s){_ROOTED}.*", r"\1"), "")
    roots = roots.combine_chunks().dictionary_encode()
    for number, root in enumerate(roots.dictionary.to_pylist()):
        mask = pc.equal(roots.indices, number)
        kept = paths.filter(mask)
        yield _of_table(root or folder, pc.utf8_ltrim(kept, "/") if root == "/" else kept, rows.filter(mask))


def _of_table(root: str, paths: pa.ChunkedArray, rows: pa.Table) -> _Piece:
    if is_url(root):
        paths = pc.replace_substring_regex(paths, _ROOTED, "")
        return _Piece(root, _with(rows, path=paths, size=constant(UNKNOWN, len(rows), pa.int64())))
    untidy = pc.match_substring_regex(paths, _UNTIDY).combine_chunks()
    if untidy.true_count:
        tidy = mapped(paths.filter(untidy), os.path.normpath).combine_chunks()
        paths = pa.chunked_array([pc.replace_with_mask(paths.combine_chunks(), untidy, tidy)])
    above = root.rstrip("/") + "/"
    sizes = numbers(paths, lambda path: size_of(above + (unescape_path(path) if "%" in path else path)))
    give_back()
    return _Piece(root, _with(rows, path=paths, size=pa.array(sizes)))


def _with(rows: pa.Table, **columns: pa.Array) -> pa.Table:
    for name, column in columns.items():
        rows = rows.append_column(name, column)
    return rows


# ---------------------------------------------------------------- all sources alike


def _missing(pieces: Sequence[_Piece]) -> str:
    """Return a sentence about the listed files that are not there, with the likely reason; "" where all are there."""
    number, first, sought = 0, "", ""
    for root, rows in pieces:
        gone = np.flatnonzero(rows["size"].to_numpy() == MISSING)
        if len(gone) and not number:
            path = rows["path"][int(gone[0])].as_py()
            first, sought = (f"/{path}", "") if root == "/" else (path, f" in {tell(root)}")
        number += len(gone)
    if not number:
        return ""
    hint = next((hint for look, hint in _HINTS.items() if re.match(look, first)), "")
    shown = f"first {first!r}{sought}" + (f" ({hint})" if hint else "")
    are = "is" if number == 1 else "are"
    return f"{number} of {sum(len(rows) for _, rows in pieces)} files {are} missing, {shown}"


def _refuse_repeats(pieces: Sequence[_Piece]) -> None:
    """The same file twice would be its own nearest neighbor; two copies of its bytes are allowed and reported."""
    for _, rows in pieces:
        if pc.any(pc.equal(rows["domain"], MEAN)).as_py():
            raise ImageTableError(f"a domain is named `{MEAN}`, which is the result tables' row of means: rename it")
    marks = np.concatenate([_marks(_real(root), rows["path"]) for root, rows in pieces])
    ordered = np.sort(marks)
    repeated = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
    if not repeated:
        return
    seen: set[str] = set()
    start = 0
    for root, rows in pieces:
        for at in np.flatnonzero(np.isin(marks[start : start + len(rows)], list(repeated))).tolist():
            file = _file(_real(root), rows["path"][at].as_py())
            if file in seen:
                raise ImageTableError(f"the file {file} is listed twice: name every file once, in one domain")
            seen.add(file)
        start += len(rows)


def _marks(root: str, paths: pa.ChunkedArray) -> NDArray[np.int64]:
    """Return a number for each file, (n,), the same for the same file and hardly ever for two."""
    return numbers(paths, lambda path: hash(_file(root, path)))


def _real(root: str) -> str:
    return root if is_url(root) else escape_path(os.path.realpath(root)).rstrip("/")


def _file(root: str, path: str) -> str:
    """Return the escaped path of a file, the same for the same file."""
    return os.path.normpath(f"{root}/{path}") if path[:2] == ".." else f"{root}/{path}"


def _frame(pieces: list[_Piece]) -> pd.DataFrame:
    roots = list(dict.fromkeys(root for root, _ in pieces))
    number = [constant(roots.index(root), len(rows), pa.int64()) for root, rows in pieces]
    table = pa.concat_tables([rows for _, rows in pieces], promote_options="default")
    table = table.append_column("root", pa.chunked_array(number))
    pieces.clear()  # what is large is held once
    order = pc.sort_indices(table, sort_keys=[(name, "ascending") for name in ("domain", "path", "root")])
    columns = {}
    for name, kind in _COLUMNS.items():
        if name in table.column_names:
            column = table[name].combine_chunks()
            table = table.drop_columns([name])
            columns[name] = kind(column.take(order))
            del column
            give_back()
        elif name not in PLACE_COLUMNS:
            columns[name] = np.broadcast_to(np.array(np.nan if kind is _floats else None), len(table))
    del order
    give_back()
    frame = _with_places(pd.DataFrame(columns, copy=False))
    frame.attrs["roots"] = [escape_path(root) for root in roots]
    return frame


def _with_places(frame: pd.DataFrame) -> pd.DataFrame:
    """Return a listing with both of ``PLACE_COLUMNS``, or with none where all images are local files of their own."""
    offset, version = (frame.get(name) for name in PLACE_COLUMNS)
    if (offset is None or (offset < 0).all()) and (version is None or (version == "").all()):
        return frame.drop(columns=[name for name in PLACE_COLUMNS if name in frame])
    offset = pd.Series(-1, frame.index) if offset is None else offset
    version = pd.Series("", frame.index, dtype="str") if version is None else version
    return frame.drop(columns=[name for name in PLACE_COLUMNS if name in frame]).assign(offset=offset, version=version)


def _text(column: pa.Array) -> pd.Series:
    return (pc.fill_null(column, "") if column.null_count else column).to_pandas().astype("str")


def _objects(column: pa.Array) -> pd.Series:
    """Return texts and None as Python objects, one object a different text."""
    encoded = column.dictionary_encode()
    texts = np.array([*encoded.dictionary.to_pylist(), None], dtype=object)
    return pd.Series(texts[pc.fill_null(encoded.indices, len(texts) - 1).to_numpy()], dtype="object")


def _integers(column: pa.Array) -> pd.Series:
    return pd.Series(pc.fill_null(column, -1).to_numpy(zero_copy_only=False))


def _floats(column: pa.Array) -> NDArray[np.float64]:
    return pc.fill_null(column, float("nan")).to_numpy()


_COLUMNS: dict[str, Callable[[pa.Array], Any]] = {
    "path": _text,
    "root": _integers,
    "domain": _text,
    "label": _objects,
    "split": _objects,
    **dict.fromkeys(BOX_COLUMNS, _floats),
    "size": _integers,
    "offset": _integers,
    "version": _text,
}
