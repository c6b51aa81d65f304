"""Ranks of positives against a full sort: few and many positives, ties, duplicates, both galleries, any block."""

from __future__ import annotations

import numpy as np
import pytest

from grappa.metrics import ranking
from grappa.metrics.ranking import Gallery, ranked


def gallery(number: int, num_classes: int, share_own: float, *, levels: int = 0) -> Gallery:
    """Draw images; with ``levels`` few different vectors, so that most similarities are tied."""
    random = np.random.default_rng(number)
    vectors = random.integers(-levels, levels + 1, (number, 6)) if levels else random.normal(size=(number, 6))
    vectors = vectors + np.array([0.5, 0, 0, 0, 0, 0])
    num_own = round(share_own * number)
    places = random.permutation(number)
    classes = np.concatenate([random.integers(0, num_classes, num_own), np.full(number - num_own, num_classes)])
    return Gallery(
        (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32),
        classes,
        np.concatenate([np.sort(places[:num_own]), np.sort(places[num_own:])]),
        num_own,
    )


def sorted_ranks(found: Gallery, query: int, number: int) -> list[int]:
    """The ranks of the query's positives among the first ``number`` images, by sorting all of them."""
    products = (found.vectors[[query, query]] @ found.vectors.T)[0, :number]
    order = np.lexsort((found.places[:number], -products))
    order = order[order != query]
    return np.flatnonzero(found.classes[order] == found.classes[query]).tolist()


@pytest.mark.parametrize("most_counted", [0, 5, 300])
@pytest.mark.parametrize("levels", [0, 1])
@pytest.mark.parametrize("share_own", [1.0, 0.4])
def test_ranks_are_those_of_a_full_sort(
    share_own: float, levels: int, most_counted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranking, "MOST_COUNTED", most_counted)
    monkeypatch.setattr(ranking, "SEARCH_ELEMENTS", 700)
    found = gallery(230, 20, share_own, levels=levels)
    queries = np.arange(0, found.num_own, 2)
    seen = []
    for block, ranks in ranked(found, queries, block_size=16, num_threads=3):
        for number, query in enumerate(block):
            own, merged = (each[ranks.query == number].tolist() for each in (ranks.own, ranks.merged))
            assert own == sorted_ranks(found, query, found.num_own)
            assert merged == sorted_ranks(found, query, len(found.vectors))
            seen.append(query)
    assert seen == queries.tolist()


@pytest.mark.gpu
def test_a_gpu_finds_the_same_ranks_where_similarities_are_exact() -> None:
    found = gallery(300, 20, 0.5, levels=1)
    vectors = np.round(found.vectors * 64) / 64  # products of such numbers are the same in any order
    found = Gallery(vectors.astype(np.float32), found.classes, found.places, found.num_own)
    queries = np.arange(found.num_own)
    for (_, here), (_, there) in zip(ranked(found, queries), ranked(found, queries, device="cuda"), strict=True):
        np.testing.assert_array_equal(here.own, there.own)
        np.testing.assert_array_equal(here.merged, there.merged)


def test_a_lone_query_has_the_bits_that_it_has_among_others() -> None:
    found = gallery(150, 6, 0.7)
    together = next(ranks.merged for _, ranks in ranked(found, np.arange(3)))
    alone = [ranks.merged for _, ranks in ranked(found, np.arange(3), block_size=1)]
    np.testing.assert_array_equal(together, np.concatenate(alone))


def test_a_block_takes_no_more_than_it_says() -> None:
    assert ranking.num_rows(100) == 256
    assert 4 * ranking.num_rows(10**6) * 10**6 <= 2**28
    assert ranking.num_rows(10**9) == 16 and ranking.num_rows(100, 7) == 7
