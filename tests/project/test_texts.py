"""The texts are true: their Python runs, their commands parse, their links, paths and names lead somewhere.

A block that cannot run here has the comment ``<!-- not run: why -->`` on the line before it.
"""

from __future__ import annotations

import importlib
import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from PIL import Image

import grappa
from grappa.pipeline.cli import app
from grappa.pipeline.config.schema import Config
from tests.helpers.tiny import draw_images, make_run, run_all, write_weights
from tests.project.test_packaging import PACKAGES, ROOT, project

README_BYTES = 12_288
TEXTS = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", ".github/**/*.md", "grappa/README.md", "pipeline/*.md", "slurm/*.md", "tests/**/*.md")
    for path in ROOT.glob(pattern)
)
CURRENT = [name for name in TEXTS if name != "CHANGELOG.md"]  # a changelog also tells of what is no more
SKIP = re.compile(r"<!-- not run: .+ -->")
TOP = {"grappa", "pipeline", "slurm", "tests", ".ci", ".github"}
CODE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
SETTING = re.compile(r"([a-z_]+)\.([a-z_]+)")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its code, its first line in the text, and whether the text says it cannot run."""

    language: str
    code: str
    line: int
    skipped: bool


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str) -> Iterator[Block]:
    lines = text(name).splitlines()
    fences = [number for number, line in enumerate(lines) if line.startswith("```")]
    for start, end in zip(fences[::2], fences[1::2], strict=True):
        code = "\n".join(lines[start + 1 : end])
        yield Block(lines[start][3:], code, start + 2, bool(start and SKIP.fullmatch(lines[start - 1])))


def prose(name: str) -> str:
    """Return a text without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", text(name), flags=re.MULTILINE | re.DOTALL)


def commands(name: str) -> Iterator[list[str]]:
    """Yield the words of every ``grappa`` command of the fenced blocks, also behind ``python -m``."""
    for block in blocks(name):
        for line in block.code.splitlines() if block.language in ("", "sh") else ():
            for part in line.removeprefix("$ ").split("&&"):
                yield from _grappa(part)


def inline_commands(name: str) -> Iterator[list[str]]:
    for code in CODE.findall(prose(name)):
        yield from _grappa(code)


def _grappa(line: str) -> Iterator[list[str]]:
    line = re.sub(r"^\S*(python|torchrun)\b.* -m grappa ", "grappa ", line.strip())
    if line.startswith("grappa "):
        yield shlex.split(line, comments=True)[1:]


def paths(name: str) -> Iterator[str]:
    """Yield what stands in backticks and names a file or a folder of the repository."""
    for code in CODE.findall(prose(name)):
        if "..." in code or not re.fullmatch(r"[\w.\-]+(/[\w.\-]+)*/?", code):
            continue
        if _in_tree(code) or code.endswith((".py", ".sh", ".svg")):
            yield code


def _in_tree(code: str) -> bool:
    return "/" in code and code.partition("/")[0] in TOP


def slugs(name: str) -> set[str]:
    """Return the anchors of a text's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text(name), flags=re.M | re.S), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a reader of the texts has it: a finished run in runs/mine, images, a photograph."""
    folder = tmp_path_factory.mktemp("texts")
    images, weights = draw_images(folder / "IMAGES"), write_weights(folder / "vit.safetensors")
    (folder / "runs").mkdir()
    run_all(make_run(folder / "runs" / "mine", [images], weights))
    Image.open(next(images.rglob("*.png"))).save(folder / "photo.jpg")
    return folder


@pytest.mark.parametrize("name", [name for name in TEXTS if any(block.language == "python" for block in blocks(name))])
def test_the_python_of_a_text_runs(name: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a text run one after another, as a reader pastes them."""
    monkeypatch.chdir(place)
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(name):
        if block.language == "python" and not block.skipped:
            padded = "\n" * (block.line - 1) + block.code
            exec(compile(padded, str(ROOT / name), "exec"), names)


@pytest.mark.parametrize("name", CURRENT)
def test_the_commands_of_a_text_parse(name: str) -> None:
    tree: Any = typer.main.get_command(app)
    for words in commands(name):
        options = [word for word in words if word.startswith("-")]
        command = tree.commands.get(words[0])
        assert command or words[0] in ("--version", "--help"), f"there is no command `grappa {words[0]}`"
        if command is not None:
            command.make_context(words[0], words[1:])  # an error names the option that does not exist
        for assignment in (words[at + 1] for at, word in enumerate(words) if word == "--set"):
            _check_setting(assignment.partition("=")[0], f"{words} {options}")


@pytest.mark.parametrize("name", CURRENT)
def test_the_commands_within_sentences_have_their_options(name: str) -> None:
    tree: Any = typer.main.get_command(app)
    everywhere = {option for parameter in tree.params for option in parameter.opts} | {"--help"}
    for words in inline_commands(name):
        command = tree.commands.get(words[0]) if not words[0].startswith("-") else None
        known = everywhere | ({option for each in command.params for option in each.opts} if command else set())
        assert {word for word in words if word.startswith("-")} <= known, f"`grappa {' '.join(words)}`"
        assert command or words[0] in everywhere or words[0] == "...", f"there is no command `grappa {words[0]}`"


@pytest.mark.parametrize("name", CURRENT)
def test_the_make_targets_of_a_text_exist(name: str) -> None:
    targets = re.findall(r"^([a-z]+):", text("Makefile"), flags=re.MULTILINE)
    found = re.findall(r"^make ([a-z]+)", text(name), flags=re.MULTILINE)
    found += re.findall(r"`make ([a-z]+)", text(name))
    assert set(found) <= set(targets)


@pytest.mark.parametrize("name", CURRENT)
def test_the_settings_of_a_text_exist(name: str) -> None:
    for code in CODE.findall(prose(name)):
        found = SETTING.match(code)
        if found and found[1] in Config.model_fields and not code.endswith((".py", ".json", ".onnx", ".safetensors")):
            _check_setting(f"{found[1]}.{found[2]}", code)
    for block in blocks(name):
        if block.language == "yaml":
            for key in re.findall(r"[{, ]([a-z]+\.[a-z_]+):", block.code):
                _check_setting(key, block.code)


def _check_setting(name: str, where: str) -> None:
    section, _, field = name.partition(".")
    assert section in Config.model_fields, f"{where}: there is no section {section}"
    fields = type(getattr(Config(), section)).model_fields
    assert field in fields, f"{where}: {section} has no {field}"


@pytest.mark.parametrize("name", CURRENT)
def test_the_paths_of_a_text_exist(name: str) -> None:
    home = (ROOT / name).parent
    folders = [home, ROOT, *(path for path in home.iterdir() if path.is_dir())] if home != ROOT else [ROOT]
    missing = [path for path in paths(name) if not any((folder / path).exists() for folder in folders)]
    assert not missing


@pytest.mark.parametrize("name", CURRENT)
def test_the_python_names_of_a_text_exist(name: str) -> None:
    for code in CODE.findall(prose(name)):
        dotted = re.match(r"grappa(\.\w+)+", code)
        if dotted and not code.endswith((".svg", ".md")):
            assert _exists(dotted[0].split(".")), code


def _exists(parts: list[str]) -> bool:
    """Tell whether a dotted name is a module, or something in one."""
    for length in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            found = getattr(found, part, None)
        return found is not None
    return False


@pytest.mark.parametrize("name", TEXTS)
def test_the_links_of_a_text_lead_somewhere(name: str) -> None:
    for link in LINK.findall(prose(name)):
        if link.startswith(("http://", "https://")):
            continue
        file, _, anchor = link.partition("#")
        target = os.path.normpath((ROOT / name).parent / file) if file else str(ROOT / name)
        assert os.path.exists(target), link
        if anchor:
            assert anchor in slugs(os.path.relpath(target, ROOT)), link


@pytest.mark.parametrize("name", TEXTS)
def test_the_blocks_and_tables_of_a_text_are_whole(name: str) -> None:
    assert len(re.findall(r"^```", text(name), flags=re.MULTILINE)) % 2 == 0
    for table in re.findall(r"(?:^\|.*\n)+", prose(name), flags=re.MULTILINE):
        columns = {len(re.findall(r"(?<!\\)\|", re.sub(r"`[^`]*`", "", line))) for line in table.splitlines()}
        assert len(columns) == 1, table


@pytest.mark.parametrize("package", PACKAGES)
def test_the_map_of_a_package_is_whole(package: str) -> None:
    """Every file that lies in the package's own folder is named there, and every folder."""
    known = set(CODE.findall(text(f"{package}/README.md")))
    entries = [entry for entry in (ROOT / package).iterdir() if not entry.is_symlink() and entry.name[0] not in "_."]
    wanted = {f"{entry.name}/" if entry.is_dir() else entry.name for entry in entries if entry.suffix in ("", ".py")}
    assert wanted <= known


def test_the_readme_is_short() -> None:
    assert (ROOT / "README.md").stat().st_size < README_BYTES


def test_the_extras_of_the_readme_are_those_of_the_project() -> None:
    extras = set(project()["project"]["optional-dependencies"])
    table = re.search(r"^\| extra .*?\n\n", text("README.md"), flags=re.MULTILINE | re.DOTALL)
    assert table is not None
    assert set(re.findall(r"^\| `([a-z]+)`", table[0], flags=re.MULTILINE)) <= extras
    assert {"cpu", "gpu", "all"} <= extras


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load(text("CITATION.cff"))
    assert citation["version"] == grappa.__version__
    assert citation["license"] == project()["project"]["license"]
    titles = [each["title"] for each in citation["references"]]
    assert all(title in text("README.md") for title in titles)


def test_hosted_checks_call_the_one_script() -> None:
    workflow = yaml.safe_load(text(".github/workflows/ci.yml"))
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    assert ".ci/run" in [step.get("run") for step in steps]
