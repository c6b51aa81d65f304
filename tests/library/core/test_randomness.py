"""Draws belong to (key, image), nothing else."""

from __future__ import annotations

import numpy as np

from grappa.core.randomness import id_numbers, key, shuffled, uniforms

IDS = id_numbers([f"image {i}" for i in range(5000)])


def test_a_draw_depends_on_key_and_id_only() -> None:
    whole = uniforms(key(0, "view"), IDS, 3)
    np.testing.assert_array_equal(uniforms(key(0, "view"), IDS[100:200], 3), whole[100:200])
    np.testing.assert_array_equal(uniforms(key(0, "view"), IDS, 2), whole[:, :2])
    assert not np.array_equal(uniforms(key(1, "view"), IDS, 3), whole)


def test_draws_are_uniform_and_uncorrelated() -> None:
    draws = uniforms(key(3), IDS, 4)
    assert draws.min() >= 0
    assert draws.max() < 1
    np.testing.assert_allclose(draws.mean(0), 0.5, atol=0.02)
    np.testing.assert_allclose(draws.var(0), 1 / 12, atol=0.005)
    assert np.abs(np.corrcoef(draws.T) - np.eye(4)).max() < 0.06


def test_the_order_follows_the_ids_not_the_rows() -> None:
    order = shuffled(key(7), IDS)
    assert sorted(order) == list(range(len(IDS)))
    moved = np.roll(IDS, 13)
    np.testing.assert_array_equal(moved[shuffled(key(7), moved)], IDS[order])


def test_keys_tell_numbers_from_text_and_tuples_apart() -> None:
    assert len({key(1), key("1"), key(1, 1), key(11), key("1", "1")}) == 5
