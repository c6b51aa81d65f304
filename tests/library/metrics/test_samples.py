"""A sample over domains: even, of hashed ids, nested."""

from __future__ import annotations

import numpy as np
import pytest

from grappa.core.randomness import id_numbers
from grappa.metrics.samples import even_sample

DOMAINS = np.array(["big"] * 100 + ["mid"] * 30 + ["small"] * 4, dtype=object)
IDS = id_numbers([f"image {number}" for number in range(134)])


@pytest.mark.parametrize(
    ("number", "expected"),
    [(12, (4, 4, 4)), (13, (5, 4, 4)), (50, (23, 23, 4)), (100, (66, 30, 4)), (134, (100, 30, 4)), (500, (100, 30, 4))],
)
def test_domains_give_as_many_as_each_other_or_all(number: int, expected: tuple[int, ...]) -> None:
    rows = even_sample(DOMAINS, IDS, number, seed=5)
    assert tuple(np.count_nonzero(DOMAINS[rows] == name) for name in ("big", "mid", "small")) == expected
    assert rows.tolist() == sorted(set(rows.tolist()))


def test_it_depends_on_ids_and_seed_and_not_on_the_order() -> None:
    rows = even_sample(DOMAINS, IDS, 40, seed=5)
    order = np.random.default_rng(0).permutation(134)
    again = even_sample(DOMAINS[order], IDS[order], 40, seed=5)
    assert set(IDS[rows]) == set(IDS[order][again])
    assert set(rows) != set(even_sample(DOMAINS, IDS, 40, seed=6))
    assert set(rows) <= set(even_sample(DOMAINS, IDS, 60, seed=5))


def test_of_none_is_none() -> None:
    assert even_sample(DOMAINS[:0], IDS[:0], 3, seed=0).tolist() == []
