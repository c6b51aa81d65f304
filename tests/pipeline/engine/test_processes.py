"""Several processes: the same results as one, whoever fails ends all, and alone nothing is paid."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch.distributed import HashStore

from grappa.core.distributed import ALONE, Processes
from grappa.pipeline.engine import heartbeat
from grappa.pipeline.engine.heartbeat import ProcessesError, WatchedStore
from grappa.pipeline.engine.team import Team, joined, place
from grappa.pipeline.store.artifacts import RunFolder
from grappa.pipeline.store.checkpoints import FileCheckpoint
from grappa.pipeline.store.locks import LockedError
from grappa.search import shared_points
from grappa.training.batches import BatchOrder
from tests.helpers.rounding import assert_same_sums, assert_same_training, sum_error, training_error
from tests.helpers.tiny import digests, draw_images, make_run, run_all, write_table, write_weights
from tests.helpers.together import ROOT, start
from tests.helpers.together_library import PART_ROWS, PATH, TERMS, results

ROUNDINGS = 16  # of an embedding on its way through two blocks: norms, products, attention, MLP and sums of each
EXACT = ("backbone", "images", "features", "neighbors", "clusters")


@pytest.mark.parametrize("size", [2, 4])
def test_parts_are_contiguous_and_share_everything(size: int) -> None:
    items = list(range(11))
    parts = [items[Processes(rank, size).own_slice(len(items))] for rank in range(size)]
    assert [item for part in parts for item in part] == items
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    order = BatchOrder(np.arange(11, dtype=np.uint64), 5, (0, "adaptors"))
    shared = [BatchOrder(order.ids, 5, order.parts, Processes(rank, size)).at(1)[0] for rank in range(size)]
    assert np.concatenate(shared).tolist() == order.at(1)[0].tolist()
    with pytest.raises(ValueError, match="a batch of 1 images cannot be shared by . processes; start fewer"):
        BatchOrder(order.ids, 1, order.parts, Processes(0, size))


def test_alone_everything_is_what_it_was() -> None:
    values = torch.arange(6.0).view(3, 2)
    assert ALONE.all_gather(values, 3) is values
    assert ALONE.gather(values, 3) == [values]
    assert ALONE.broadcast(b"kept") == b"kept"
    ALONE.all_reduce([values])
    assert torch.equal(values, torch.arange(6.0).view(3, 2))


def test_alone_no_group_is_made_and_nothing_is_loaded() -> None:
    code = "import sys; from grappa.pipeline.engine.team import joined, ALONE\n"
    code += "with joined() as team: assert team is ALONE\n"
    code += "print('torch' in sys.modules, 'grappa.core.distributed' in sys.modules)"
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False"], done.stderr


# ---------------------------------------------------------------- results


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("material")
    draw_images(folder / "images")
    write_weights(folder / "weights.safetensors")
    write_table(folder / "images", folder / "table.csv", label=lambda path: path.parent.name)
    return folder


def _make(root: Path, material: Path) -> RunFolder:
    return make_run(
        root,
        [material / "table.csv"],
        material / "weights.safetensors",
        compute__inference_batch_size=16,
        compute__checkpoint_seconds=0.000001,
        adaptors__precision="float32",
        fusion__precision="float32",
        student__precision="float32",
        evaluation__extra_rows="[multi_head, supervised]",
        adaptors__num_epochs=1,
    )


@pytest.fixture(scope="module")
def alone(material: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunFolder]:
    """A folder of its own for the library's results of a single process, and its run."""
    folder = tmp_path_factory.mktemp("alone")
    run = _make(folder / "run", material)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_points, "PART_ROWS", PART_ROWS)
        run_all(run, until="attention")
    return folder, run


@pytest.fixture(scope="module")
def expected(alone: tuple[Path, RunFolder]) -> dict[str, Any]:
    return results(alone[0])


def _made_by(size: int, folder: Path, material: Path, stage: str) -> tuple[list[dict[str, Any]], RunFolder]:
    """Return what the library gave each rank, and the run that they made."""
    run = _make(folder / "run", material)
    ended = start(size, "-m", "tests.helpers.together_library", str(folder), str(run.root), stage)
    assert [each.code for each in ended] == [0] * size, ended
    assert [bool(each.text.strip()) for each in ended] == [True] + [False] * (size - 1), "the first one speaks"
    return [dict(np.load(folder / f"rank{rank}.npz")) for rank in range(size)], run


@pytest.fixture(scope="module")
def pair(material: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], RunFolder]:
    return _made_by(2, tmp_path_factory.mktemp("pair"), material, "attention")


@pytest.fixture(scope="module")
def four(material: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], RunFolder]:
    """60 images in batches of 16 and shards of 16 files: in the last round some have nothing to do."""
    return _made_by(4, tmp_path_factory.mktemp("four"), material, "fusion")


@pytest.mark.parametrize("several", ["pair", "four"])
def test_trainings_equal_those_of_one_process(
    several: str, expected: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    """A batch of 10, which four share unequally, and losses that look across the batch; the ranks end with equal bits.

    Gradients and metrics of the first step differ by the order of their sums, later ones and the trained tensors by
    what Adam makes of that. Barlow Twins' loss is compared at the first step only: it does not see a shift of the
    projected columns, so the gradients of the projector's biases are nothing but rounding, and Adam makes steps of
    full length of them.
    """
    ranks, _ = request.getfixturevalue(several)
    for name, values in expected.items():
        found = ranks[0][name]
        assert all(np.array_equal(found, other[name]) for other in ranks[1:]), name
        if name.endswith("metrics"):
            np.testing.assert_allclose(found[0], values[0], rtol=sum_error(TERMS), atol=1e-9, err_msg=name)
        if name.endswith("/first") or name == "gradient":
            assert_same_sums(found, values, terms=TERMS, name=name)
        elif name.endswith("metrics") and not name.startswith("barlow"):
            np.testing.assert_allclose(found, values, rtol=training_error(TERMS), atol=1e-9, err_msg=name)
        elif not name.startswith("barlow"):
            assert_same_training(found, values, path=PATH, terms=TERMS, name=name)


@pytest.mark.parametrize("several", ["pair", "four"])
def test_a_run_equals_that_of_one_process(
    several: str, alone: tuple[Path, RunFolder], request: pytest.FixtureRequest
) -> None:
    """Bit-identical up to the clusters; sets, fusion and student trained alike; embeddings alike in bfloat16."""
    ranks, together = request.getfixturevalue(several)
    wanted, found = digests(alone[1]), digests(together)
    assert {"adaptors/multi_head/adaptors.safetensors", "fusion/neighbors/fusion.safetensors"} <= set(found)
    assert {name for name in found if found[name] != wanted[name] and name.startswith(EXACT)} == set()
    for name in found:
        if name.endswith(("adaptors.safetensors", "fusion.safetensors", "student.safetensors")):
            _assert_same_module(together, alone[1], name)
        elif name.endswith(("embeddings.npy", "attention.npy")) and not name.startswith("heads"):
            whole = np.load(alone[1].root / name)
            assert_same_sums(np.load(together.root / name), whole, terms=ROUNDINGS, dtype=torch.bfloat16, name=name)
    numbers = {"features": len(ranks), "neighbors": len(ranks), "clusters/k00004": len(ranks), "evaluation": 1}
    for stage, number in numbers.items():
        manifest = together.artifact(stage).manifest()
        assert manifest is None or manifest.provenance["processes"] == number


def _assert_same_module(found: RunFolder, expected: RunFolder, name: str) -> None:
    """Compare what a stage trained in float32; its batches have 4 images, or pairs of images, of 17 tokens."""
    records = [json.loads(line) for line in (expected.root / name).with_name("metrics.jsonl").read_text().splitlines()]
    path = records[-1]["step"] * max(record["learning_rate"] for record in records)
    tensors = load_file(found.root / name)
    for key, values in load_file(expected.root / name).items():
        assert_same_training(tensors[key], values, path=path, terms=2 * 4 * 17, name=f"{name} {key}")


# ---------------------------------------------------------------- failures

KILLED = """
import os, sys
import grappa.training.loop
from grappa.pipeline.engine import heartbeat
from grappa.pipeline.cli import main

heartbeat.BROKEN_SECONDS = 2.0
step, number = grappa.training.loop._step, 0

def killed(*arguments):
    global number
    number += 1
    if number == 5 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), 9)
    step(*arguments)

grappa.training.loop._step = killed
main()
"""


def test_a_killed_process_ends_all_and_the_rest_is_done_bit_for_bit(
    pair: tuple[list[dict[str, Any]], RunFolder], tmp_path: Path
) -> None:
    run = RunFolder.open(Path(shutil.copytree(pair[1].root, tmp_path / "run")))
    command = ("run", str(run.root), "--stage", "adaptors", "--instance", "k00004", "--force")
    first, second = start(2, "-c", KILLED, *command)
    assert (first.code, second.code) == (1, -9)
    assert "grappa: rank 1 of 2: no sign of life" in first.text
    artifact = run.artifact("adaptors/k00004")
    assert not artifact.lock.exists()
    assert 0 < FileCheckpoint(artifact.partial, seconds=1).steps_done() <= 4
    assert [each.code for each in start(2, "-m", "grappa", *command)] == [0, 0]
    log = [json.loads(line) for line in (artifact.path / "log.jsonl").read_text().splitlines()]
    assert log[-1]["resumed"]
    name = "adaptors/k00004/adaptors.safetensors"
    assert digests(run)[name] == digests(pair[1])[name]


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[WatchedStore, WatchedStore]]:
    """The watched stores of two processes, here in one process; signs of life are due at once."""
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.01)
    monkeypatch.setattr(heartbeat, "HEARD_SECONDS", 1.0)
    shared = HashStore()
    both = WatchedStore(shared, 0, 2), WatchedStore(shared, 1, 2)
    yield both
    for store in reversed(both):
        store.close()


def _raised_by(store: WatchedStore) -> Exception:
    with pytest.raises((ProcessesError, LockedError)) as found:
        store.read("never")
    assert isinstance(found.value, Exception)
    return found.value


def test_who_waits_is_told_why_another_one_ended(two: tuple[WatchedStore, WatchedStore]) -> None:
    two[1].fail("the disk is full")
    two[0].fail("a later failure")
    host = re.escape(socket.gethostname())
    assert re.fullmatch(f"rank 1 of 2 on {host}: the disk is full", str(_raised_by(two[0])))
    assert "the disk is full" in str(_raised_by(two[1]))


def test_a_lock_that_the_first_could_not_get_is_what_all_raise(two: tuple[WatchedStore, WatchedStore]) -> None:
    two[0].fail("is being written by process 7", "LockedError")
    assert isinstance(_raised_by(two[1]), LockedError)


def test_silence_is_a_failure(two: tuple[WatchedStore, WatchedStore], monkeypatch: pytest.MonkeyPatch) -> None:
    two[1].close()
    monkeypatch.setattr(heartbeat, "BROKEN_SECONDS", 0.1)
    assert "rank 1 of 2: no sign of life for" in str(two[0].broken(OSError("the connection is lost")))


def test_a_process_that_cannot_be_told_is_ended(tmp_path: Path) -> None:
    """It neither waits for the others nor reports: as if it hung in a collective."""
    code = """
import time
from torch.distributed import HashStore
from grappa.pipeline.engine import heartbeat
heartbeat.BEAT_SECONDS, heartbeat.GRACE_SECONDS = 0.01, 0.2
mine, other = heartbeat.WatchedStore(shared := HashStore(), 0, 2), heartbeat.WatchedStore(shared, 1, 2)
other.fail("out of memory")
time.sleep(60)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert done.returncode == 1
    assert re.search("grappa: rank 1 of 2 on .*: out of memory", done.stderr)


def test_followers_take_the_steps_and_the_words_of_the_leader(two: tuple[WatchedStore, WatchedStore]) -> None:
    leader, follower = Team(two[0]), Team(two[1])
    seen: list[Any] = []

    def follow() -> None:
        for step in follower.steps():
            seen.append((step["stage"], follower.agree("precision", "float32")))
            follower.wait_for_all("decoded")
        follower.leave()

    thread = threading.Thread(target=follow)
    thread.start()
    for stage, precision in (("features", "bfloat16"), ("fusion", "float32")):
        leader.announce({"stage": stage})
        assert leader.agree("precision", precision) == precision
        leader.wait_for_all("decoded")
    leader.leave()
    thread.join()
    assert seen == [("features", "bfloat16"), ("fusion", "float32")]
    assert (leader.leads, follower.leads) == (True, False)


@pytest.mark.parametrize(("rank", "size"), [("", "2"), ("2", "2"), ("one", "2"), ("0", "many")])
def test_an_environment_that_makes_no_sense_is_refused(rank: str, size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(ValueError, match="start several processes with torchrun or Slurm, or unset both"), joined():
        pass


def test_processes_that_do_not_meet_say_where(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with (
        pytest.raises(ProcessesError, match=r"could not meet the others at 127.0.0.1:\(MASTER_PORT is not set\)"),
        joined(),
    ):
        pass


def test_who_is_alone_is_so_whatever_else_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert place() == (0, 1)
