from __future__ import annotations

import numpy as np
import pytest

from grappa.core.randomness import id_numbers
from grappa.search.sampling import balanced_order


def material() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Coarse clusters of 600, 90 and 10 images, the first of three fine clusters of 500, 95 and 5."""
    coarse = np.repeat([0, 1, 2], [600, 90, 10])
    fine = np.concatenate([np.repeat([0, 1, 2], [500, 95, 5]), np.full(90, 3), np.full(10, 4)])
    return coarse, fine, id_numbers([f"image {i}" for i in range(700)])


def test_a_sample_is_spread_over_the_clusters_of_every_level_as_evenly_as_their_sizes_allow() -> None:
    coarse, fine, ids = material()
    order = balanced_order([coarse, fine], ids, seed=0)
    assert sorted(order) == list(range(700))
    assert np.bincount(coarse[order[:12]]).tolist() == [4, 4, 4]
    assert np.bincount(coarse[order[:130]]).tolist() == [60, 60, 10]
    assert np.bincount(fine[order[:130]]).tolist() in ([28, 27, 5, 60, 10], [27, 28, 5, 60, 10])


def test_the_draws_belong_to_the_images_and_the_seed() -> None:
    coarse, fine, ids = material()
    first = balanced_order([coarse, fine], ids, seed=0)
    mixed = np.random.default_rng(0).permutation(700)
    again = mixed[balanced_order([coarse[mixed], fine[mixed]], ids[mixed], seed=0)]
    assert again.tolist() == first.tolist()
    other = balanced_order([coarse, fine], ids, seed=1)
    assert set(other[:130]) != set(first[:130])


def test_cells_that_are_numbered_otherwise_give_the_same_sample() -> None:
    coarse, fine, ids = material()
    renamed = np.array([7, 3, 5])[coarse]
    assert balanced_order([renamed, fine], ids, seed=0).tolist() == balanced_order([coarse, fine], ids, seed=0).tolist()


def test_arrays_that_disagree_are_refused() -> None:
    coarse, fine, ids = material()
    with pytest.raises(ValueError, match="give all one length"):
        balanced_order([coarse[:5], fine], ids, seed=0)
    with pytest.raises(ValueError, match="the same number twice"):
        balanced_order([coarse], np.zeros(700, np.uint64), seed=0)
