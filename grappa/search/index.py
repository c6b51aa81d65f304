"""A search index over embeddings: exact, or of one of the approximate kinds of ``grappa.search.index_kinds``.

Loading and searching need neither torch nor pandas.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grappa.core.memory import FLOAT, INTEGER
from grappa.core.randomness import id_numbers, key, shuffled
from grappa.core.vectors import check_unit_vectors
from grappa.search.index_kinds import Kind, add_vectors, empty_index, index_bytes, search_index, settled_kind

INDEX_FILE, IDS_FILE, ID_COLUMN, HIDDEN_COLUMN = "index.faiss", "ids.parquet", "image_id", "removed"
RECALLED, RECALL_QUERIES = 10, 1000
TIE = 1e-6  # images as similar as the last of the exact answer count as found


@dataclass(frozen=True)
class SearchIndex:
    """``faiss_index`` holds the vectors of N images, ``ids`` (N,) the ids of these images in the same order.

    ``hidden`` (N,) bool: images that are not found although their vectors are still there; None: there are none.
    """

    faiss_index: Any
    ids: NDArray[np.object_]
    hidden: NDArray[np.bool_] | None = None

    def __len__(self) -> int:
        """Return the number of images that can be found."""
        return len(self.ids) - (0 if self.hidden is None else int(self.hidden.sum()))

    @classmethod
    def build(
        cls,
        embeddings: NDArray[np.float32],
        ids: Sequence[str],
        *,
        kind: Kind = "auto",
        ivf_above: int = 1_000_000,
    ) -> SearchIndex:
        """Index embeddings (N, D), L2-normalised, under N different image ids.

        ``auto`` is an exact index up to ``ivf_above`` rows, above an inverted file with 4 sqrt(N) lists, of which a
        search visits one in 32 (at least 16): approximate. ValueError when ids and embeddings disagree, or where there
        are too few images for the kind.
        """
        embeddings = check_unit_vectors("embeddings", embeddings)
        _check_ids(embeddings, ids)
        index = empty_index(settled_kind(kind, len(embeddings), ivf_above), embeddings)
        add_vectors(index, embeddings)
        return cls(faiss_index=index, ids=np.array(list(ids), dtype=object))

    def grown(self, embeddings: NDArray[np.float32], ids: Sequence[str]) -> SearchIndex:
        """Return the index with embeddings (n, D), L2-normalised, behind its own; it shares its vectors.

        Lists and codes stay those that were learned when the index was built. Nothing else may use the former index
        from now on. ValueError for ids that are there already.
        """
        if not len(ids):
            return self
        embeddings = check_unit_vectors("embeddings", embeddings)
        _check_ids(embeddings, ids)
        known = set(self.ids) & set(ids)
        if known:
            raise ValueError(f"{min(known)} is in the index already; leave it out")
        add_vectors(self.faiss_index, embeddings)
        hidden = None if self.hidden is None else np.concatenate([self.hidden, np.zeros(len(ids), dtype=bool)])
        return SearchIndex(self.faiss_index, np.concatenate([self.ids, np.array(list(ids), dtype=object)]), hidden)

    def without(self, ids: Collection[str]) -> SearchIndex:
        """Return the index in which exactly the images ``ids`` are hidden; ids that it does not have are passed over.

        Their vectors stay in memory until an index is built anew.
        """
        hidden = np.isin(self.ids, np.array(list(ids), dtype=object)) if ids else None
        return replace(self, hidden=hidden if hidden is not None and hidden.any() else None)

    def save(self, folder: Path) -> None:
        """Write index.faiss and ids.parquet into an existing folder."""
        import faiss

        with open(folder / INDEX_FILE, "wb") as file:
            faiss.write_index(self.faiss_index, faiss.PyCallbackIOWriter(file.write))  # type: ignore[attr-defined]
        self.save_ids(folder)

    def save_ids(self, folder: Path) -> None:
        """Write ids.parquet alone: image_id, and removed (bool) where images are hidden."""
        import pandas as pd

        hidden = {} if self.hidden is None else {HIDDEN_COLUMN: self.hidden}
        pd.DataFrame({ID_COLUMN: self.ids, **hidden}).to_parquet(folder / IDS_FILE, index=False)

    @classmethod
    def load(cls, folder: Path) -> SearchIndex:
        """Read what :meth:`save` wrote; ValueError when a file is missing, broken or disagrees with the other."""
        index, (ids, hidden) = _read_index(folder / INDEX_FILE), _read_ids(folder / IDS_FILE)
        if index.ntotal != len(ids):
            raise ValueError(
                f"{folder / INDEX_FILE} holds {index.ntotal} images and {IDS_FILE} {len(ids)}; build the index again"
            )
        return cls(faiss_index=index, ids=ids, hidden=hidden)

    def search(self, queries: NDArray[np.float32], k: int) -> tuple[NDArray[np.object_], NDArray[np.float32]]:
        """Return the k most similar images of queries (Q, D), L2-normalised: ids (Q, k), cosines (Q, k), largest first.

        ValueError unless 1 <= k <= number of images and the widths agree.
        """
        queries = check_unit_vectors("queries", queries)
        if queries.shape[1] != self.faiss_index.d:
            raise ValueError(
                f"queries are {queries.shape[1]} wide, the index {self.faiss_index.d}; embed with its model"
            )
        if not 1 <= k <= len(self):
            raise ValueError(f"k is {k}, but the index of {len(self)} images allows 1 to {len(self)}")
        hidden = np.flatnonzero(self.hidden) if self.hidden is not None else np.empty(0, dtype=np.int64)
        similarities, rows = search_index(self.faiss_index, queries, k, hidden)
        return self.ids[rows], similarities


def recall(index: SearchIndex, embeddings: NDArray[np.float32], ids: Sequence[str]) -> float:
    """Return the recall@10 of an index of embeddings (N, D) under N ids, measured on at most 1,000 of them as queries.

    It is the share of the ten images nearest to a query (itself left out) that the index finds among its first ten; 1
    where there are fewer than two images. The queries are drawn by their ids.
    """
    from grappa.search.neighbors import nearest_neighbors

    embeddings, number = check_unit_vectors("embeddings", embeddings), min(RECALLED, len(embeddings) - 1)
    if number < 1:
        return 1.0
    names = np.array(list(ids), dtype=object)
    rows, everyone = recall_rows(ids), np.arange(len(ids))
    _, exact = nearest_neighbors(
        embeddings[rows], embeddings, num_neighbors=number, query_ids=rows, candidate_ids=everyone
    )
    found, _ = index.search(embeddings[rows], number + 1)
    places = {name: row for row, name in enumerate(names)}
    hits = 0
    for query, row in enumerate(rows):
        others = [places[name] for name in found[query] if name != names[row]][:number]
        hits += num_found(embeddings[others] @ embeddings[row], exact[query])
    return hits / (len(rows) * number)


def recall_rows(ids: Sequence[str]) -> NDArray[np.int64]:
    """Return the rows, at most 1,000, whose nearest images a recall is measured by: drawn by their ids."""
    return shuffled(key(0, "recall"), id_numbers(list(ids)))[:RECALL_QUERIES]


def num_found(similarities: NDArray[np.float32], exact: NDArray[np.float32]) -> int:
    """Return how many of the similarities (..., K) of what was found reach the last of the exact answer (..., K)."""
    return int((similarities >= exact[..., -1:] - TIE).sum())


def memory_needed(num_images: int, width: int, kind: Kind = "flat") -> int:
    """Return the bytes that building takes at its peak: the embeddings in their file and as given, the index of a
    settled kind, and the ids."""
    given = 2 * num_images * width * FLOAT + num_images * 16 * INTEGER
    return given + index_bytes(kind, num_images, width)


def _check_ids(embeddings: NDArray[np.float32], ids: Sequence[str]) -> None:
    if len(ids) != len(embeddings) or len(set(ids)) != len(ids):
        raise ValueError(f"found {len(set(ids))} different ids for {len(embeddings)} embeddings; give each its own")


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


def _read_ids(path: Path) -> tuple[NDArray[np.object_], NDArray[np.bool_] | None]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise ValueError(f"{path} is missing; build the index again")
    try:
        table = pq.ParquetFile(path).read()  # read_table loads pandas
        ids = np.array(table.column(ID_COLUMN).to_pylist(), dtype=object)
    except (pa.ArrowInvalid, KeyError, OSError) as error:
        raise ValueError(f"{path} is truncated or has no column {ID_COLUMN}; build the index again") from error
    hidden = table.column(HIDDEN_COLUMN).to_numpy() if HIDDEN_COLUMN in table.column_names else None
    return ids, hidden
