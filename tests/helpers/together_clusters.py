"""What the processes of ``test_shared_points.py`` cluster.

Run as a script, with FOLDER: each rank's results go into the folder.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Any
from unittest import mock

import numpy as np
import torch

from grappa.core.distributed import ALONE, Processes
from grappa.core.randomness import id_numbers
from grappa.search import kmeans, screening, shared_points
from grappa.search.assignment import Assignment
from grappa.search.kmeans import assign, cluster, fill_empty
from grappa.search.shared_points import SharedPoints, own_parts, own_rows
from grappa.search.two_levels import assign_in_two_levels, cluster_in_two_levels

PART_ROWS, MIN_SAMPLE, NUM_SEEDED, NUM_IN_TWO_LEVELS = 256, 2048, 80, 400
CASES = {  # points, clusters, whether bfloat16 screens the centroids
    "few": (2000, 7, False),
    "lists": (1900, 90, False),
    "sample": (9000, 40, False),
    "screened": (1500, 300, True),
    "copies": (1500, 101, False),
    "one_part": (200, 70, False),
}
PART_OF_ROWS = ("pseudo_labels", "distances", "assigned")


def points(name: str) -> np.ndarray[Any, Any]:
    """Return unit vectors around 60 centres; of ``copies`` most are the same one."""
    rng, number = np.random.default_rng(0), CASES[name][0]
    rows = rng.normal(size=(60, 24))[rng.integers(0, 60, number)] + 0.4 * rng.normal(size=(number, 24))
    if name == "copies":
        rows[rng.permutation(number)[150:]] = rows[0]
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def results(processes: Processes = ALONE) -> dict[str, np.ndarray[Any, Any]]:
    """Return all fields of each case's clustering, the labels of the points when assigned again, and a re-seeding."""
    parts = mock.patch.object(shared_points, "PART_ROWS", PART_ROWS)
    with parts, mock.patch.object(kmeans, "MIN_SAMPLE", MIN_SAMPLE):
        assert kmeans._num_first(*CASES["sample"][:2]) < CASES["sample"][0]
        found = {f"{name}/{key}": each for name in CASES for key, each in _result(name, processes).items()}
        further = {"seeded": _seeded(processes), "two_levels": _in_two_levels(processes)}
        return {**found, **{f"{name}/{key}": each for name, fields in further.items() for key, each in fields.items()}}


def _result(name: str, processes: Processes) -> dict[str, np.ndarray[Any, Any]]:
    number, num_clusters, screened = CASES[name]
    features, ids = points(name), np.sort(id_numbers([str(i) for i in range(number)]))
    worthwhile = {"worthwhile": lambda device, columns: screened, "MAX_SHARE": 1}
    with mock.patch.multiple(screening, **worthwhile):
        own = features[own_rows(number, processes)]
        found = cluster(own, num_clusters=num_clusters, ids=ids, processes=processes)
        again = [assign(features[part], found.centroids)[0] for part in own_parts(number, processes)]
    whole = {"assigned": np.concatenate([found.pseudo_labels[:0], *again])}
    return {key: np.asarray(value) for key, value in {**asdict(found), **whole}.items()}


def _seeded(processes: Processes) -> dict[str, np.ndarray[Any, Any]]:
    """Return what becomes of clusters of which all but one are empty; most of the worst-served points are copies."""
    whole = torch.from_numpy(points("copies"))
    own = whole[own_rows(len(whole), processes)]
    shared, centroids = SharedPoints(own, len(whole), processes), (-whole[:1]).repeat(NUM_SEEDED + 1, 1)
    found = Assignment.none(own)
    shared.improve(found, centroids[:1])  # equal columns of a product need not have equal bits
    seeded, number = fill_empty(shared, found, centroids)
    return {"centroids": seeded.numpy(), "pseudo_labels": found.labels.numpy(), "num_reseeded": np.array(number)}


def _in_two_levels(processes: Processes) -> dict[str, np.ndarray[Any, Any]]:
    """Return all fields of a clustering in two levels, what its progress was told, and labels when assigned again."""
    number, seen = CASES["lists"][0], list[int]()
    own, ids = points("lists")[own_rows(number, processes)], np.sort(id_numbers([str(i) for i in range(number)]))
    options: dict[str, Any] = {"processes": processes, "progress": seen.append}
    found, parts = cluster_in_two_levels(own, num_clusters=NUM_IN_TWO_LEVELS, ids=ids, **options)
    labels = [found.pseudo_labels[:0]]
    whole = points("lists")
    labels += [assign_in_two_levels(whole[part], found.centroids, parts)[0] for part in own_parts(number, processes)]
    more = {"assigned": np.concatenate(labels), "coarse": parts.centroids, "first": parts.first}
    told = {"told": np.array([sum(seen) * number / len(own)])}
    return {key: np.asarray(value) for key, value in {**asdict(found), **more, **told}.items()}


if __name__ == "__main__":
    from grappa.pipeline.engine.team import joined

    torch.set_num_threads(1)
    with joined() as team:
        np.savez(f"{sys.argv[1]}/rank{team.rank}.npz", **results(team.processes))
