from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch

from grappa.search import neighbors, screening
from grappa.search.neighbors import largest, nearest_neighbors


@pytest.fixture(params=["faiss", "bfloat16", "torch"], autouse=True)
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Everything holds with each kind of product, whatever this CPU prefers; those of torch are a GPU's."""
    _take(request.param, monkeypatch)
    return request.param


def _take(products: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screening, "worthwhile", lambda device, num_columns: products == "bfloat16")
    if products == "torch":
        monkeypatch.setattr(neighbors, "_fetch_by_faiss", neighbors._fetch)


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def points(number: int, width: int = 16, seed: int = 0) -> np.ndarray:
    return unit(np.random.default_rng(seed).normal(size=(number, width)))


def exhaustive(queries, candidates, query_ids, candidate_ids, number):
    """The plain definition, one query at a time, in float64."""
    rows, values = [], []
    for query, own in zip(queries.astype(np.float64), query_ids, strict=True):
        similarity = (candidates.astype(np.float64) @ query).astype(np.float32)
        order = [i for i in np.lexsort((candidate_ids, -similarity)) if candidate_ids[i] != own][:number]
        rows.append(candidate_ids[order])
        values.append(similarity[order])
    return np.array(rows), np.array(values)


@pytest.mark.parametrize(("number", "block_size"), [(1, 7), (5, 64), (40, 1024), (299, 50)])
def test_equals_the_exhaustive_search(number: int, block_size: int) -> None:
    features, ids = points(300), np.arange(300)
    found = nearest_neighbors(
        features, features, num_neighbors=number, query_ids=ids, candidate_ids=ids, block_size=block_size
    )
    expected = exhaustive(features, features, ids, ids, number)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_allclose(found[1], expected[1], atol=1e-6)
    assert found[0].dtype == np.int64 and found[1].dtype == np.float32


def test_equals_the_exhaustive_search_across_candidate_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grappa.search.neighbors.CANDIDATE_BLOCK", 512)
    monkeypatch.setattr("grappa.search.neighbors.FAISS_BLOCK", 845)  # the last block has fewer than are fetched
    features, ids = points(1700), np.arange(1700)
    found = nearest_neighbors(features[:40], features, num_neighbors=6, query_ids=ids[:40], candidate_ids=ids)
    np.testing.assert_array_equal(found[0], exhaustive(features[:40], features, ids[:40], ids, 6)[0])


def test_equals_the_exhaustive_search_where_all_are_about_as_close(monkeypatch: pytest.MonkeyPatch) -> None:
    """Similarities differ by less than a bfloat16 product is off by."""
    monkeypatch.setattr(screening, "MAX_SHARE", 1)
    ids = np.arange(2000)
    features = unit(np.eye(1, 24) + 0.3 * points(2000, width=24))
    found = nearest_neighbors(features[:300], features, num_neighbors=1, query_ids=ids[:300], candidate_ids=ids)
    np.testing.assert_array_equal(found[0], exhaustive(features[:300], features, ids[:300], ids, 1)[0])


def test_never_the_image_itself_and_duplicates_stay() -> None:
    features = np.repeat(points(50), 6, axis=0)
    ids = np.arange(300)
    neighbors, similarities = nearest_neighbors(features, features, num_neighbors=5, query_ids=ids, candidate_ids=ids)
    assert not (neighbors == ids[:, None]).any()
    np.testing.assert_array_equal(neighbors // 6, np.repeat(ids[:, None] // 6, 5, axis=1))
    np.testing.assert_allclose(similarities, 1.0, atol=1e-6)


@pytest.mark.parametrize("copies", [3, 90, 400])
def test_ties_go_to_the_lower_id_however_many_there_are(copies: int) -> None:
    features = np.repeat(points(4, width=33), copies, axis=0)
    ids = np.random.default_rng(1).permutation(4 * copies) * 3
    found = nearest_neighbors(features, features, num_neighbors=4, query_ids=ids, candidate_ids=ids)
    np.testing.assert_array_equal(found[0], exhaustive(features, features, ids, ids, 4)[0])


def test_identical_images_only() -> None:
    features, ids = np.repeat(points(1), 500, axis=0), np.arange(500)
    neighbors, _ = nearest_neighbors(features, features, num_neighbors=2, query_ids=ids, candidate_ids=ids)
    assert neighbors[0].tolist() == [1, 2] and neighbors[1].tolist() == [0, 2] and neighbors[499].tolist() == [0, 1]


def test_queries_that_are_no_candidates_keep_all_candidates() -> None:
    features = points(60)
    neighbors, _ = nearest_neighbors(
        features, features[:30], num_neighbors=29, query_ids=np.arange(60), candidate_ids=np.arange(30)
    )
    assert not (neighbors[:30] == np.arange(30)[:, None]).any()
    assert neighbors.max() == 29
    expected = exhaustive(features[30:], features[:30], np.arange(30, 60), np.arange(30), 29)
    np.testing.assert_array_equal(neighbors[30:], expected[0])


@pytest.mark.parametrize("copies", [1, 4, 12])
def test_all_kinds_of_products_give_the_same_bytes(copies: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with copies, and where the last neighbour is one of many that are equally close."""
    features = np.repeat(points(2400 // copies, width=384), copies, axis=0)
    ids = np.random.default_rng(2).permutation(len(features))

    def found(products: str, block_size: int) -> list[bytes]:
        with monkeypatch.context() as patched:
            _take(products, patched)
            result = nearest_neighbors(
                features[:500],
                features,
                num_neighbors=10,
                query_ids=ids[:500],
                candidate_ids=ids,
                block_size=block_size,
            )
        return [part.tobytes() for part in result]

    expected = found("faiss", 1024)
    assert found("bfloat16", 1024) == found("torch", 500) == found("faiss", 77) == found("faiss", 7) == expected


def test_the_group_shortcut_finds_the_largest_values() -> None:
    values = points(20, width=1003)
    found, columns = largest(torch.from_numpy(values), 9)
    np.testing.assert_array_equal(np.sort(found.numpy(), 1), np.sort(values, 1)[:, -9:])
    np.testing.assert_array_equal(np.take_along_axis(values, columns.numpy(), 1), found.numpy())


def test_memory_is_of_the_size_of_a_block(products: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of a block are the largest array: torch is asked for none larger, and numpy holds the results only.

    faiss is asked for the queries of a block, and holds the products of 1,024 candidates at once."""
    seen: list[int] = []
    product = torch.mm

    def spy(left: torch.Tensor, right: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        seen.append(out.numel())
        return product(left, right, out=out)

    monkeypatch.setattr(torch, "mm", spy)
    features, ids = points(4000, width=8), np.arange(4000)
    tracemalloc.start()
    nearest_neighbors(features, features, num_neighbors=3, query_ids=ids, candidate_ids=ids, block_size=100)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert max(seen, default=0) <= 100 * 4000 and bool(seen) == (products != "faiss")
    assert peak < 4000 * 4000


def test_progress_counts_every_query() -> None:
    done: list[int] = []
    features, ids = points(103), np.arange(103)
    nearest_neighbors(
        features,
        features,
        num_neighbors=2,
        query_ids=ids,
        candidate_ids=ids,
        block_size=25,
        progress=done.append,
    )
    assert done == [25, 25, 25, 25, 3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_neighbors": 30}, "30 candidates allow 1 to 29"),
        ({"num_neighbors": 0}, "num_neighbors is 0"),
        ({"candidate_ids": np.zeros(30, dtype=np.int64)}, "the same id twice"),
        ({"query_ids": np.arange(3)}, "one id a row"),
        ({"block_size": 0}, "block_size is 0"),
    ],
)
def test_refuses_what_makes_no_sense(change: dict, message: str) -> None:
    arguments = {"num_neighbors": 3, "query_ids": np.arange(30), "candidate_ids": np.arange(30), **change}
    with pytest.raises(ValueError, match=message):
        nearest_neighbors(points(30), points(30), **arguments)


def test_refuses_vectors_that_are_not_unit_or_not_finite() -> None:
    features, ids = points(30), np.arange(30)
    broken = features.copy()
    broken[4, 2] = np.nan
    with pytest.raises(ValueError, match="row 4"):
        nearest_neighbors(broken, features, num_neighbors=3, query_ids=ids, candidate_ids=ids)
    with pytest.raises(ValueError, match="not of length 1"):
        nearest_neighbors(features, 2 * features, num_neighbors=3, query_ids=ids, candidate_ids=ids)
    with pytest.raises(ValueError, match="one width"):
        nearest_neighbors(features, points(30, width=5), num_neighbors=3, query_ids=ids, candidate_ids=ids)
