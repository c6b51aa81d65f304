"""Tensors are written as safetensors writes them, byte for byte, without a copy of the file in memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save

from grappa.core.distributed import GroupBrokenError
from grappa.pipeline.store import checkpoints
from grappa.pipeline.store.checkpoints import FileCheckpoint, write_tensors

TENSORS = {
    "b.weight": torch.arange(6.0).reshape(2, 3),
    "a": torch.tensor(3),
    "größe": torch.ones(3, dtype=torch.float16),
    "flags": torch.tensor([True, False, True]),
    "half": torch.ones(2, 1, dtype=torch.bfloat16),
    "empty": torch.zeros(0, 4),
    "turned": torch.arange(12.0, dtype=torch.float64).reshape(3, 4).T,
}


@pytest.mark.parametrize("metadata", [None, {"record": '{"epoch": 3, "ü": "\\""}'}])
def test_the_bytes_are_those_of_the_library(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    write_tensors(tmp_path / "w.safetensors", TENSORS, metadata)
    expected = save({name: value.contiguous() for name, value in TENSORS.items()}, metadata)
    assert (tmp_path / "w.safetensors").read_bytes() == expected
    assert all(torch.equal(value, TENSORS[name]) for name, value in load_file(tmp_path / "w.safetensors").items())


class InBlocks:
    """Stands for what several processes hold in parts; one of them may end before all blocks have come."""

    def __init__(self, whole: torch.Tensor, *, broken: bool = False) -> None:
        self.whole, self.shape, self.dtype, self.broken = whole, whole.shape, whole.dtype, broken

    def blocks(self) -> Iterator[torch.Tensor]:
        yield self.whole[:2]
        if self.broken:
            raise GroupBrokenError("the connection to another process is lost")
        yield self.whole[2:]


def test_what_comes_in_blocks_makes_the_same_checkpoint(tmp_path: Path) -> None:
    file = FileCheckpoint(tmp_path, seconds=0)
    parts: Any = {name: InBlocks(value) if value.ndim else value for name, value in TENSORS.items()}
    file.save(parts, {"step": 1})
    loaded = file.load()
    assert loaded is not None
    assert loaded[1] == {"step": 1}
    assert all(torch.equal(value, TENSORS[name]) for name, value in loaded[0].items())


def test_a_process_that_ends_while_a_checkpoint_is_saved_leaves_the_former_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, rows = FileCheckpoint(tmp_path, seconds=0), torch.arange(8.0).reshape(4, 2)
    file.save({"proxies": rows}, {"step": 1})
    broken: Any = {"a": torch.ones(3), "proxies": InBlocks(rows + 1, broken=True)}
    for digest in (checkpoints._digest, lambda *_: "0" * 64):  # before the first byte is written, or between two blocks
        monkeypatch.setattr(checkpoints, "_digest", digest)
        with pytest.raises(GroupBrokenError):
            file.save(broken, {"step": 2})
        monkeypatch.undo()
        loaded = file.load()
        assert loaded is not None
        assert loaded[1] == {"step": 1} and torch.equal(loaded[0]["proxies"], rows)
        assert [each.name for each in tmp_path.iterdir()] == [file.path.name]


def test_two_names_of_one_tensor_are_both_written(tmp_path: Path) -> None:
    shared = torch.ones(3)
    write_tensors(tmp_path / "w.safetensors", {"a": shared, "b": shared})
    assert set(load_file(tmp_path / "w.safetensors")) == {"a", "b"}


def test_the_file_is_not_held_in_memory(tmp_path: Path) -> None:
    script = f"""
import resource, sys, torch
from pathlib import Path
from grappa.pipeline.store.checkpoints import write_tensors
tensors = {{str(number): torch.ones(5_000_000) for number in range(10)}}
write_tensors(Path({str(tmp_path / "small")!r}), {{"a": torch.ones(2)}})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
write_tensors(Path({str(tmp_path / "large")!r}), tensors)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 50, "the tensors have 200 MB"
