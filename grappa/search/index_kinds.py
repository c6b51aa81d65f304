"""The kinds of search indexes, all of faiss: how each is built, what it costs in memory, and how it is searched.

| kind | search | bytes an image of D dimensions |
|---|---|---|
| flat | exact, by all products | 4 D |
| ivf | the lists whose centroids are nearest, one list in 32 (at least 16) | 4 D + 8 |
| hnsw | along a graph of near neighbours | 4 D + 260 |
| ivfpq | as ivf, on codes of a byte for 4 dimensions; its similarities are estimates | D / 4 + 8 |

``auto`` is flat, and ivf above a number of images. Every kind is built by the same steps from the same vectors, and
gives the same bytes with the same number of threads; the graph of hnsw is built by one thread, since its links depend
on the order of the images.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from grappa.core.memory import FLOAT, INTEGER

Kind = Literal["auto", "flat", "ivf", "hnsw", "ivfpq"]
MIN_PROBES, PROBED_SHARE = 16, 32
LINKS, CONSTRUCTION, EXPLORED = 32, 100, 128  # of hnsw: links an image, candidates when built and when searched
CODE_BITS, CODE_DIMENSIONS = 8, 4  # of ivfpq: a byte for 4 dimensions, as far as the width is a multiple of 4
BLOCK_ROWS = 65536
Found = tuple[NDArray[np.float32], NDArray[np.int64]]


def settled_kind(kind: Kind, num_images: int, ivf_above: int) -> Kind:
    """Return what ``auto`` stands for: ivf above a number of images, else flat; other kinds as they are."""
    if kind != "auto":
        return kind
    return "ivf" if num_images > ivf_above else "flat"


def index_bytes(kind: Kind, num_images: int, width: int) -> int:
    """Return the bytes that an index of a settled kind takes in memory, without the ids; within some per cent."""
    vectors, lists = num_images * width * FLOAT, _num_lists(num_images) * width * FLOAT
    if kind == "flat":
        return vectors
    if kind == "hnsw":
        return vectors + num_images * (2 * LINKS * FLOAT + FLOAT)
    if kind == "ivf":
        return vectors + num_images * INTEGER + lists
    codebooks = 2**CODE_BITS * width * FLOAT
    return num_images * (_num_codes(width) + INTEGER) + lists + codebooks


def megabytes(number: int) -> str:
    """Return a number of bytes as ``12.3 MB``, below 100,000 as ``12.3 kB``."""
    return f"{number / 1e6:.1f} MB" if number >= 100_000 else f"{number / 1e3:.1f} kB"


def empty_index(kind: Kind, embeddings: NDArray[np.float32]) -> Any:
    """Return an index of a settled kind, trained on ``embeddings`` (N, D) where it needs that, without an image."""
    import faiss

    number, width = embeddings.shape
    if kind == "flat":
        return faiss.IndexFlatIP(width)
    if kind == "hnsw":
        graph = faiss.IndexHNSWFlat(width, LINKS, faiss.METRIC_INNER_PRODUCT)
        graph.hnsw.efConstruction, graph.hnsw.efSearch = CONSTRUCTION, EXPLORED
        return graph
    lists, coarse = _num_lists(number), faiss.IndexFlatIP(width)
    index: Any
    if kind == "ivf":
        index = faiss.IndexIVFFlat(coarse, width, lists, faiss.METRIC_INNER_PRODUCT)
    else:
        _check_codes(number)
        codes = _num_codes(width)
        index = faiss.IndexIVFPQ(coarse, width, lists, codes, CODE_BITS, faiss.METRIC_INNER_PRODUCT)
    index.train(embeddings)
    index.nprobe = min(lists, max(MIN_PROBES, lists // PROBED_SHARE))
    return index


def kind_of(index: Any) -> Kind:
    """Return the settled kind of an index."""
    import faiss

    if isinstance(index, faiss.IndexHNSW):
        return "hnsw"
    if isinstance(index, faiss.IndexIVFPQ):
        return "ivfpq"
    return "ivf" if isinstance(index, faiss.IndexIVF) else "flat"


def add_vectors(index: Any, embeddings: NDArray[np.float32]) -> None:
    """Put ``embeddings`` (N, D) behind the images of an index, in place."""
    import faiss

    threads = faiss.omp_get_max_threads()
    if isinstance(index, faiss.IndexHNSW):
        faiss.omp_set_num_threads(1)
    try:
        for start in range(0, len(embeddings), BLOCK_ROWS):
            index.add(np.ascontiguousarray(embeddings[start : start + BLOCK_ROWS], dtype=np.float32))
    finally:
        faiss.omp_set_num_threads(threads)


def search_index(index: Any, queries: NDArray[np.float32], k: int, hidden: NDArray[np.int64]) -> Found:
    """Return the similarities and rows (Q, k) of the images nearest to queries (Q, D); ``hidden`` rows are not found.

    Where the usual search finds fewer than k images, all are searched.
    """
    similarities, rows = _search(index)(queries, k, params=_parameters(index, hidden, whole=False))
    short = np.flatnonzero((rows < 0).any(axis=1))
    if len(short):
        whole = _vectors_of(index)
        found = _search(whole)(queries[short], k, params=_parameters(whole, hidden, whole=True))
        similarities[short], rows[short] = found
    return similarities, rows


def _search(index: Any) -> Any:
    """Return faiss's search of numpy arrays, also where ``faiss.contrib.torch_utils``, which some packages import, has
    put one without parameters in its place."""
    return getattr(index, "search_numpy", index.search)


def _vectors_of(index: Any) -> Any:
    """Return what can be searched in full: the vectors behind the graph of hnsw, else the index itself."""
    import faiss

    return faiss.downcast_index(index.storage) if isinstance(index, faiss.IndexHNSW) else index


def _parameters(index: Any, hidden: NDArray[np.int64], *, whole: bool) -> Any:
    import faiss

    kinds: Any = faiss
    selector = {"sel": kinds.IDSelectorNot(kinds.IDSelectorBatch(hidden))} if len(hidden) else {}
    if isinstance(index, faiss.IndexIVF):
        return kinds.SearchParametersIVF(nprobe=index.nlist if whole else index.nprobe, **selector)
    if isinstance(index, faiss.IndexHNSW):
        return kinds.SearchParametersHNSW(efSearch=index.hnsw.efSearch, **selector)
    return kinds.SearchParameters(**selector) if selector else None


def _num_lists(num_images: int) -> int:
    return max(1, min(num_images, int(4 * num_images**0.5)))  # a list is learned from an image at least


def _num_codes(width: int) -> int:
    """Return the bytes of a code: a quarter of the width, where it is a multiple of 4, else one for each dimension."""
    return width // CODE_DIMENSIONS if width % CODE_DIMENSIONS == 0 else width


def _check_codes(num_images: int) -> None:
    if num_images < 2**CODE_BITS:
        raise ValueError(
            f"an index of the kind ivfpq learns {2**CODE_BITS} codes and needs as many images, found {num_images}; "
            "choose index.kind=flat"
        )
