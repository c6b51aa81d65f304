"""The unfinished work of `grappa embed`: embeddings of some rows a file, each written whole and named by what it holds.

A shard's name says which files, model and settings it is of, so work that was stopped at any moment goes on with the
shards that still hold true, also where the collection changed behind them. Memory is that of one shard.

Shapes: n rows of a shard, D width.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from grappa.core.atomic import write_whole
from grappa.images.paths import PLACE_COLUMNS
from grappa.pipeline.store.locks import acquire

if TYPE_CHECKING:
    from numpy.typing import NDArray

SHARD = 1024  # rows a file: what a kill can cost; whole batches
VECTOR, REASON = "embedding", "reason"
IDENTITY = ["path", "root", "domain", "size", "stamp", *PLACE_COLUMNS]
_LAST_HOMES = 4096  # files whose stamps are kept: many images lie in one
_UNANSWERED = b"unanswered"  # of a shard's metadata


@dataclass(frozen=True)
class Shards:
    """The shards of a listing in a folder; ``identity``: model and settings, on which every embedding depends.

    The listing's column ``stamp`` (see ``stamps``) tells files apart that were replaced by others of the same size, its
    ``version`` what lies behind URLs, where the server gives one.
    """

    folder: Path
    listing: pd.DataFrame
    width: int
    identity: Mapping[str, Any]

    def __len__(self) -> int:
        return -(-len(self.listing) // SHARD)

    def rows(self, number: int) -> range:
        """Return the rows of the listing that a shard holds."""
        return range(number * SHARD, min((number + 1) * SHARD, len(self.listing)))

    def part(self, number: int) -> pd.DataFrame:
        """Return the listing's rows of a shard."""
        return self.listing.iloc[number * SHARD : (number + 1) * SHARD]

    def file(self, number: int) -> Path:
        """Return the file of a shard; its name is a digest of the rows and of ``identity``."""
        part = self.part(number)
        rows = pd.util.hash_pandas_object(part[[name for name in IDENTITY if name in part]], index=False).to_numpy()
        text = json.dumps([self.listing.attrs["roots"], self.width, dict(self.identity)], sort_keys=True)
        return self.folder / f"{number:06d}-{hashlib.sha256(rows.tobytes() + text.encode()).hexdigest()[:32]}.parquet"

    def is_whole(self, number: int) -> bool:
        """Tell whether a shard is there, can be read, and lacks no image that may come yet; checksums are compared."""
        try:
            vectors, reasons = self.read(number)
            complete = not self.unanswered(number)
        except (OSError, ValueError, KeyError, pa.ArrowException):
            return False
        return complete and vectors.shape == (len(self.rows(number)), self.width) and len(reasons) == len(vectors)

    def write(
        self, number: int, vectors: NDArray[np.float32], reasons: list[str | None], *, unanswered: int = 0
    ) -> None:
        """Write a shard: embeddings (n, D), and why a row has none, or None.

        unanswered: how many rows have none because they did not come, so that the next call asks again.
        """
        column = fixed_lists(vectors)
        table = pa.table({VECTOR: column, REASON: pa.array(reasons, pa.string())})
        table = table.replace_schema_metadata({_UNANSWERED: str(unanswered)})
        write_whole(
            self.file(number), lambda file: pq.write_table(table, file, compression="none", write_page_checksum=True)
        )

    def read(self, number: int) -> tuple[NDArray[np.float32], list[str | None]]:
        """Return what ``write`` was given."""
        table = pq.ParquetFile(self.file(number), page_checksum_verification=True).read()
        flat = table[VECTOR].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        return flat.reshape(len(table), -1), table[REASON].to_pylist()

    def reasons(self, number: int) -> list[str | None]:
        """Return why the rows of a shard have no embedding, None for those that have one."""
        found: list[str | None] = pq.ParquetFile(self.file(number)).read([REASON])[REASON].to_pylist()
        return found

    def unanswered(self, number: int) -> int:
        """Return how many rows of a shard have no embedding because they did not come."""
        return int((pq.ParquetFile(self.file(number)).schema_arrow.metadata or {}).get(_UNANSWERED, b"0"))

    def remove(self) -> None:
        """Remove all shards and drafts, also those of other listings and models."""
        shutil.rmtree(self.folder / "draft", ignore_errors=True)
        for path in (*self.folder.glob("[0-9]*-*.parquet*"), self.folder / "draft.parquet"):
            path.unlink(missing_ok=True)


def stamps(files: Iterable[str]) -> NDArray[np.int64]:
    """Return when each file was changed, (N,) int64 nanoseconds; 0 where it cannot be told."""
    return np.fromiter(map(lru_cache(_LAST_HOMES)(_stamp), files), dtype=np.int64)


def _stamp(file: str) -> int:
    try:
        return os.stat(file).st_mtime_ns
    except (OSError, ValueError):
        return 0


def fixed_lists(vectors: NDArray[np.float32]) -> pa.FixedSizeListArray:
    """Return (n, D) float32 as a column of lists of D numbers."""
    flat = pa.array(np.ascontiguousarray(vectors).reshape(-1), pa.float32())
    return pa.FixedSizeListArray.from_arrays(flat, type=pa.list_(pa.float32(), vectors.shape[1]))


def work_of(out: Path) -> Path:
    """Return the folder beside ``out`` where its unfinished work lies."""
    return out.with_name(f".{out.name}.partial")


@contextmanager
def work_folder(out: Path) -> Iterator[Path]:
    """Give the folder beside ``out`` where its unfinished work lies; one process at a time has it.

    LockedError where another process is at work.
    """
    folder = work_of(out)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with acquire(folder / "lock", what=f"the embeddings {out}"):
            yield folder
    finally:
        with suppress(OSError):  # unfinished work stays
            folder.rmdir()
