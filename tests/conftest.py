"""What all tests share: no network, one thread, and a reason for each test that this machine cannot run."""

from __future__ import annotations

import os
import shutil

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked ``gpu`` and ``slurm`` where there is no such thing."""
    for item in items:
        if item.get_closest_marker("slurm") and shutil.which("sbatch") is None:
            item.add_marker(pytest.mark.skip(reason="sbatch is not on the PATH"))
        if item.get_closest_marker("gpu") and not _has_gpu():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
