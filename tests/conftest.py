"""What tests share: no network, one thread, a reason for what this machine cannot run, a Slurm cluster."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.browser import chromium
from tests.cluster.cluster import Cluster, missing_reason

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile("same", derandomize=True, deadline=None)  # the same cases in each run, however slow it is
settings.load_profile("same")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked ``gpu`` where there is no such thing."""
    for item in items:
        if item.get_closest_marker("gpu") and not _has_gpu():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests marked ``slurm`` or ``browser`` where there is none; GRAPPA_REQUIRE_SLURM=1 and
    GRAPPA_REQUIRE_CHROMIUM=1 make that a failure."""
    for marker, required, missing in (
        ("slurm", "GRAPPA_REQUIRE_SLURM", missing_reason),
        ("browser", "GRAPPA_REQUIRE_CHROMIUM", chromium.missing_reason),
    ):
        reason = missing() if item.get_closest_marker(marker) else None
        if reason and os.environ.get(required) == "1":
            pytest.fail(f"{required} is set, but {reason}", pytrace=False)
        if reason:
            pytest.skip(reason)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A Slurm cluster of this test process alone, stopped at its end; Slurm's commands find it."""
    home = Path(tempfile.mkdtemp(prefix="grappa-slurm-"))
    home.chmod(0o755)  # the database runs as a user of its own
    started = Cluster(home / "cluster")
    started.start()
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(started.conf)
    try:
        yield started
    finally:
        os.environ.pop("SLURM_CONF")
        if before is not None:
            os.environ["SLURM_CONF"] = before
        started.stop()
        shutil.rmtree(home, ignore_errors=True)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
