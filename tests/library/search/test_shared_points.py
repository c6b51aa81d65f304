"""Clusters of several processes are those of one, bit for bit, and each process holds its own rows only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from grappa.core.distributed import Processes
from grappa.search import shared_points
from grappa.search.kmeans import cluster, memory_needed
from grappa.search.shared_points import SharedPoints, most_rows, own_parts, own_rows
from tests.helpers.together import start
from tests.helpers.together_clusters import CASES, NUM_SEEDED, PART_OF_ROWS, PART_ROWS, results

Results = dict[str, np.ndarray[Any, Any]]


@pytest.fixture(scope="module")
def alone() -> Results:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = results()
    torch.set_num_threads(threads)
    return found


@pytest.fixture(scope="module", params=[2, 3])
def together(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    folder: Path = tmp_path_factory.mktemp("together")
    ended = start(request.param, "-m", "tests.helpers.together_clusters", str(folder))
    assert [(each.code, each.text) for each in ended] == [(0, "")] * request.param
    return [dict(np.load(folder / f"rank{rank}.npz")) for rank in range(request.param)]


@pytest.mark.parametrize("name", [*CASES, "seeded", "two_levels"])
def test_several_processes_give_the_bytes_of_one(name: str, alone: Results, together: list[Results]) -> None:
    """By all ways of comparing, with a start on a sample, with clusters seeded again, with processes without rows."""
    for key in [key for key in alone if key.startswith(f"{name}/")]:
        ranks = [rank[key] for rank in together]
        if key.endswith(PART_OF_ROWS):
            assert np.concatenate(ranks).tobytes() == alone[key].tobytes(), key
        else:
            assert {rank.tobytes() for rank in ranks} == {alone[key].tobytes()}, key


def test_the_cases_are_what_they_say(alone: Results, together: list[Results]) -> None:
    assert alone["copies/sizes"].max() > CASES["copies"][0] / 2
    assert alone["seeded/num_reseeded"] == NUM_SEEDED == len(np.unique(alone["seeded/centroids"], axis=0)) - 1
    held = [len(rank["lists/pseudo_labels"]) for rank in together]
    assert max(held) <= CASES["lists"][0] / len(together) + PART_ROWS and min(held) > 0
    assert sorted(len(rank["one_part/pseudo_labels"]) for rank in together) == [0] * (len(together) - 1) + [200]


def test_parts_do_not_depend_on_the_number_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_points, "PART_ROWS", 10)
    whole = own_parts(95)
    assert [row for part in whole for row in range(95)[part]] == list(range(95))
    assert max(part.stop - part.start for part in whole) == 10
    for size in (2, 3, 16):
        team = [Processes(rank, size) for rank in range(size)]
        assert [part for each in team for part in own_parts(95, each)] == whole
        assert most_rows(95, size) == max(len(range(95)[own_rows(95, each)]) for each in team)
    assert own_parts(0) == [] and own_rows(3, Processes(0, 2)) == slice(0, 3), "the first process has some"


def test_the_smallest_values_are_ordered_by_value_then_row() -> None:
    values = np.array([3.0, 1.0, np.inf, 1.0, 2.0, 1.0])
    shared = SharedPoints.alone(torch.zeros(6, 2))
    assert shared.smallest(values, 2).tolist() == [1, 3]
    assert shared.smallest(values, 6).tolist() == [1, 3, 5, 4, 0, 2]
    assert shared.smallest(values, 0).tolist() == []


def test_each_process_needs_memory_for_its_own_rows() -> None:
    needs = [memory_needed(10**7, 384, 4096, size) for size in (1, 2, 8)]
    assert needs[1] < 0.52 * needs[0] and needs[2] < 0.15 * needs[0]


def test_several_processes_give_ids_in_order_and_their_own_rows() -> None:
    points, ids = np.eye(40, dtype=np.float32), np.arange(40, dtype=np.uint64)
    for ranks, given, sentence in (
        (Processes(0, 2), ids[::-1], "give ids, and the rows, in ascending order"),
        (Processes(1, 2), ids, "found 40 features, expected those of the rows 40 to 40"),
    ):
        with pytest.raises(ValueError, match=sentence):
            cluster(points, num_clusters=3, ids=given, processes=ranks)
