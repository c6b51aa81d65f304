from __future__ import annotations

import faiss
import numpy as np
import pytest
import torch

from grappa.search.approximate_neighbors import Engine, approximate_neighbors, memory_with_index, trained_index
from grappa.search.index import num_found
from grappa.search.neighbors import memory_needed, nearest_neighbors

ENGINES: tuple[Engine, ...] = ("ivf", "hnsw")


def points(number: int, width: int = 16, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(number, width))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def found(engine: Engine, features: np.ndarray, own: np.ndarray, number: int = 5) -> tuple[np.ndarray, np.ndarray]:
    return approximate_neighbors(
        features[own],
        features,
        index=trained_index(engine, features),
        num_neighbors=number,
        query_ids=own,
        candidate_ids=np.arange(len(features)),
    )


def exact(features: np.ndarray, own: np.ndarray, number: int = 5) -> tuple[np.ndarray, np.ndarray]:
    ids = np.arange(len(features))
    return nearest_neighbors(features[own], features, num_neighbors=number, query_ids=own, candidate_ids=ids)


@pytest.mark.parametrize("engine", ENGINES)
def test_what_is_found_has_exact_similarities_in_exact_order(engine: Engine) -> None:
    features, own = points(3000), np.arange(0, 3000, 7)
    neighbors, similarities = found(engine, features, own)
    known, values = exact(features, own)
    assert neighbors.dtype == np.int64 and similarities.dtype == np.float32
    assert not (neighbors == own[:, None]).any()
    assert num_found(similarities, values) > 0.95 * values.size
    same = (neighbors == known).all(axis=1)
    assert same.mean() > 0.8
    np.testing.assert_array_equal(similarities[same], values[same])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("number", [2, 3, 7, 15, 40])
def test_few_images_are_all_found(engine: Engine, number: int) -> None:
    """Fewer than an inverted file has lists, and than the neighbours that are asked for have room."""
    features, own = points(number), np.arange(number)
    for found_by, known in zip(found(engine, features, own, number - 1), exact(features, own, number - 1), strict=True):
        np.testing.assert_array_equal(found_by, known)


@pytest.mark.parametrize("engine", ENGINES)
def test_copies_are_found_the_lower_id_first_and_never_the_image_itself(engine: Engine) -> None:
    features, own = np.repeat(points(60), 4, axis=0), np.arange(240)
    neighbors, similarities = found(engine, features, own, 3)
    expected = [[row for row in range(4 * (i // 4), 4 * (i // 4) + 4) if row != i] for i in own]
    np.testing.assert_array_equal(neighbors, expected)
    np.testing.assert_allclose(similarities, 1.0, atol=1e-6)


@pytest.mark.parametrize("engine", ENGINES)
def test_threads_and_companions_change_nothing(engine: Engine) -> None:
    features, before = points(4000, width=64), (torch.get_num_threads(), faiss.omp_get_max_threads())
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            faiss.omp_set_num_threads(threads)
            results.append((trained_index(engine, features), *found(engine, features, np.arange(300))))
    finally:
        torch.set_num_threads(before[0])
        faiss.omp_set_num_threads(before[1])
    for index, neighbors, similarities in results[1:]:
        assert index == results[0][0]
        np.testing.assert_array_equal(neighbors, results[0][1])
        np.testing.assert_array_equal(similarities, results[0][2])
    alone = [found(engine, features, np.arange(row, row + 1)) for row in (0, 299)]
    for row, (neighbors, similarities) in zip((0, 299), alone, strict=True):
        np.testing.assert_array_equal(neighbors[0], results[0][1][row])
        np.testing.assert_array_equal(similarities[0], results[0][2][row])


def test_a_recall_counts_what_is_as_near_as_the_last_of_the_exact_answer() -> None:
    values = np.array([[0.9, 0.8, 0.7], [0.5, 0.4, 0.3]], dtype=np.float32)
    assert num_found(values, values) == 6
    assert num_found(np.array([[0.9, 0.7, 0.6], [0.2, 0.1, 0.0]], dtype=np.float32), values) == 2


def test_the_memory_of_the_index_comes_on_top() -> None:
    sizes = (1000, 1000, 64, 5)
    vectors = 1000 * 64 * 4
    assert all(memory_with_index(engine, *sizes) > memory_needed(*sizes) + vectors for engine in ENGINES)


def test_candidates_out_of_order_are_refused() -> None:
    features = points(30)
    with pytest.raises(ValueError, match="candidate_ids are not in ascending order"):
        approximate_neighbors(
            features,
            features,
            index=trained_index("ivf", features),
            num_neighbors=3,
            query_ids=np.arange(30),
            candidate_ids=np.arange(30)[::-1].copy(),
        )
