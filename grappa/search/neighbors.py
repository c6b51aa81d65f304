"""Exact nearest neighbors by cosine similarity, in blocks: never an N x M array, the image itself removed by its id.

A quick product picks more candidates than asked for, and float64 products decide among them. On a CPU that has bfloat16
products these pick every candidate that their error bound leaves open; otherwise float32 products (on a CPU those of
faiss) pick a few more candidates than asked for. Where the last picked candidates cannot be told apart from those left
out (many duplicates, ties), the query is searched once more in full. The result is exact whatever the block size, the
device or the number of threads.
"""

# B queries of a block, C candidates of a block, D width, F fetched candidates, K neighbors, N queries, M candidates,
# P pairs of a query and a candidate that the screening leaves

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from grappa.core.memory import FLOAT, HALF, INTEGER, WORK
from grappa.core.vectors import as_tensor, check_unit_vectors, full_float32
from grappa.search import screening
from grappa.search.screening import Pairs, Rounded

QUERY_BLOCK, CANDIDATE_BLOCK = 1024, 16384
FAISS_BLOCK = 131072  # candidates of a call, which Ctrl-C waits for
GROUP = 16
TIE_BLOCK = 16
RESCORE_BLOCK = 16


def nearest_neighbors(
    queries: NDArray[np.float32],
    candidates: NDArray[np.float32],
    *,
    num_neighbors: int,
    query_ids: NDArray[np.int64],
    candidate_ids: NDArray[np.int64],
    block_size: int = QUERY_BLOCK,
    device: str = "cpu",
    progress: Callable[[int], None] | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return the ids of the K most similar candidates of each query, nearest first, and their similarities.

    queries (N, D) and candidates (M, D) are L2-normalised float32; query_ids (N,) and candidate_ids (M,) are row ids,
    the latter unique. A candidate with the query's own id is left out; exact duplicates under other ids stay. Equal
    float32 similarities are ordered by the lower id. Returns (N, K) int64 ids and (N, K) float32 cosines in [-1, 1].
    ``progress`` is called with the number of queries newly done. ValueError when 1 <= K <= M - 1 does not hold or
    arrays disagree.
    """
    queries, candidates = check_unit_vectors("queries", queries), check_unit_vectors("candidates", candidates)
    check_search(queries, candidates, query_ids, candidate_ids, num_neighbors)
    if block_size < 1:
        raise ValueError(f"block_size is {block_size}; expected at least 1")
    order = np.argsort(candidate_ids, kind="stable")
    if not np.array_equal(order, np.arange(len(order))):
        candidates, candidate_ids = candidates[order], candidate_ids[order]
    own = torch.from_numpy(own_positions(query_ids, candidate_ids)).to(device)
    points = as_tensor(candidates, device)
    neighbors = np.empty((len(queries), num_neighbors), dtype=np.int64)
    similarities = np.empty((len(queries), num_neighbors), dtype=np.float32)
    scratch = torch.empty(min(block_size, len(queries)) * min(CANDIDATE_BLOCK, len(candidates)), device=device)
    blocks = _rounded_blocks(points, num_neighbors)
    with full_float32():
        for start in range(0, len(queries), block_size):
            rows = slice(start, start + block_size)
            asked = as_tensor(queries[rows], device)
            found = _search_screened(asked, points, blocks, own[rows], num_neighbors, scratch)
            found = found or _search(asked, points, own[rows], num_neighbors, scratch)
            neighbors[rows], similarities[rows] = candidate_ids[found[0].cpu().numpy()], found[1].cpu().numpy()
            if progress is not None:
                progress(len(found[0]))
    return neighbors, np.clip(similarities, -1.0, 1.0)


def memory_needed(num_images: int, num_candidates: int, width: int, num_neighbors: int) -> int:
    """Return the bytes that the search takes at its peak.

    Counted are all images, the candidates as given and in bfloat16, the result, and a block of products with its mask.
    """
    vectors = num_images * width * FLOAT + num_candidates * width * (FLOAT + HALF)
    found = num_images * num_neighbors * (INTEGER + FLOAT)
    products = min(QUERY_BLOCK, num_images) * min(CANDIDATE_BLOCK, num_candidates)
    return vectors + found + products * (FLOAT + 1) + WORK // 2


def check_search(
    queries: NDArray[np.float32],
    candidates: NDArray[np.float32],
    query_ids: NDArray[np.int64],
    candidate_ids: NDArray[np.int64],
    num_neighbors: int,
) -> None:
    """ValueError where widths, numbers of ids or the number of neighbors make no sense, or an id is there twice."""
    if queries.shape[1] != candidates.shape[1]:
        raise ValueError(
            f"queries are {queries.shape[1]} wide and candidates {candidates.shape[1]}; give both one width"
        )
    if len(query_ids) != len(queries) or len(candidate_ids) != len(candidates):
        raise ValueError("query_ids and candidate_ids must hold one id a row of queries and candidates")
    if len(np.unique(candidate_ids)) != len(candidate_ids):
        raise ValueError("candidate_ids holds the same id twice; give each candidate its own row id")
    if not 1 <= num_neighbors <= len(candidates) - 1:
        raise ValueError(
            f"num_neighbors is {num_neighbors}, but {len(candidates)} candidates allow 1 to {len(candidates) - 1}"
        )


def own_positions(query_ids: NDArray[np.int64], candidate_ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the position of each query among the (sorted) candidates, -1 for a query that is no candidate."""
    positions = np.minimum(np.searchsorted(candidate_ids, query_ids), len(candidate_ids) - 1)
    return np.where(candidate_ids[positions] == query_ids, positions, -1).astype(np.int64)


def _rounded_blocks(points_MD: torch.Tensor, num_neighbors: int) -> list[Rounded]:
    """Return the candidates in bfloat16, or no block where screening by them saves no time."""
    enough = min(CANDIDATE_BLOCK, len(points_MD)) // GROUP >= 4 * num_neighbors
    if not enough or not screening.worthwhile(points_MD.device, len(points_MD)):
        return []
    return [screening.rounded(block) for block in points_MD.split(CANDIDATE_BLOCK)]


def _search_screened(
    queries_BD: torch.Tensor,
    points_MD: torch.Tensor,
    blocks: list[Rounded],
    own_B: torch.Tensor,
    num_neighbors: int,
    scratch: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return what ``_search`` does, or None without blocks or where too many candidates are equally close."""
    pairs = _screened_pairs(queries_BD, blocks, own_B, num_neighbors, scratch.view(torch.bfloat16)) if blocks else None
    if pairs is None:
        return None
    rows_P, positions_P = pairs
    parts = zip(rows_P.split(screening.PAIR_BLOCK), positions_P.split(screening.PAIR_BLOCK), strict=True)
    exact_P = torch.cat([_cosines(points_MD[places][:, None], queries_BD[rows])[:, 0] for rows, places in parts])
    order = np.lexsort((positions_P.numpy(), -exact_P.numpy(), rows_P.numpy()))
    firsts_B = np.searchsorted(rows_P.numpy(), np.arange(len(queries_BD)))
    chosen_BK = torch.from_numpy(order[firsts_B[:, None] + np.arange(num_neighbors)])
    return positions_P[chosen_BK], exact_P[chosen_BK]


def _screened_pairs(
    queries_BD: torch.Tensor, blocks: list[Rounded], own_B: torch.Tensor, num_neighbors: int, scratch: torch.Tensor
) -> Pairs | None:
    """Return rows and positions (P,), by row, of all candidates that can be among the K most similar.

    The K-th largest of the maxima of groups of candidates is a value that K candidates reach.
    """
    queries, start = screening.rounded(queries_BD), 0
    reached_BK = torch.empty(len(queries_BD), 0)
    found: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    for block in blocks:
        products_BC = scratch[: len(queries_BD) * len(block.vectors)].view(len(queries_BD), -1)
        torch.mm(queries.vectors, block.vectors.T, out=products_BC)
        _hide_own(products_BC, own_B - start)
        reached_BK = torch.cat([reached_BK, _group_maxima(products_BC)], 1).topk(num_neighbors, 1).values
        floors_B = _floors(reached_BK, screening.error_of(queries, block))
        pairs = screening.reaching(products_BC, floors_B)
        if pairs is None:
            return None
        found.append((pairs[0], pairs[1] + start, products_BC[pairs].float()))
        start += len(block.vectors)
    rows_P, positions_P, products_P = (torch.cat(parts) for parts in zip(*found, strict=True))
    floors_B = _floors(reached_BK, max(screening.error_of(queries, block) for block in blocks))
    left = torch.nonzero(products_P >= floors_B[rows_P])[:, 0]
    left = left[rows_P[left].argsort(stable=True)]
    return rows_P[left], positions_P[left]


def _floors(reached_BK: torch.Tensor, error: float) -> torch.Tensor:
    """Return the least bfloat16 product that one of the K most similar candidates can have, (B,)."""
    least_B = reached_BK[:, -1]
    return least_B - 2.0 * (error + screening.half_step(least_B))


def _group_maxima(products_BC: torch.Tensor) -> torch.Tensor:
    """Return the maxima of groups of 16 columns (some are left out), float32; bits are compared as integers."""
    num_groups = products_BC.shape[1] // GROUP
    bits = products_BC.view(torch.int16).numpy()[:, : num_groups * GROUP]
    maxima = bits.reshape(len(bits), GROUP, num_groups).max(1)
    return torch.from_numpy(maxima).view(torch.bfloat16).float()


def _search(
    queries_BD: torch.Tensor, points_MD: torch.Tensor, own_B: torch.Tensor, num_neighbors: int, scratch: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return positions (B, K) and float32 similarities (B, K), exactly sorted."""
    num_points, width = points_MD.shape
    num_fetched = min(num_points, num_neighbors + max(8, num_neighbors // 4))
    fetch = _fetch_by_faiss if queries_BD.device.type == "cpu" else _fetch
    rough_BF, positions_BF = fetch(queries_BD, points_MD, own_B, num_fetched, scratch)
    positions_BK, exact_BK = decided(queries_BD, points_MD, rough_BF, positions_BF, num_neighbors)
    if num_fetched < num_points:
        tolerance = product_tolerance(width)
        unsure = torch.nonzero(exact_BK[:, -1] - rough_BF.amin(1) <= tolerance)[:, 0]
        for rows in unsure.split(TIE_BLOCK):
            floor = exact_BK[rows, -1] - tolerance
            for row, columns in zip(rows, _above(queries_BD[rows], points_MD, own_B[rows], floor), strict=True):
                exact = _dot(points_MD, columns, queries_BD[row])
                best = _sorted(columns[None], exact[None], num_neighbors)
                positions_BK[row], exact_BK[row] = best[0][0], best[1][0]
    return positions_BK, exact_BK


def decided(
    queries_BD: torch.Tensor, points_MD: torch.Tensor, rough_BF: torch.Tensor, positions_BF: torch.Tensor, number: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the ``number`` most similar of the fetched candidates, by exact similarities: positions and these.

    A candidate whose rough similarity is -inf comes last. One whose rough similarity is so low that its exact one
    cannot be among the largest is not computed again.
    """
    rough_BF, order_BF = rough_BF.sort(1, descending=True)
    least_B1 = rough_BF[:, number - 1 : number] - 2.0 * product_tolerance(queries_BD.shape[1])
    kept = int((rough_BF >= least_B1).sum(1).max())
    rough_BF, positions_BF = rough_BF[:, :kept], positions_BF.gather(1, order_BF)[:, :kept]
    exact_BF = _rescore(queries_BD, points_MD, positions_BF).masked_fill(rough_BF == -torch.inf, -torch.inf)
    return _sorted(positions_BF, exact_BF, number)


def product_tolerance(width: int) -> float:
    """Bound, with room to spare, how far a float32 product of two unit vectors lies from the true cosine."""
    return float(2.0 * np.finfo(np.float32).eps * np.sqrt(width))


def _fetch_by_faiss(
    queries_BD: torch.Tensor, points_MD: torch.Tensor, own_B: torch.Tensor, num_fetched: int, scratch: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what ``_fetch`` does, by faiss, which selects while the products are in the CPU's cache."""
    import faiss

    everyone = num_fetched == len(points_MD)
    number, found = num_fetched if everyone else num_fetched + 1, []
    for start, block_CD in zip(range(0, len(points_MD), FAISS_BLOCK), points_MD.split(FAISS_BLOCK), strict=True):
        asked = (queries_BD.numpy(), block_CD.numpy(), min(number, len(block_CD)))
        products, columns = faiss.knn(*asked, metric=faiss.METRIC_INNER_PRODUCT)
        found.append((products, columns + start))
    rough, positions = (np.concatenate(parts, axis=1) for parts in zip(*found, strict=True))
    if len(found) > 1:
        order = np.argsort(-rough, axis=1, kind="stable")[:, :number]
        rough, positions = (np.take_along_axis(each, order, axis=1) for each in (rough, positions))
    if everyone:
        rough[positions == own_B.numpy()[:, None]] = -np.inf
        return torch.from_numpy(rough), torch.from_numpy(positions)
    return without_own(rough, positions, own_B)


def without_own(
    rough_BG: NDArray[np.float32], positions_BG: NDArray[np.int64], own_B: torch.Tensor | NDArray[np.int64]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what faiss found without the query itself, or without the last one where it is not among them: (B, G - 1)
    each."""
    left_out = positions_BG == np.asarray(own_B)[:, None]
    left_out[~left_out.any(1), -1] = True
    kept = (each[~left_out].reshape(len(each), -1) for each in (rough_BG, positions_BG))
    rough, positions = (torch.from_numpy(each) for each in kept)
    return rough, positions


def _fetch(
    queries_BD: torch.Tensor, points_MD: torch.Tensor, own_B: torch.Tensor, num_fetched: int, scratch: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each query's largest float32 products, unsorted: values (B, F), -inf for the query itself, positions.

    ``scratch`` holds the products of a block. To ask for its memory once only saves a CPU 12-20 % of the time.
    """
    values: list[torch.Tensor] = []
    positions: list[torch.Tensor] = []
    for start in range(0, len(points_MD), CANDIDATE_BLOCK):
        block_CD = points_MD[start : start + CANDIDATE_BLOCK]
        products_BC = scratch[: len(queries_BD) * len(block_CD)].view(len(queries_BD), len(block_CD))
        torch.mm(queries_BD, block_CD.T, out=products_BC)
        _hide_own(products_BC, own_B - start)
        top, columns = largest(products_BC, num_fetched)
        values, positions = [*values, top], [*positions, columns + start]
        if len(values) > 1:
            top, columns = torch.cat(values, 1).topk(min(num_fetched, sum(v.shape[1] for v in values)), 1, sorted=False)
            values, positions = [top], [torch.cat(positions, 1).gather(1, columns)]
    return values[0], positions[0]


def _hide_own(products_BC: torch.Tensor, own_B: torch.Tensor) -> None:
    rows = torch.nonzero((own_B >= 0) & (own_B < products_BC.shape[1]))[:, 0]
    products_BC[rows, own_B[rows]] = -torch.inf


def largest(values_BC: torch.Tensor, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the ``number`` (at most C) largest values of each row and their columns, in no order.

    They lie in the groups of 16 columns with the largest maxima, so only these groups are looked at. The values are the
    same as those of a plain top-k, in a fraction of its time on a CPU.
    """
    num_columns = values_BC.shape[1]
    num_groups = num_columns // GROUP
    if num_groups < 4 * number:
        return values_BC.topk(min(number, num_columns), 1, sorted=False)
    maxima = values_BC[:, : num_groups * GROUP].unflatten(1, (GROUP, num_groups)).amax(1)
    groups = maxima.topk(number, 1, sorted=False).indices
    steps = torch.arange(GROUP, device=values_BC.device) * num_groups
    rest = torch.arange(num_groups * GROUP, num_columns, device=values_BC.device).expand(len(values_BC), -1)
    columns = torch.cat([(groups[:, :, None] + steps).flatten(1), rest], 1)
    top = values_BC.gather(1, columns).topk(number, 1, sorted=False)
    return top.values, columns.gather(1, top.indices)


def _rescore(queries_BD: torch.Tensor, points_MD: torch.Tensor, positions_BF: torch.Tensor) -> torch.Tensor:
    blocks = zip(queries_BD.split(RESCORE_BLOCK), positions_BF.split(RESCORE_BLOCK), strict=True)
    return torch.cat([_cosines(points_MD[where], query) for query, where in blocks])


def _cosines(points_BFD: torch.Tensor, queries_BD: torch.Tensor) -> torch.Tensor:
    """Return the float64 products of each query with its F points, (B, F), rounded to float32.

    On a CPU numpy sums each product up in one order, whatever stands beside it: copies of an image are equally similar.
    """
    if queries_BD.device.type != "cpu":
        return torch.einsum("bfd,bd->bf", points_BFD.double(), queries_BD.double()).float()
    points, queries = (part.numpy().astype(np.float64) for part in (points_BFD, queries_BD))
    return torch.from_numpy(np.einsum("bfd,bd->bf", points, queries).astype(np.float32))


def _sorted(positions: torch.Tensor, similarities: torch.Tensor, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sort rows by similarity, largest first, then by the lower position; keep the first ``number`` columns."""
    positions, order = positions.sort(1)
    similarities, order = similarities.gather(1, order).sort(dim=1, descending=True, stable=True)
    return positions.gather(1, order)[:, :number], similarities[:, :number]


def _above(
    queries_BD: torch.Tensor, points_MD: torch.Tensor, own_B: torch.Tensor, floor_B: torch.Tensor
) -> list[torch.Tensor]:
    """Return, for each of a few queries, the positions of all candidates whose product reaches the query's floor."""
    products_BM = queries_BD @ points_MD.T
    _hide_own(products_BM, own_B)
    return [torch.nonzero(products >= floor)[:, 0] for products, floor in zip(products_BM, floor_B, strict=True)]


def _dot(points_MD: torch.Tensor, positions: torch.Tensor, query_D: torch.Tensor) -> torch.Tensor:
    blocks = positions.split(CANDIDATE_BLOCK)
    return torch.cat([_cosines(points_MD[block][None], query_D[None])[0] for block in blocks])
