"""Quick versions of the fault campaigns; `make test-faults` runs the long ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults import damage, kills
from tests.faults.tally import Tally


@pytest.mark.parametrize(("cache", "number"), [("raw", 3), ("jpeg", 2)])
def test_a_few_kills_lose_nothing(tmp_path: Path, cache: str, number: int) -> None:
    tally = Tally()
    kills.campaign(tmp_path, number=number, seed=1, tally=tally, cache=cache)
    assert tally.faults == [] and tally.counts["kills"] >= number


def test_a_few_damaged_files_are_never_used(tmp_path: Path) -> None:
    tally = Tally()
    damage.campaign(tmp_path, number=2, seed=0, tally=tally)
    assert tally.faults == [] and tally.counts["reads"] >= 15


@pytest.mark.parametrize("kind", ["lost", "differs", "leftover"])
def test_the_comparison_sees_what_is_not_as_it_was(tmp_path: Path, kind: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "a.npy").write_text("a")
    wanted = kills.contents(tmp_path / "run")
    tally = Tally()
    kills.compare(tmp_path / "run", wanted, tally)
    assert not tally.faults
    if kind == "lost":
        (tmp_path / "run" / "a.npy").unlink()
    elif kind == "differs":
        (tmp_path / "run" / "a.npy").write_text("b")
    else:
        (tmp_path / "run" / "features.partial.0123").mkdir()
    kills.compare(tmp_path / "run", wanted, tally)
    assert [fault.partition(":")[0] for fault in tally.faults] == [kind]
