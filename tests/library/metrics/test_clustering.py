"""Agreement of clusters and classes: examples worked by hand, chance, missing labels, several domains."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from grappa.metrics.clustering import COLUMNS, cluster_metrics


def objects(*values: object) -> np.ndarray:
    return np.array(values, dtype=object)


def one_domain(clusters: list[int], labels: str) -> dict[str, float]:
    """The metrics of one domain, a letter a label."""
    found = cluster_metrics(np.array(clusters), labels=objects(*labels), domains=objects(*["birds"] * len(labels)))
    assert found["domain"].tolist() == ["birds", "_mean"]
    return found.iloc[0, 1:].to_dict()


def test_an_example_worked_by_hand() -> None:
    # Cluster 0 holds a a b, cluster 5 holds b b b: 2 + 3 of 6 images are of the most frequent class of their cluster.
    found = one_domain([0, 0, 0, 5, 5, 5], "aabbbb")
    assert (found["num_images"], found["num_clusters"]) == (6, 2)
    assert found["purity"] == pytest.approx(5 / 6)
    of_classes = -(np.log(1 / 3) / 3 + np.log(2 / 3) * 2 / 3)  # entropy of the classes, as of those in cluster 0
    shared, mean_entropy = of_classes - of_classes / 2, (np.log(2) + of_classes) / 2
    assert found["nmi"] == pytest.approx(shared / mean_entropy)
    # Of two halves drawn by chance, the two images a lie in one (6 of 15 ways: as here) or in both (nothing is shared).
    by_chance = 6 / 15 * shared
    assert found["ami"] == pytest.approx((shared - by_chance) / (mean_entropy - by_chance))


def test_equal_partitions_agree_whatever_their_names() -> None:
    found = one_domain([7, 7, 2, 2, 4], "ccaab")
    assert [found[name] for name in ("purity", "nmi", "ami")] == pytest.approx([1, 1, 1])


def test_only_the_ami_knows_what_chance_gives() -> None:
    random = np.random.default_rng(0)
    labels, domains = random.integers(0, 20, 600).astype(str).astype(object), objects(*["birds"] * 600)
    few, many = (
        cluster_metrics(random.integers(0, number, 600), labels=labels, domains=domains).iloc[0] for number in (5, 300)
    )
    assert few["purity"] < 0.15 and many["purity"] > 0.4
    assert few["nmi"] < 0.1 and many["nmi"] > 0.4
    assert abs(few["ami"]) < 0.02 and abs(many["ami"]) < 0.02


def test_a_domain_is_judged_by_its_own_labelled_images() -> None:
    clusters = np.array([0, 0, 1, 1, 0, 0, 2, 2, 3])
    labels = objects("a", "a", "b", None, "a", "b", "b", "b", None)
    domains = objects(*["cars"] * 4, *["birds"] * 4, "food")
    found = cluster_metrics(clusters, labels=labels, domains=domains)
    assert list(found.columns) == COLUMNS
    table = found.set_index("domain")
    assert list(table.index) == ["birds", "cars", "food", "_mean"]
    assert table["num_images"].tolist() == [4, 3, 0, 7]
    assert table["num_clusters"].tolist() == [2, 2, 0, 3]
    assert table["purity"].tolist()[:2] == [0.75, 1.0], "cluster 0 also holds cars, which are no birds"
    assert table.loc["food", ["purity", "nmi", "ami"]].isna().all()
    for name in ("purity", "nmi", "ami"):
        assert table.loc["_mean", name] == pytest.approx((table.loc["birds", name] + table.loc["cars", name]) / 2)


def test_the_order_of_the_images_changes_nothing() -> None:
    random = np.random.default_rng(0)
    clusters, labels = random.integers(0, 9, 200), random.integers(0, 5, 200).astype(str).astype(object)
    domains, order = objects(*["birds", "cars"] * 100), random.permutation(200)
    first = cluster_metrics(clusters, labels=labels, domains=domains)
    second = cluster_metrics(clusters[order], labels=labels[order], domains=domains[order])
    np.testing.assert_allclose(first.iloc[:, 1:].astype(float), second.iloc[:, 1:].astype(float), rtol=1e-12)


def test_without_labels_nothing_is_known() -> None:
    found = cluster_metrics(np.array([0, 1]), labels=objects(None, np.nan), domains=objects("birds", "cars"))
    assert found["num_images"].tolist() == [0, 0, 0] and found["num_clusters"].tolist() == [0, 0, 0]
    assert found[["purity", "nmi", "ami"]].isna().all(axis=None)


def test_a_class_for_each_image_is_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = one_domain(list(range(300)), "".join(map(chr, range(1000, 1300))))
    assert found["purity"] == 1


def test_a_label_for_each_image_is_asked_for() -> None:
    with pytest.raises(ValueError, match="found {'pseudo_labels': 2, 'labels': 1, 'domains': 2}"):
        cluster_metrics(np.array([0, 1]), labels=objects("a"), domains=objects("birds", "birds"))
