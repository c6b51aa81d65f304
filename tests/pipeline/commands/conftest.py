"""A desk for the tests of `grappa init`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.pipeline.commands.desk import Desk


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    return Desk(tmp_path)
