from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits

from grappa.core.randomness import id_numbers
from grappa.search import assignment, cluster_start, screening
from grappa.search import kmeans as cluster_steps
from grappa.search.assignment import Assignment
from grappa.search.cluster_means import Sums
from grappa.search.kmeans import assign, cluster, cluster_health, cluster_many, num_assignments
from grappa.search.shared_points import SharedPoints
from grappa.search.shortlists import Shortlists
from tests.helpers.rounding import sum_error


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def names(number: int) -> np.ndarray:
    return id_numbers([f"image {i}" for i in range(number)])


def blobs(number: int, centers: int, width: int, spread: float, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    means = unit(random.normal(size=(centers, width)))
    return unit(means[random.integers(0, centers, number)] + spread * random.normal(size=(number, width)) / width**0.5)


def objective(features: np.ndarray, labels: np.ndarray) -> float:
    """Mean cosine of the images to the normalised mean of their cluster."""
    sums = np.zeros((labels.max() + 1, features.shape[1]))
    np.add.at(sums, labels, features)
    return float(np.linalg.norm(sums, axis=1).sum() / len(features))


DATA = {
    "digits": unit(load_digits().data - load_digits().data.mean(0)),
    "blobs": blobs(2000, 40, 32, 0.3),
    "noise": unit(np.random.default_rng(0).normal(size=(1500, 24))),
}


@pytest.mark.parametrize("name", list(DATA))
@pytest.mark.parametrize("num_clusters", [2, 40, 300])
def test_objective_is_that_of_scikit_learn(name: str, num_clusters: int) -> None:
    features = DATA[name]
    ours = cluster(features, num_clusters=num_clusters, ids=names(len(features)))
    labels = KMeans(num_clusters, n_init=1, random_state=0).fit(features).labels_
    assert objective(features, ours.pseudo_labels) >= 0.995 * objective(features, labels)
    assert ours.objective == pytest.approx(objective(features, ours.pseudo_labels), rel=2e-3)


def test_fields_agree_with_each_other() -> None:
    features = DATA["blobs"]
    found = cluster(features, num_clusters=25, ids=names(len(features)))
    assert found.pseudo_labels.dtype == np.int64 and found.pseudo_labels.shape == (2000,)
    assert found.pseudo_labels.min() >= 0 and found.pseudo_labels.max() < 25
    np.testing.assert_array_equal(found.sizes, np.bincount(found.pseudo_labels, minlength=25))
    np.testing.assert_allclose(np.linalg.norm(found.centroids, axis=1), 1.0, atol=1e-5)
    cosines = (features * found.centroids[found.pseudo_labels]).sum(1)
    np.testing.assert_allclose(found.distances, 1.0 - cosines, atol=1e-5)
    assert found.objective == pytest.approx(cosines.mean(), abs=1e-5)


def test_labels_are_those_of_the_nearest_centroid() -> None:
    features = DATA["digits"]
    found = cluster(features, num_clusters=30, ids=names(len(features)))
    labels, distances = assign(features, found.centroids)
    np.testing.assert_array_equal(labels, found.pseudo_labels)
    np.testing.assert_allclose(distances, found.distances, atol=1e-6)
    np.testing.assert_array_equal(labels, (features @ found.centroids.T).argmax(1))


def test_the_order_of_the_rows_changes_nothing() -> None:
    features, ids = DATA["digits"], names(len(DATA["digits"]))
    order = np.random.default_rng(3).permutation(len(ids))
    plain = cluster(features, num_clusters=50, ids=ids)
    shuffled = cluster(features[order], num_clusters=50, ids=ids[order])
    np.testing.assert_array_equal(plain.pseudo_labels[order], shuffled.pseudo_labels)
    np.testing.assert_array_equal(plain.centroids, shuffled.centroids)


def test_a_result_depends_on_its_own_k_only() -> None:
    features, ids = DATA["blobs"], names(2000)
    together = cluster_many(features, [8, 300, 33], ids=ids, seed=5)
    for num_clusters, found in zip([8, 300, 33], together, strict=True):
        alone = cluster(features, num_clusters=num_clusters, ids=ids, seed=5)
        np.testing.assert_array_equal(found.pseudo_labels, alone.pseudo_labels)
        np.testing.assert_array_equal(found.centroids, alone.centroids)


def test_the_seed_matters_and_repeats() -> None:
    features, ids = DATA["noise"], names(1500)
    first, again, other = (cluster(features, num_clusters=60, ids=ids, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.pseudo_labels, again.pseudo_labels)
    assert (first.pseudo_labels != other.pseudo_labels).any()


def test_no_cluster_is_empty_among_heavy_duplicates() -> None:
    features = np.concatenate([np.repeat(DATA["noise"][:1], 900, axis=0), DATA["noise"][1:101]])
    found = cluster(features, num_clusters=101, ids=names(1000))
    assert cluster_health(found.sizes).num_empty == 0
    assert found.sizes.max() == 900
    np.testing.assert_allclose(found.distances, 0.0, atol=1e-5)


def test_empty_clusters_are_seeded_on_the_worst_served_points() -> None:
    points = torch.from_numpy(DATA["noise"][:50].copy())
    centroids = points[[0, 0, 0]]
    found = Assignment(*assignment.nearest(points, centroids, lambda _: None))
    assert found.labels.unique().tolist() == [0]
    cosines = found.cosines.clone()
    new_centroids, number = cluster_steps.fill_empty(SharedPoints.alone(points), found, centroids)
    torch.testing.assert_close(new_centroids[1:], points[cosines.argsort()[:2]])
    assert number == 2 and found.labels.unique().tolist() == [0, 1, 2]
    assert (found.cosines >= cosines).all()


@pytest.mark.parametrize("seed", range(4))
def test_points_that_are_not_nearest_to_themselves_end_too(seed: int) -> None:
    random = np.random.default_rng(seed)
    few = np.repeat(unit(random.normal(size=(4, 4))), 13, axis=0)
    points = (few + 1e-4 * random.normal(size=few.shape)) * random.uniform(0.991, 1.009, (52, 1))
    found = cluster(points.astype(np.float32), num_clusters=26, ids=names(52), num_iterations=5)
    assert len(found.pseudo_labels) == 52 and found.pseudo_labels.max() < 26


def test_an_empty_cluster_is_not_seeded_by_emptying_another() -> None:
    """The worst-served image of all is alone in its cluster, and stays there."""
    alone, group = (
        unit(np.array([[0.0, 1.0, 1.0]])),
        unit(np.array([[1.0, 0.3, 0.0], [1.0, 0.0, 0.1], [1.0, 0.1, 0.0]])),
    )
    points = torch.from_numpy(np.concatenate([alone, group]))
    centroids = torch.eye(3)[[1, 0, 0]]
    found = Assignment(torch.tensor([0, 1, 1, 1]), (points * centroids[[0, 1, 1, 1]]).sum(1))
    assert found.cosines.argmin() == 0
    new_centroids, number = cluster_steps.fill_empty(SharedPoints.alone(points), found, centroids)
    assert number == 1 and found.labels.tolist() == [0, 2, 1, 1]
    torch.testing.assert_close(new_centroids, torch.stack([centroids[0], centroids[1], points[1]]))


def screen_always(monkeypatch: pytest.MonkeyPatch, *, share: int = 1) -> None:
    """Use bfloat16 screening on any CPU, however few centroids; one pair in ``share`` at most is looked at again."""
    monkeypatch.setattr(screening, "worthwhile", lambda device, num_columns: True)
    monkeypatch.setattr(screening, "MAX_SHARE", share)


@pytest.mark.parametrize("name", list(DATA))
@pytest.mark.parametrize("share", [1, 64])
def test_screening_changes_no_result(name: str, share: int, monkeypatch: pytest.MonkeyPatch) -> None:
    features = DATA[name]
    plain = cluster(features, num_clusters=30, ids=names(len(features)))
    screen_always(monkeypatch, share=share)
    screened = cluster(features, num_clusters=30, ids=names(len(features)))
    np.testing.assert_array_equal(screened.pseudo_labels, plain.pseudo_labels)
    np.testing.assert_allclose(screened.distances, plain.distances, atol=sum_error(features.shape[1]))
    np.testing.assert_allclose(screened.centroids, plain.centroids, atol=sum_error(features.shape[1]))


def test_screening_misses_no_nearest_centroid_among_near_ties(monkeypatch: pytest.MonkeyPatch) -> None:
    """All centroids lie within the error of a bfloat16 product, on both sides of 0."""
    random = np.random.default_rng(0)
    centroids = unit(np.eye(1, 48) + 3e-3 * random.normal(size=(200, 48)))
    features = unit(np.concatenate([centroids[:100], -centroids[100:]]) + 1e-3 * random.normal(size=(200, 48)))
    exact = features.astype(np.float64) @ centroids.astype(np.float64).T
    screen_always(monkeypatch)
    labels, distances = assign(features, centroids)
    np.testing.assert_allclose(1.0 - distances, exact.max(1), atol=sum_error(48))
    np.testing.assert_allclose(exact[np.arange(200), labels], exact.max(1), atol=sum_error(48))


def gains(points: torch.Tensor, near: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    shared = SharedPoints.alone(points)
    return cluster_start._sampled_gains(shared, near, candidates, len(points))[0] / shared.unit


def test_gains_of_a_further_centroid_are_the_same_by_screening(monkeypatch: pytest.MonkeyPatch) -> None:
    points = torch.from_numpy(DATA["noise"].copy())
    near = (points @ points[:20].T).amax(1)
    plain = gains(points, near, points[100:300])
    by_hand = (points @ points[100:300].T - near[:, None]).clamp_min(0.0).sum(0)
    torch.testing.assert_close(plain, by_hand.double(), rtol=1e-5, atol=1e-5)
    screen_always(monkeypatch)
    torch.testing.assert_close(gains(points, near, points[100:300]), plain, rtol=1e-5, atol=1e-5)


def test_copies_of_a_centroid_are_no_pairs() -> None:
    """Rounding makes some of their products larger than others, and there can be a great many of them."""
    points = torch.from_numpy(np.repeat(DATA["noise"][:7], 301, axis=0))
    near = torch.cat([(rows * rows).sum(1) for rows in points.split(100)]) - 1e-7
    assert len(cluster_start._nearer(points, near, points[::301]).products) == 0


@pytest.mark.parametrize("screened", [False, True])
@pytest.mark.parametrize("sample", [300, 1500])
def test_the_start_knows_the_nearest_centroid_of_each_point(
    sample: int, screened: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the points of the sample and of the others; no product of the sample's points is computed twice."""
    monkeypatch.setattr(cluster_start, "MIN_SAMPLE", sample)
    monkeypatch.setattr(cluster_start, "SAMPLE_PER_CENTROID", 0)
    if screened:
        screen_always(monkeypatch)
    compared, product = [], torch.mm

    def spy(left: torch.Tensor, right: torch.Tensor, **options: torch.Tensor) -> torch.Tensor:
        compared.append(len(left) * right.shape[1])
        return product(left, right, **options)

    monkeypatch.setattr(torch, "mm", spy)
    points = torch.from_numpy(DATA["noise"].copy())
    centroids, found = cluster_start.start(SharedPoints.alone(points), names(1500), 60, 7)
    candidates, kept = sample * cluster_start.NUM_TRIALS * 60, (1500 - sample) * 60
    if not screened:
        assert sum(compared) == candidates + kept + sample, "those of the first centroid are computed twice"
    exact = points.double() @ centroids.double().T
    torch.testing.assert_close(found.cosines.double(), exact.amax(1), atol=sum_error(24), rtol=0)
    torch.testing.assert_close(exact.gather(1, found.labels[:, None])[:, 0], exact.amax(1), atol=sum_error(24), rtol=0)


@pytest.mark.parametrize("name", list(DATA))
def test_an_update_after_few_centroids_moved_is_a_whole_search(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assignment, "MIN_CENTROIDS", 1)
    points = torch.from_numpy(DATA[name].copy())
    centroids = points[:90].clone()
    found = Assignment(*assignment.nearest(points, centroids, lambda _: None))
    changed = torch.arange(90) % 5 == 0
    centroids[changed] = torch.from_numpy(unit(centroids[changed].numpy() + 0.3 * points[300:318].numpy()))
    done: list[int] = []
    assignment.reassign(found, points, centroids, changed, done.append)
    labels, cosines = assignment.nearest(points, centroids, lambda _: None)
    assert sum(done) == len(points)
    torch.testing.assert_close(found.cosines, cosines, atol=sum_error(points.shape[1]), rtol=0)
    assert (found.labels == labels).double().mean() > 0.999  # but for exact duplicates among the centroids


def test_opposite_points_in_one_cluster_do_not_break_the_mean() -> None:
    features = np.array([[1, 0], [-1, 0], [1, 0], [-1, 0]], dtype=np.float32)
    found = cluster(features, num_clusters=1, ids=names(4))
    np.testing.assert_allclose(np.linalg.norm(found.centroids, axis=1), 1.0)
    assert found.distances.max() == pytest.approx(2.0)


def test_sums_kept_up_to_date_are_those_added_up_anew() -> None:
    """To the last bit, and in any order of the points; an emptied cluster keeps its centroid."""
    rows, labels = torch.from_numpy(DATA["blobs"].copy()), torch.arange(2000) % 7
    later, centroids = torch.where(torch.arange(2000) % 49 == 5, 3, labels), torch.eye(9, 32)
    later[labels == 6] = 0
    points, sums = SharedPoints.alone(rows), Sums()
    sums.means(points, labels, centroids)
    updated, anew = sums.means(points, later, centroids), Sums().means(points, later, centroids)
    assert torch.equal(updated, anew) and torch.equal(updated[6:], centroids[6:])
    order = torch.from_numpy(np.random.default_rng(0).permutation(2000))
    assert torch.equal(Sums().means(SharedPoints.alone(rows[order]), later[order], centroids), updated)
    exact = torch.zeros(9, 32).double().index_add_(0, later, rows.double())[:6]
    torch.testing.assert_close(updated[:6].double(), exact / exact.norm(dim=1, keepdim=True), atol=1e-7, rtol=0)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", list(DATA))
def test_lists_of_near_centroids_give_the_answer_of_a_full_search(name: str, seed: int) -> None:
    """Whatever moves: little, some far, a centroid that jumps onto another one's points, and back."""
    points, random = torch.from_numpy(DATA[name].copy()), np.random.default_rng(seed)
    centroids = torch.from_numpy(unit(DATA[name][random.permutation(len(points))[:90]]))
    found, lists = Assignment.none(points), Shortlists()
    lists.reassign(found, points, centroids, torch.ones(90, dtype=torch.bool))
    used = 0
    for spread in (0.002, 0.01, 0.05, 0.3, 0.01, 0.002):
        moves = spread * random.normal(size=centroids.shape) / centroids.shape[1] ** 0.5
        moves[random.permutation(90)[:4]] *= 40.0
        stood, centroids = centroids, torch.from_numpy(unit(centroids.numpy() + moves))
        before = lists.reference
        lists.reassign(found, points, centroids, (centroids != stood).any(1))
        used += lists.reference is before
        _, cosines = assignment.nearest(points, centroids, lambda _: None)
        torch.testing.assert_close(found.cosines, cosines, atol=sum_error(points.shape[1]), rtol=0)
        own = (points * centroids[found.labels]).sum(1)
        torch.testing.assert_close(own, cosines, atol=sum_error(points.shape[1]), rtol=0)
    assert used


def test_lists_are_first_made_when_more_than_a_few_centroids_have_moved() -> None:
    """The answer is that of a full search with lists and without."""
    points, random = torch.from_numpy(DATA["blobs"].copy()), np.random.default_rng(0)
    centroids = points[:400].clone()
    found, lists = Assignment(*assignment.nearest(points, centroids, lambda _: None)), Shortlists()
    for number, made in ((20, False), (20, False), (300, True), (20, True)):
        stood, moves = centroids, 0.1 * random.normal(size=(number, 32)) / 32**0.5
        centroids = stood.clone()
        centroids[:number] = torch.from_numpy(unit(centroids[:number].numpy() + moves))
        lists.reassign(found, points, centroids, (centroids != stood).any(1))
        assert (lists.reference is not None) == made
        labels, cosines = assignment.nearest(points, centroids, lambda _: None)
        torch.testing.assert_close(found.cosines, cosines, atol=sum_error(32), rtol=0)
        assert (found.labels == labels).double().mean() > 0.999


def test_a_sample_makes_the_first_iterations_of_many_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else changes: order-independent, every label that of the nearest centroid, about as good."""
    for module in (cluster_steps, cluster_start):
        monkeypatch.setattr(module, "MIN_SAMPLE", 2048)
    features, ids = blobs(9000, 60, 32, 0.5), names(9000)
    order, seen = np.random.default_rng(3).permutation(9000), []
    found = cluster(features, num_clusters=40, ids=ids, progress=seen.append)
    assert sum(seen) == num_assignments(9000, [40], 20)
    shuffled = cluster(features[order], num_clusters=40, ids=ids[order])
    np.testing.assert_array_equal(found.pseudo_labels[order], shuffled.pseudo_labels)
    np.testing.assert_array_equal((features @ found.centroids.T).argmax(1), found.pseudo_labels)
    for module in (cluster_steps, cluster_start):
        monkeypatch.setattr(module, "MIN_SAMPLE", 9000)
    whole = cluster(features, num_clusters=40, ids=ids)
    assert found.objective > 0.985 * whole.objective  # over eight seeds .987 to 1.004, and .9965 in the mean


def test_a_sample_is_a_quarter_at_most_and_large_enough_for_its_clusters() -> None:
    assert cluster_steps._num_first(50_000, 128) == 12_500
    assert cluster_steps._num_first(10**6, 128) == 128 * 128
    assert cluster_steps._num_first(8_831, 125) == 8_831, "a larger share of few images ends at worse clusters"
    assert cluster_steps._num_first(50_000, 512) == 50_000, "too few images for each cluster"


def test_products_stay_within_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(assignment.BLOCK_ELEMENTS, "cpu", 5000)
    sizes: list[int] = []
    product = torch.mm

    def spy(left: torch.Tensor, right: torch.Tensor, **options: torch.Tensor) -> torch.Tensor:
        result = product(left, right, **options)
        sizes.append(result.numel())
        return result

    monkeypatch.setattr(torch, "mm", spy)
    features = DATA["noise"]
    found = cluster(features, num_clusters=200, ids=names(1500), num_iterations=3)
    assert max(sizes) <= 5000 and found.sizes.sum() == 1500


def test_progress_sums_to_the_announced_number() -> None:
    done: list[int] = []
    features = DATA["blobs"]
    cluster_many(features, [5, 300], ids=names(2000), num_iterations=7, progress=done.append)
    assert sum(done) == num_assignments(2000, [5, 300], 7)


def test_half_as_many_clusters_as_images_work() -> None:
    features = DATA["noise"][:200]
    found = cluster(features, num_clusters=100, ids=names(200))
    assert (found.sizes > 0).all()


def test_health_counts() -> None:
    health = cluster_health(np.array([0, 1, 1, 6, 2]))
    assert (health.num_clusters, health.num_empty, health.num_singletons) == (5, 1, 2)
    assert health.largest_share == pytest.approx(0.6) and health.median_size == 1.0


@pytest.mark.parametrize(
    ("num_clusters", "message"),
    [([51], "at most 50"), ([101], "at most 50"), ([0], "at least 1"), ([], "empty"), ([5, 51], "at most 50")],
)
def test_refuses_a_k_that_makes_no_sense(num_clusters: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cluster_many(DATA["noise"][:100], num_clusters, ids=names(100))


def test_refuses_too_few_different_images_and_repeated_ids() -> None:
    features = np.repeat(DATA["noise"][:10], 10, axis=0)
    with pytest.raises(ValueError, match="only 10 of 100 images differ"):
        cluster(features, num_clusters=11, ids=names(100))
    with pytest.raises(ValueError, match="1 different ids for 100"):
        cluster(DATA["noise"][:100], num_clusters=5, ids=np.zeros(100, dtype=np.uint64))
    with pytest.raises(ValueError, match="not of length 1"):
        cluster(3 * DATA["noise"][:100], num_clusters=5, ids=names(100))
    with pytest.raises(ValueError, match="cluster again"):
        assign(DATA["noise"], DATA["blobs"][:5])
