"""A search index over embeddings: exact inner products (faiss flat), or an inverted file (IVF) above a size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from grappa.core.memory import FLOAT, INTEGER
from grappa.core.vectors import check_unit_vectors

INDEX_FILE, IDS_FILE, ID_COLUMN = "index.faiss", "ids.parquet", "image_id"
MIN_PROBES, PROBED_SHARE = 16, 32
BLOCK_ROWS = 65536


@dataclass(frozen=True)
class SearchIndex:
    """``faiss_index`` holds the vectors of N images, ``ids`` (N,) the ids of these images in the same order."""

    faiss_index: Any
    ids: NDArray[np.object_]

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def build(cls, embeddings: NDArray[np.float32], ids: Sequence[str], *, ivf_above: int = 1_000_000) -> SearchIndex:
        """Index embeddings (N, D), L2-normalised, under N different image ids.

        Up to ``ivf_above`` rows the index is flat: exact. Above, it is an inverted file with 4 sqrt(N) lists, of which
        a search visits one in 32 (at least 16): approximate. ValueError when ids and embeddings disagree.
        """
        embeddings = check_unit_vectors("embeddings", embeddings)
        if len(ids) != len(embeddings) or len(set(ids)) != len(ids):
            raise ValueError(f"found {len(set(ids))} different ids for {len(embeddings)} embeddings; give each its own")
        index = _ivf(embeddings) if len(embeddings) > ivf_above else _flat(embeddings.shape[1])
        for start in range(0, len(embeddings), BLOCK_ROWS):
            index.add(embeddings[start : start + BLOCK_ROWS])
        return cls(faiss_index=index, ids=np.array(list(ids), dtype=object))

    def save(self, folder: Path) -> None:
        """Write index.faiss and ids.parquet into an existing folder."""
        import faiss

        with open(folder / INDEX_FILE, "wb") as file:
            faiss.write_index(self.faiss_index, faiss.PyCallbackIOWriter(file.write))  # type: ignore[attr-defined]
        pd.DataFrame({ID_COLUMN: self.ids}).to_parquet(folder / IDS_FILE, index=False)

    @classmethod
    def load(cls, folder: Path) -> SearchIndex:
        """Read what :meth:`save` wrote; ValueError when a file is missing, broken or disagrees with the other."""
        index, ids = _read_index(folder / INDEX_FILE), _read_ids(folder / IDS_FILE)
        if index.ntotal != len(ids):
            raise ValueError(
                f"{folder / INDEX_FILE} holds {index.ntotal} images and {IDS_FILE} {len(ids)}; build the index again"
            )
        return cls(faiss_index=index, ids=ids)

    def search(self, queries: NDArray[np.float32], k: int) -> tuple[NDArray[np.object_], NDArray[np.float32]]:
        """Return the k most similar images of queries (Q, D), L2-normalised: ids (Q, k), cosines (Q, k), largest first.

        ValueError unless 1 <= k <= number of images and the widths agree.
        """
        queries = check_unit_vectors("queries", queries)
        if queries.shape[1] != self.faiss_index.d:
            raise ValueError(
                f"queries are {queries.shape[1]} wide, the index {self.faiss_index.d}; embed with its model"
            )
        if not 1 <= k <= len(self.ids):
            raise ValueError(f"k is {k}, but the index of {len(self.ids)} images allows 1 to {len(self.ids)}")
        similarities, rows = self.faiss_index.search(queries, k)
        short = np.flatnonzero((rows < 0).any(axis=1))
        if len(short):
            similarities[short], rows[short] = _search_all_lists(self.faiss_index, queries[short], k)
        return self.ids[rows], similarities


def memory_needed(num_images: int, width: int) -> int:
    """Return the bytes that building takes at its peak: the embeddings in their file, as given and in the index, and
    the ids."""
    return 3 * num_images * width * FLOAT + num_images * 16 * INTEGER


def _flat(width: int) -> Any:
    import faiss

    return faiss.IndexFlatIP(width)


def _ivf(embeddings: NDArray[np.float32]) -> Any:
    """Return a trained, empty inverted file; faiss trains on at most 256 images a list, drawn with a fixed seed."""
    import faiss

    width, num_lists = embeddings.shape[1], max(1, int(4 * len(embeddings) ** 0.5))
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, num_lists, faiss.METRIC_INNER_PRODUCT)
    index.train(embeddings)
    index.nprobe = min(num_lists, max(MIN_PROBES, num_lists // PROBED_SHARE))
    return index


def _search_all_lists(
    index: Any, queries: NDArray[np.float32], k: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Search an inverted file in full: for queries whose visited lists held fewer than k images."""
    usual, index.nprobe = index.nprobe, index.nlist
    try:
        found: tuple[NDArray[np.float32], NDArray[np.int64]] = index.search(queries, k)
    finally:
        index.nprobe = usual
    return found


def _read_index(path: Path) -> Any:
    import faiss

    if not path.is_file():
        raise ValueError(f"{path} is missing; build the index again")
    with open(path, "rb") as file:
        try:
            index = faiss.read_index(faiss.PyCallbackIOReader(file.read))  # type: ignore[attr-defined]
        except (RuntimeError, MemoryError) as error:
            raise ValueError(f"{path} is truncated or no faiss index; build the index again") from error
        if file.read(1):
            raise ValueError(f"{path} holds more than one index; build the index again")
    return index


def _read_ids(path: Path) -> NDArray[np.object_]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise ValueError(f"{path} is missing; build the index again")
    try:
        column = pq.read_table(path, columns=[ID_COLUMN]).column(ID_COLUMN)
    except (pa.ArrowInvalid, KeyError, OSError) as error:
        raise ValueError(f"{path} is truncated or has no column {ID_COLUMN}; build the index again") from error
    return np.array(column.to_pylist(), dtype=object)
