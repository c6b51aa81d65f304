"""The container file installs what the project is made of, and its command is one of `grappa`."""

from __future__ import annotations

import json
import re

from typer.main import get_command

from grappa.pipeline.cli import app
from tests.project.test_packaging import PACKAGES, ROOT, project

LINES = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ").splitlines()


def instruction(name: str) -> list[str]:
    return [line.removeprefix(f"{name} ") for line in LINES if line.startswith(f"{name} ")]


def test_all_that_is_copied_is_there_and_all_that_is_needed_is_copied() -> None:
    copied = {source for line in instruction("COPY") for source in line.split()[:-1]}
    assert all((ROOT / each).exists() for each in copied)
    table = project()["project"]
    assert copied == {*PACKAGES, "pyproject.toml", "constraints.txt", table["readme"], *table["license-files"]}
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied == allowed


def test_the_base_is_an_argument_and_the_extras_exist() -> None:
    assert instruction("FROM") == ["${BASE}"] and any(each.startswith("BASE=") for each in instruction("ARG"))
    (extras,) = re.findall(r"\.\[([^]]+)\]", "\n".join(instruction("RUN")))
    known = project()["project"]["optional-dependencies"]
    assert {each for each in extras.split(",") if each != "${EXTRA}"} <= set(known)
    assert {"cpu", "gpu"} <= set(known) and "EXTRA=cpu" in instruction("ARG")


def test_its_command_is_one_of_grappa() -> None:
    (entry,), (command,) = instruction("ENTRYPOINT"), instruction("CMD")
    assert json.loads(entry) == ["grappa"]
    assert json.loads(command)[0] in get_command(app).commands  # type: ignore[attr-defined]
