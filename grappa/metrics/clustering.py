"""How well clusters agree with classes, where labels are known: purity, and mutual information with and without chance.

A domain is judged by its own labelled images: of a cluster that mixes domains, its images of this domain count. Of the
three metrics only the AMI compares partitions of different sizes: many small clusters are pure by chance, and their NMI
is high by chance.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score
from sklearn.metrics.cluster import contingency_matrix

from grappa.core.names import MEAN

METRICS = ["purity", "nmi", "ami"]
COLUMNS = ["domain", "num_images", "num_clusters", *METRICS]


def cluster_metrics(
    pseudo_labels: NDArray[np.int64], *, labels: NDArray[np.object_], domains: NDArray[np.object_]
) -> pd.DataFrame:
    """Compare one partition with the labels, one row a domain, ``_mean`` last.

    pseudo_labels (N,) int64, labels (N,) and domains (N,) belong to the same images; those with a null label take no
    part. A class is a (domain, label) pair. ValueError where the lengths differ.

    Columns:
        domain: sorted; then ``_mean``, the mean over the domains that have labelled images.
        num_images: how many images are labelled; of ``_mean`` their sum.
        num_clusters: how many clusters hold one of these images; of ``_mean`` those that hold one of any domain.
        purity: the share of images whose class is the most frequent one of their cluster, above 0, at most 1.
        nmi: mutual information of clusters and classes / the mean of their two entropies, 0 to 1.
        ami: the same after what clusters and classes of these sizes share by chance is subtracted from both (Vinh et
            al. 2010): 1 for equal partitions, about 0 for random ones, negative below chance.

    nmi and ami are those of scikit-learn: where all images are of one class, both are 1 if they are one cluster, else
    0. The metrics of a domain without labels are NaN. The time of the ami grows with classes x clusters of a domain.
    """
    lengths = {"pseudo_labels": len(pseudo_labels), "labels": len(labels), "domains": len(domains)}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"expected one pseudo-label, label and domain an image, found {lengths}")
    labelled = ~pd.isna(labels)
    rows = []
    for domain in sorted(set(domains)):
        own = labelled & (domains == domain)
        rows.append({"domain": domain} | _agreement(pseudo_labels[own], labels[own]))
    table = pd.DataFrame(rows, columns=COLUMNS)
    counts = {"num_images": int(labelled.sum()), "num_clusters": len(np.unique(pseudo_labels[labelled]))}
    mean = {"domain": MEAN, **counts, **table[METRICS].astype(np.float64).mean()}
    return pd.concat([table, pd.DataFrame([mean])], ignore_index=True)


def _agreement(clusters: NDArray[np.int64], labels: NDArray[np.object_]) -> dict[str, Any]:
    counts = {"num_images": len(clusters), "num_clusters": len(np.unique(clusters))}
    if not len(clusters):
        return counts | dict.fromkeys(METRICS, np.nan)
    classes = pd.factorize(labels)[0]
    largest = contingency_matrix(classes, clusters, sparse=True).max(axis=0)
    return counts | {
        "purity": float(largest.sum() / len(clusters)),
        "nmi": float(normalized_mutual_info_score(classes, clusters)),
        "ami": float(adjusted_mutual_info_score(classes, clusters)),
    }
