"""The ranks of a query's positives among the images of its domain and among all images, from one product.

The rank of a positive is the number of images that are more similar to the query, so no ranking is sorted whole. Where
a query has few positives, the images above each are counted: all similarities are compared with one number, which
vector instructions do. Where it has many, and on a GPU, every similarity is sought among those of the positives. Both
give the ranks of the full ranking, ties included: of equally similar images the one with the lower place comes first.
"""

# B queries of a block, M images of a gallery, D width, R positives of a query, P pairs of a query and a positive

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from grappa.core.memory import FLOAT, INTEGER
from grappa.core.vectors import as_tensor, full_float32

QUERY_BLOCK, MIN_BLOCK, BLOCK_ELEMENTS = 256, 16, 2**26
MOST_COUNTED = 300  # more positives than this are sought in less time than counted
SEARCH_ELEMENTS = 2**19
LARGEST = 2**31 - 1  # the bits of a float32 without its sign, and above every place

Integers = NDArray[np.int64]
Found = tuple[Integers, Integers]  # of one query: the ranks of its positives in its own part, and in the gallery


@dataclass(frozen=True)
class Gallery:
    """Images that are searched: first the ``num_own`` images of the queries' own domain, then all others.

    vectors (M, D) float32, L2-normalised; classes (M,) int64, of which equal ones are positives of each other and lie
    in one part; places (M,) int64, unique, below 2^31, ascending in each of both parts.
    """

    vectors: NDArray[np.float32]
    classes: Integers
    places: Integers
    num_own: int


@dataclass(frozen=True)
class Ranks:
    """The ranks of the positives of B queries, from 0, by query and ascending for each: (P,) int64.

    query: which of the B; own: the rank among the images of its domain; merged: among all images.
    """

    query: Integers
    own: Integers
    merged: Integers


def num_rows(num_images: int, most: int = QUERY_BLOCK) -> int:
    """Return how many queries are compared with so many images at once: 256, or as many as 256 MB hold, at least 16."""
    return max(1, min(most, max(MIN_BLOCK, BLOCK_ELEMENTS // max(num_images, 1))))


def memory_needed(num_images: int, num_threads: int) -> int:
    """Return the bytes of a block of products on a CPU, of a comparison in each thread, and of a search."""
    searched = min(num_rows(num_images) * num_images, max(SEARCH_ELEMENTS, num_images))
    return num_rows(num_images) * num_images * FLOAT + num_threads * num_images + searched * (2 * FLOAT + 3 * INTEGER)


def ranked(
    gallery: Gallery,
    queries: Integers,
    *,
    block_size: int = QUERY_BLOCK,
    device: str = "cpu",
    num_threads: int = 1,
) -> Iterator[tuple[Integers, Ranks]]:
    """Yield ``queries``, positions in the own part, in blocks, each with the ranks of their positives.

    A query is not in its own ranking. On a CPU numpy makes the products and ``num_threads`` count beside each other;
    another ``device`` makes the products in full float32 and searches them itself.
    """
    rows, members = num_rows(len(gallery.vectors), block_size), _members(gallery)
    multiply = _on_cpu(gallery, rows) if device == "cpu" else _on_device(gallery, device)
    splits = np.searchsorted(gallery.places[gallery.num_own :], gallery.places[: gallery.num_own])
    with ThreadPoolExecutor(num_threads) as threads:
        for start in range(0, len(queries), rows):
            block = queries[start : start + rows]
            products_BM = multiply(block)
            products_BM[torch.arange(len(block)), torch.from_numpy(block)] = -torch.inf
            own = (members[gallery.classes[query]] for query in block)
            positives = [each[each != query] for each, query in zip(own, block, strict=True)]
            yield block, _joined(_ranks(products_BM, positives, gallery, splits, threads, num_threads))


def _members(gallery: Gallery) -> list[Integers]:
    """Return the positions of each class's images in the own part, ascending."""
    own = gallery.classes[: gallery.num_own]
    ends = np.cumsum(np.bincount(own, minlength=int(gallery.classes.max(initial=0)) + 1))
    return np.split(np.argsort(own, kind="stable"), ends[:-1])


def _on_cpu(gallery: Gallery, rows: int) -> Callable[[Integers], torch.Tensor]:
    """Return what multiplies a block of queries with all images, into the same memory each time."""
    scratch = np.empty((max(2, min(rows, gallery.num_own)), len(gallery.vectors)), dtype=np.float32)

    def multiply(block: Integers) -> torch.Tensor:
        # The products of a row alone are summed in another order: those of equal images might differ.
        asked = gallery.vectors[block if len(block) > 1 else block.repeat(2)]
        return torch.from_numpy(np.matmul(asked, gallery.vectors.T, out=scratch[: len(asked)])[: len(block)])

    return multiply


def _on_device(gallery: Gallery, device: str) -> Callable[[Integers], torch.Tensor]:
    points_MD = as_tensor(gallery.vectors, device)

    def multiply(block: Integers) -> torch.Tensor:
        with full_float32():
            return points_MD[torch.from_numpy(block).to(device)] @ points_MD.T

    return multiply


def _ranks(
    products_BM: torch.Tensor,
    positives: Sequence[Integers],
    gallery: Gallery,
    splits: Integers,
    threads: ThreadPoolExecutor,
    num_threads: int,
) -> list[Found]:
    """Return what is found of each query of a block: few positives are counted, where that is a CPU's work."""
    on_cpu, found = products_BM.device.type == "cpu", dict[int, Found]()
    few = [row for row, each in enumerate(positives) if on_cpu and len(each) <= MOST_COUNTED]

    def count(rows: list[int]) -> list[Found]:
        above_M = np.empty(products_BM.shape[1], dtype=bool)
        return [_counted(products_BM[row].numpy(), positives[row], gallery, splits, above_M) for row in rows]

    shares = [few[start::num_threads] for start in range(num_threads)]
    for rows, done in zip(shares, threads.map(count, shares), strict=True):
        found.update(zip(rows, done, strict=True))
    many = [row for row in range(len(positives)) if row not in found]
    step = max(1, SEARCH_ELEMENTS // products_BM.shape[1]) if on_cpu else max(1, len(many))
    for start in range(0, len(many), step):
        rows = many[start : start + step]
        found.update(zip(rows, _searched(products_BM[rows], [positives[row] for row in rows], gallery), strict=True))
    return [found[row] for row in range(len(positives))]


def _counted(
    row_M: NDArray[np.float32], positives: Integers, gallery: Gallery, splits: Integers, above_M: NDArray[np.bool_]
) -> Found:
    """Count the images above each positive. An image of a lower place is above it if it is as similar, too."""
    number = gallery.num_own
    own, others = np.empty(len(positives), dtype=np.int64), np.zeros(len(positives), dtype=np.int64)
    for index, position in enumerate(positives):
        value = row_M[position]
        np.greater_equal(row_M[:position], value, out=above_M[:position])
        np.greater(row_M[position:number], value, out=above_M[position:number])
        own[index] = np.count_nonzero(above_M[:number])
        if number < len(row_M):
            split = number + splits[position]
            np.greater_equal(row_M[number:split], value, out=above_M[number:split])
            np.greater(row_M[split:], value, out=above_M[split:])
            others[index] = np.count_nonzero(above_M[number:])
    order = np.argsort(own)
    return own[order], (own + others)[order]


def _searched(products_BM: torch.Tensor, positives: Sequence[Integers], gallery: Gallery) -> list[Found]:
    """Seek every image among the positives of each query: what lies above the r-th lies above those below it, too."""
    device, number = products_BM.device, gallery.num_own
    keys_BM = _keys(products_BM, torch.from_numpy(gallery.places).to(device))
    columns_BR = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(each) for each in positives], batch_first=True)
    lengths_B = torch.tensor([len(each) for each in positives])
    missing_BR = (torch.arange(columns_BR.shape[1]) >= lengths_B[:, None]).to(device)
    sought_BR = keys_BM.gather(1, columns_BR.to(device)).masked_fill_(missing_BR, torch.iinfo(torch.int64).max)
    places_BM = torch.searchsorted(sought_BR.sort(1).values, keys_BM)
    own_BR, others_BR = (_above(part, columns_BR.shape[1]) for part in (places_BM[:, :number], places_BM[:, number:]))
    both = zip(own_BR.cpu().numpy(), (own_BR + others_BR).cpu().numpy(), lengths_B.tolist(), strict=True)
    return [(own[:length][::-1], merged[:length][::-1]) for own, merged, length in both]


def _keys(products_BM: torch.Tensor, places_M: torch.Tensor) -> torch.Tensor:
    """Return (B, M) int64 that are ordered as images are: by similarity, then by place, the lower one above."""
    bits = (products_BM + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    rising = torch.where(bits < 0, bits ^ LARGEST, bits)
    return (rising.long() << 32) | (LARGEST - places_M)


def _above(places_BM: torch.Tensor, num_positives: int) -> torch.Tensor:
    """Return how many images lie above the r-th lowest positive, (B, R): those whose place among them is beyond it."""
    counts = torch.zeros(len(places_BM), num_positives + 1, dtype=torch.int64, device=places_BM.device)
    counts.scatter_add_(1, places_BM, torch.ones_like(places_BM))
    return (places_BM.shape[1] - counts.cumsum(1))[:, :-1]


def _joined(found: Sequence[Found]) -> Ranks:
    query = np.repeat(np.arange(len(found)), [len(own) for own, _ in found])
    return Ranks(query, np.concatenate([own for own, _ in found]), np.concatenate([merged for _, merged in found]))
