"""Embedding heads: the equations in numpy, the temperature, rows in any order, edges, saving."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from grappa.method import head as head_module
from grappa.method.head import (
    Head,
    IdentityHead,
    apply_head,
    automatic_num_centroids,
    fit_neighborhood_head,
    fit_whitening_head,
    mean_perplexity,
    open_head,
)
from grappa.metrics.whitening import fit_whitening
from grappa.search.kmeans import cluster


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def embeddings(number: int = 240, width: int = 12, seed: int = 0) -> np.ndarray:
    """Six far groups, inside each the same few strong directions."""
    random = np.random.default_rng(seed)
    groups = np.random.default_rng(99).normal(size=(6, width))
    spread = random.normal(size=(number, width)) * np.geomspace(1.0, 0.05, width)
    return unit(groups[np.arange(number) % 6] + spread).astype(np.float32)


def ids(number: int = 240) -> np.ndarray:
    return np.random.default_rng(5).permutation(10 * number)[:number].astype(np.uint64)


def neighborhood(z: np.ndarray, centroids: np.ndarray, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    q = np.exp((z @ centroids.T - 1) / temperature)
    q /= q.sum(1, keepdims=True)
    return q @ centroids, np.exp(-(q * np.log(np.maximum(q, 1e-300))).sum(1))


def test_directions_that_few_images_do_not_know_are_not_blown_up() -> None:
    head = fit_neighborhood_head(embeddings(9), ids(9), deviation_power=0.5)
    scales = torch.linalg.eigvalsh(head.deviation_matrix.double())
    assert float(scales.max() / scales.min()) <= (1 / 0.03) ** 0.25 + 1e-5, "they span eight of twelve"


@pytest.mark.parametrize(("power", "weight"), [(0.5, 1.0), (1.0, 0.3), (0.0, 2.0)])
def test_the_head_is_the_equations_in_float64(power: float, weight: float) -> None:
    train, others = embeddings(), embeddings(50, seed=1)
    head = fit_neighborhood_head(train, ids(), deviation_power=power, neighborhood_weight=weight)
    centroids = cluster(train, num_clusters=80, ids=ids()).centroids.astype(np.float64)
    z, new = train.astype(np.float64), others.astype(np.float64)
    local, perplexities = neighborhood(z, centroids, head.temperature)
    np.testing.assert_allclose(np.exp(np.log(perplexities).mean()), 10.0, rtol=1e-6)
    values, axes = np.linalg.eigh(np.cov((z - local).T))
    matrix = axes @ np.diag(np.maximum(values, 3e-2 * values.max()) ** (-power / 2)) @ axes.T
    near, _ = neighborhood(new, centroids, head.temperature)
    a = unit((new - near - (z - local).mean(0)) @ matrix)
    expected = unit(a + weight * unit(near - z.mean(0)))
    found = apply_head(head, others)
    assert (found.dtype, found.shape) == (np.float32, (50, 12))
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_perplexity_is_reached_and_recorded_and_lowered_for_few_centroids() -> None:
    for perplexity in (2.0, 30.0):
        head = fit_neighborhood_head(embeddings(), ids(), perplexity=perplexity)
        np.testing.assert_allclose(head.perplexity, perplexity, rtol=1e-6)
    few = fit_neighborhood_head(embeddings(), ids(), num_centroids=4, perplexity=10.0)
    np.testing.assert_allclose(few.perplexity, 2.5, rtol=1e-6)
    assert few.form()["num_centroids"] == 4


def test_the_temperature_is_found_in_few_passes_over_the_embeddings(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = 0

    def counted(*arguments: Any) -> tuple[float, float]:
        nonlocal passes
        passes += 1
        return entropy(*arguments)

    entropy = head_module._mean_entropy
    monkeypatch.setattr(head_module, "_mean_entropy", counted)
    for perplexity in (1.01, 2.0, 30.0, 39.9):
        passes = 0
        head = fit_neighborhood_head(embeddings(), ids(), perplexity=perplexity)
        np.testing.assert_allclose(head.perplexity, perplexity, rtol=1e-9)
        assert passes < 20


def test_perplexity_is_between_one_and_the_number_of_centroids() -> None:
    cosines = torch.rand(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert mean_perplexity(cosines, 1e-4) == pytest.approx(1.0, abs=1e-3)
    assert mean_perplexity(cosines, 1e2) == pytest.approx(5.0, abs=1e-3)
    assert mean_perplexity(torch.zeros(7, 5, dtype=torch.float64), 1e-4) == pytest.approx(5.0)


def test_the_order_of_the_rows_changes_nothing() -> None:
    train, names, order = embeddings(), ids(), np.random.default_rng(3).permutation(240)
    for one, other in (
        (fit_neighborhood_head(train, names), fit_neighborhood_head(train[order], names[order])),
        (fit_whitening_head(train, names), fit_whitening_head(train[order], names[order])),
    ):
        assert one.form() == other.form()
        for name, value in one.state_dict().items():
            assert torch.equal(value, other.state_dict()[name]), name


def test_blocks_of_rows_change_nothing_but_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fit_neighborhood_head(embeddings(), ids())
    found = apply_head(whole, embeddings())
    monkeypatch.setattr("grappa.method.head.BLOCK_ELEMENTS", {"cpu": 7 * 80})
    blocks = fit_neighborhood_head(embeddings(), ids())
    np.testing.assert_allclose(apply_head(blocks, embeddings()), found, atol=1e-5)
    single = torch.cat([whole(torch.from_numpy(embeddings()[row : row + 1])) for row in range(5)])
    np.testing.assert_allclose(single.numpy(), found[:5], atol=1e-5)


def test_it_tells_like_images_apart_that_share_strong_directions() -> None:
    """Classes differ along a weak direction inside every group; strong shared ones hide them."""
    random, label = np.random.default_rng(2), np.arange(600) // 6 % 2
    groups = 4 * np.random.default_rng(1).normal(size=(6, 16))
    z = groups[np.arange(600) % 6] + random.normal(size=(600, 16)) * np.r_[3.0, 3.0, np.full(14, 0.1)]
    z[:, 15] += label - 0.5
    z = unit(z).astype(np.float32)
    found = apply_head(fit_neighborhood_head(z, np.arange(600, dtype=np.uint64), num_centroids=24), z)
    group = np.arange(600) % 6

    def accuracy(vectors: np.ndarray) -> float:
        cosines = vectors @ vectors.T
        np.fill_diagonal(cosines, -2)
        near = cosines.argmax(1)
        return float(((label[near] == label) & (group[near] == group)).mean())

    assert accuracy(found) > accuracy(z) + 0.05


def test_whitening_is_the_free_competitors_and_identity_changes_nothing() -> None:
    train, others = embeddings(), embeddings(50, seed=1)
    expected = fit_whitening(train, power=0.7).apply(others)
    np.testing.assert_allclose(apply_head(fit_whitening_head(train, ids(), power=0.7), others), expected, atol=1e-5)
    assert apply_head(IdentityHead(), others).tobytes() == others.tobytes()


def heads() -> list[Head]:
    return [IdentityHead(), fit_whitening_head(embeddings(), ids()), fit_neighborhood_head(embeddings(), ids())]


@pytest.mark.parametrize("head", heads(), ids=["none", "whitening", "neighborhood"])
def test_form_and_tensors_give_the_same_head_and_nothing_is_trained(head: Head) -> None:
    again = open_head(head.form(), head.state_dict())
    assert apply_head(again, embeddings()).tobytes() == apply_head(head, embeddings()).tobytes()
    assert again.form() == head.form()
    assert not list(head.parameters())


def test_tensors_that_are_not_a_heads_are_refused() -> None:
    head = fit_neighborhood_head(embeddings(), ids())
    with pytest.raises(ValueError, match="head kind is 'other'"):
        open_head({"kind": "other"}, {})
    with pytest.raises(ValueError, match=r"centroids have shape \(80, 5\), biases \(80,\), the head's width is 12"):
        open_head(head.form(), {**head.state_dict(), "centroids": torch.zeros(80, 5)})
    with pytest.raises(ValueError, match=r"deviation_matrix has shape \(3, 3\), the head's width is 12"):
        open_head(head.form(), {**head.state_dict(), "deviation_matrix": torch.zeros(3, 3)})


def test_few_and_equal_images_have_a_head_too() -> None:
    few = fit_neighborhood_head(embeddings(4), ids(4))
    assert few.form()["num_centroids"] == 2
    np.testing.assert_allclose(np.linalg.norm(apply_head(few, embeddings(4)), axis=1), 1, atol=1e-5)
    copies = np.repeat(embeddings(6), 20, axis=0)
    assert automatic_num_centroids(copies) == 6
    found = apply_head(fit_neighborhood_head(copies, ids(120)), copies)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(found[::20], found[19::20], atol=1e-5)


def test_one_tight_cluster_is_spread_out() -> None:
    tight = unit(1.0 + 0.05 * embeddings()).astype(np.float32)
    head = fit_neighborhood_head(tight, ids())
    np.testing.assert_allclose(head.perplexity, 10.0, rtol=1e-6)
    found = apply_head(head, tight)
    assert (tight @ tight.T).min() > 0.99
    assert (found @ found.T).min() < 0.0


def test_embeddings_that_hardly_differ_keep_a_larger_perplexity() -> None:
    head = fit_neighborhood_head(unit(1.0 + 1e-3 * embeddings()).astype(np.float32), ids())
    assert head.temperature < 1e-5
    assert np.isfinite(apply_head(head, embeddings())).all()


def test_what_makes_no_sense_is_refused_in_a_sentence() -> None:
    constant = unit(np.ones((20, 3))).astype(np.float32)
    with pytest.raises(ValueError, match="20 train embeddings are too few or do not differ.*heads.kind to none"):
        fit_neighborhood_head(constant, ids(20))
    with pytest.raises(ValueError, match="3 train embeddings are too few"):
        fit_neighborhood_head(embeddings(3), ids(3))
    with pytest.raises(ValueError, match="ids holds 1 different ids for 240 rows"):
        fit_neighborhood_head(embeddings(), np.zeros(240, np.uint64))
    for wrong in ({"num_centroids": 1}, {"perplexity": 1.0}, {"deviation_power": 1.5}, {"neighborhood_weight": -1.0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} is {next(iter(wrong.values()))}; expected"):
            fit_neighborhood_head(embeddings(), ids(), **wrong)  # type: ignore[arg-type]


def test_a_row_without_direction_is_named() -> None:
    head = fit_whitening_head(embeddings(), ids())
    head.mean.copy_(torch.from_numpy(embeddings()[3]))
    with pytest.raises(ValueError, match="embeddings row 3 equals the mean"):
        apply_head(head, embeddings())


@pytest.mark.gpu
def test_a_gpu_gives_the_same_head() -> None:
    head = fit_neighborhood_head(embeddings(), ids(), num_centroids=20)
    on_gpu = fit_neighborhood_head(embeddings(), ids(), num_centroids=20, device="cuda")
    expected = apply_head(head, embeddings())
    np.testing.assert_allclose(apply_head(on_gpu, embeddings(), device="cuda"), expected, atol=1e-3)
