"""Proxies that three processes hold together: the training of one process, and of the same checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from grappa.core.distributed import Processes
from grappa.training.sharded_proxies import ShardedProxies
from grappa.training.targets import Targets
from tests.helpers.rounding import assert_same_sums, assert_same_training, sum_error, training_error
from tests.helpers.sharded_library import CASES, PATH, SIZE, TERMS, checkpoint, crash, open_views, train
from tests.helpers.together import start


@pytest.mark.parametrize("sizes", [(7,), (2,), (1, 9, 3)])
@pytest.mark.parametrize("number", [1, 2, 3, 5])
def test_each_process_holds_its_rows_of_one_table(sizes: tuple[int, ...], number: int) -> None:
    tables = [np.random.default_rng(size).normal(size=(size, 4)).astype(np.float32) for size in sizes]
    targets = [Targets(np.arange(len(each)), each) for each in tables]
    shares = [ShardedProxies(targets, Processes(rank, number)) for rank in range(number)]
    rows = [share.first_values() for share in shares]
    assert torch.equal(torch.cat(rows), torch.from_numpy(np.concatenate(tables)))
    assert [len(each) for each in rows] == [share.num_own for share in shares]
    assert max(map(len, rows)) - min(map(len, rows)) <= 1
    for target, table in enumerate(tables):
        parts = [share.by_target(own)[target] for share, own in zip(shares, rows, strict=True)]
        for part, first in parts:
            assert np.array_equal(part, table[first : first + len(part)])
        assert sum(len(part) for part, _ in parts) == len(table)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process trains, then what three do."""
    folder = tmp_path_factory.mktemp("sharded")
    views = open_views(folder / "pixels")
    for case in CASES:
        crash(views, case, folder / f"{case} alone")
        np.savez(folder / f"{case}.npz", **train(views, case, None))
    ended = start(SIZE, "-m", "tests.helpers.sharded_library", str(folder))
    assert [each.code for each in ended] == [0] * SIZE, ended
    return folder


def _found(folder: Path, case: str, how: str, rank: int = 0) -> dict[str, Any]:
    prefix = f"{case}/{how}/"
    with np.load(folder / f"rank{rank}.npz") as file:
        return {name.removeprefix(prefix): file[name] for name in file if name.startswith(prefix)}


def _assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    np.testing.assert_allclose(found["metrics"][0], expected["metrics"][0], rtol=sum_error(TERMS))
    np.testing.assert_allclose(found["metrics"], expected["metrics"], rtol=training_error(TERMS))
    for name in expected.keys() - {"metrics"}:
        assert_same_training(found[name], expected[name], path=PATH, terms=TERMS, name=name)


@pytest.mark.parametrize("case", CASES)
def test_the_training_is_that_of_one_process(folder: Path, case: str) -> None:
    expected = dict(np.load(folder / f"{case}.npz"))
    _assert_same(_found(folder, case, "whole"), expected)
    for rank in range(1, SIZE):
        other = _found(folder, case, "whole", rank)
        assert all(np.array_equal(each, other[name]) for name, each in _found(folder, case, "whole").items())


@pytest.mark.parametrize("case", CASES)
def test_the_checkpoint_is_that_of_one_process(folder: Path, case: str) -> None:
    """After one step: the proxies as a whole, and with Adam's first moments the gradients, times 0.1."""
    found, expected = (load_file(folder / name / "checkpoint.safetensors") for name in (case, f"{case} alone"))
    assert found.keys() == expected.keys()
    assert found["module.classifier.proxies"].shape == (sum(CASES[case]), 32)
    for name, values in expected.items():
        if name.endswith(("exp_avg", "total.loss")):
            assert_same_sums(found[name], values, terms=TERMS, name=name)
        elif name.endswith("step"):
            assert np.array_equal(found[name], values)


@pytest.mark.parametrize("case", CASES)
def test_a_crashed_training_goes_on_bit_for_bit(folder: Path, case: str) -> None:
    whole, resumed = (_found(folder, case, how) for how in ("whole", "resumed"))
    assert all(np.array_equal(each, resumed[name]) for name, each in whole.items())


@pytest.mark.parametrize("case", CASES)
def test_another_number_of_processes_goes_on_too(folder: Path, case: str) -> None:
    expected = dict(np.load(folder / f"{case}.npz"))
    _assert_same(_found(folder, case, "one's"), expected)
    _assert_same(train(open_views(folder / f"again {case}"), case, checkpoint(folder / case, seconds=1e9)), expected)
