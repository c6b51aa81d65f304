"""Nearest neighbors found by an approximate index, ordered by exact similarities; what it misses is measured.

Exact search costs N times M products. An inverted file looks at the candidates of 64 lists, of 4 sqrt(M) ones: some
16 sqrt(M) products a query. The graph of hnsw takes about as many whatever M is, but is built by one thread.
"""

# B queries of a block, D width, F fetched candidates, K neighbors, N queries, M candidates

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from grappa.core.vectors import as_tensor, check_unit_vectors
from grappa.search.index_kinds import add_vectors, empty_index, index_bytes, search_index
from grappa.search.neighbors import (
    QUERY_BLOCK,
    check_search,
    decided,
    memory_needed,
    own_positions,
    without_own,
)

Engine = Literal["ivf", "hnsw"]
PROBED_LISTS = 64


def trained_index(engine: Engine, candidates: NDArray[np.float32]) -> bytes:
    """Return an index of a kind as faiss writes it, trained on ``candidates`` (M, D), L2-normalised, without a vector.

    Whoever puts the same candidates into it finds the same: several processes share what one has trained.
    """
    import faiss

    index = empty_index(engine, check_unit_vectors("candidates", candidates))
    if engine == "ivf":
        index.nprobe = min(PROBED_LISTS, index.nlist)
    written: bytes = faiss.serialize_index(index).tobytes()
    return written


def approximate_neighbors(
    queries: NDArray[np.float32],
    candidates: NDArray[np.float32],
    *,
    index: bytes,
    num_neighbors: int,
    query_ids: NDArray[np.int64],
    candidate_ids: NDArray[np.int64],
    progress: Callable[[int], None] | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return what ``grappa.search.neighbors.nearest_neighbors`` does, of the candidates that an index finds.

    index: of :func:`trained_index`, for vectors of this width. candidate_ids: ascending. The similarities of what is
    found, and so its order, are exact. With one index the result depends neither on the number of threads nor on which
    queries are asked together.
    """
    import faiss

    queries, candidates = check_unit_vectors("queries", queries), check_unit_vectors("candidates", candidates)
    check_search(queries, candidates, query_ids, candidate_ids, num_neighbors)
    if (np.diff(candidate_ids) < 0).any():
        raise ValueError("candidate_ids are not in ascending order; sort them, and the candidates with them")
    own, points = own_positions(query_ids, candidate_ids), as_tensor(candidates, "cpu")
    filled = faiss.deserialize_index(np.frombuffer(index, dtype=np.uint8))
    add_vectors(filled, candidates)
    neighbors = np.empty((len(queries), num_neighbors), dtype=np.int64)
    similarities = np.empty((len(queries), num_neighbors), dtype=np.float32)
    nobody = np.empty(0, dtype=np.int64)
    for start in range(0, len(queries), QUERY_BLOCK):
        rows = slice(start, start + QUERY_BLOCK)
        found = without_own(*search_index(filled, queries[rows], num_neighbors + 1, nobody), own[rows])
        positions, cosines = decided(as_tensor(queries[rows], "cpu"), points, *found, num_neighbors)
        neighbors[rows], similarities[rows] = candidate_ids[positions.numpy()], cosines.numpy()
        if progress is not None:
            progress(len(positions))
    return neighbors, np.clip(similarities, -1.0, 1.0)


def memory_with_index(engine: Engine, num_images: int, num_candidates: int, width: int, num_neighbors: int) -> int:
    """Return the bytes that the search takes at its peak: that of the exact one, which measures it, and the index."""
    return memory_needed(num_images, num_candidates, width, num_neighbors) + index_bytes(engine, num_candidates, width)
