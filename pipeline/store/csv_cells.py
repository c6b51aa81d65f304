"""CSV files that people open in a spreadsheet: a text that it would take for a formula gets a leading apostrophe.

A spreadsheet runs a cell that begins with ``=``, ``+``, ``-`` or ``@``, also one from a folder's name. The apostrophe
makes it text; :func:`unguarded` takes it away again, so that a table that is read has the names that were written.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

_FORMULA = re.compile(r"'*[=+\-@\t\r\n\uff0b\uff0d\uff1d\uff20]")  # the last four: their full-width forms
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def guarded(value: Any) -> Any:
    """Return a text so that no spreadsheet runs it; any other value, and a number's text, as it is."""
    return f"'{value}" if isinstance(value, str) and _is_active(value) else value


def unguarded(value: Any) -> Any:
    """Return what :func:`guarded` had been given."""
    return value[1:] if isinstance(value, str) and value[:1] == "'" and _is_active(value[1:]) else value


def csv_bytes(table: pd.DataFrame) -> bytes:
    """Return a table as UTF-8 CSV without its index, texts guarded."""
    texts = table.select_dtypes(exclude="number").columns
    safe = table.assign(**{name: table[name].astype(object).map(guarded) for name in texts})
    return safe.to_csv(index=False).encode()


def with_unguarded(table: pd.DataFrame, columns: Iterable[str]) -> pd.DataFrame:
    """Return a table, read from CSV, whose named columns hold what had been given to :func:`csv_bytes`."""
    return table.assign(**{name: table[name].map(unguarded).astype(table[name].dtype) for name in columns})


def _is_active(text: str) -> bool:
    return _FORMULA.match(text) is not None and not _NUMBER.fullmatch(text)
