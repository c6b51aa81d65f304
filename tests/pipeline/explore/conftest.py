"""One tiny run for all tests of the explorer; each file works on its own copy."""

from __future__ import annotations

import pytest

from grappa.pipeline.store.artifacts import RunFolder
from tests.pipeline.explore.material import make_explored


@pytest.fixture(scope="session")
def explored(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A finished run that nobody opens."""
    return make_explored(tmp_path_factory.mktemp("explored"))
