"""The files around the code agree: dependencies, pins, the conda environment, package data, the make targets."""

from __future__ import annotations

import ast
import os
import re
import sys
import tomllib
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import grappa
from grappa.core.extras import DISTRIBUTION, EXTRAS

ROOT = Path(__file__).parents[2]
PACKAGES = ("grappa", "pipeline", "slurm")  # their folders; the last two are installed below the first
PROVIDED_BY = {
    "PIL": "pillow",
    "yaml": "pyyaml",
    "sklearn": "scikit-learn",
    "faiss": "faiss-cpu",
    "markdown_it": "markdown-it-py",
    "rattler": "py-rattler",
    "mlflow": "mlflow-skinny",
}
TRACKERS = ("tensorboard", "mlflow", "wandb")
TEXTS = {".py", ".yaml", ".md", ".j2"}
CONDA_NAMES = {"torch": "pytorch", "matplotlib": "matplotlib-base"}


@cache
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@cache
def requirements(*extras: str) -> dict[str, Requirement]:
    """Return the direct dependencies, with those of some extras, by canonical name; an extra may name others."""
    table = project()["project"]
    lines = chain(table["dependencies"], *(table["optional-dependencies"][extra] for extra in extras))
    found: dict[str, Requirement] = {}
    for each in map(Requirement, lines):
        itself = each.name == table["name"]
        found |= requirements(*sorted(each.extras)) if itself else {canonicalize_name(each.name): each}
    return found


@cache
def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pairs}


@cache
def environment() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    return loaded


def conda_specs() -> list[str]:
    return [each for each in environment()["dependencies"] if isinstance(each, str)]


def imported_packages(folder: str) -> set[str]:
    """Return the distributions behind all imports of other people's packages in a folder."""
    names: set[str] = set()
    for file in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names.add(str(node.module))
    top = {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {*PACKAGES, "tests", "conftest"}
    own = {file.stem for file in (ROOT / "tests").rglob("*.py")}
    return {canonicalize_name(PROVIDED_BY.get(name, name)) for name in top - own}


def test_every_import_is_a_declared_dependency() -> None:
    product = set[str]().union(*map(imported_packages, PACKAGES))
    assert product <= set(requirements("all", "cpu", "onnx", "remote", *TRACKERS))
    assert imported_packages("tests") <= set(requirements("all", "cpu", "dev", *TRACKERS))


def test_every_package_of_an_extra_is_named_with_it() -> None:
    for module, extra in EXTRAS.items():
        assert canonicalize_name(PROVIDED_BY.get(module, module)) in requirements(extra), module
    known = {canonicalize_name(PROVIDED_BY.get(module, module)) for module in EXTRAS}
    extras = ("objects", "heic", "onnx", "hub", "remote", *TRACKERS)
    assert set(requirements("all", "cpu", *extras)) - set(requirements()) == known
    assert project()["project"]["name"] == DISTRIBUTION


def test_each_layer_needs_its_own_extra_only() -> None:
    assert imported_packages("pipeline") - {"jinja2", "markupsafe", "matplotlib", "starlette", "uvicorn"} <= set(
        requirements("pipeline", *TRACKERS)
    )
    assert imported_packages("slurm") <= set(requirements("slurm"))
    assert imported_packages("grappa") <= set(requirements("pipeline", "cpu", "onnx", "remote"))


def test_no_text_installs_the_other_project_of_that_name() -> None:
    texts = [file for folder in (*PACKAGES, "tests") for file in (ROOT / folder).rglob("*") if file.suffix in TEXTS]
    texts += [ROOT / "Makefile", ROOT / "pyproject.toml", ROOT / "environment.yml", *ROOT.glob("*.md")]
    wrong = [file for file in texts if re.search(r"pip install ['\"]?grappa\b(?!-)", file.read_text(encoding="utf-8"))]
    assert not wrong


def test_both_faiss_builds_are_extras_only() -> None:
    assert not {name for name in requirements() if name.startswith("faiss")}
    assert "faiss-cpu" in requirements("cpu")
    assert "faiss-gpu" in requirements("gpu")


def test_every_dependency_is_pinned_within_its_range() -> None:
    for name, requirement in requirements(
        "all", "cpu", "gpu", "objects", "heic", "onnx", "hub", "remote", "dev", *TRACKERS
    ).items():
        assert name in pins(), f"constraints.txt does not pin {name}"
        assert requirement.specifier.contains(pins()[name]), f"{requirement} excludes the tested {pins()[name]}"


def test_pins_name_public_versions_only() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    wrong = [line for line in lines if not line.startswith("#") and not re.fullmatch(r"[\w.-]+==[\w.]+", line)]
    assert not wrong
    assert pins()["torch"]
    assert pins()["torchvision"]
    assert not [name for name, version in pins().items() if Version(version).local]


def test_the_conda_environment_names_what_the_project_needs() -> None:
    found = {canonicalize_name(spec.split()[0]) for spec in conda_specs()}
    wanted = {CONDA_NAMES.get(name, name) for name in requirements("all", "gpu")}
    assert found == wanted | {"python", "pip"}
    assert {"pip": ["--editable ."]} in environment()["dependencies"]


def test_the_conda_environment_has_the_projects_ranges() -> None:
    lower = {name: str(requirement.specifier) for name, requirement in requirements("all").items()}
    ranges = {str(canonicalize_name(spec.split()[0])): spec.split()[1] for spec in conda_specs() if " " in spec}
    for name, wanted in lower.items():
        assert ranges[CONDA_NAMES.get(name, name)] == wanted, name
    assert ranges["python"].startswith(project()["project"]["requires-python"])


def test_the_conda_environment_holds_valid_specs() -> None:
    rattler = pytest.importorskip("rattler", reason="py-rattler (extra dev) is not installed")
    for spec in conda_specs():
        assert rattler.MatchSpec(spec, strict=True).name is not None
    with pytest.raises(Exception, match="unable to parse"):
        rattler.MatchSpec("pandas>=>2")


def test_every_data_file_is_packaged() -> None:
    patterns: dict[str, list[str]] = project()["tool"]["setuptools"]["package-data"]
    packaged = {
        file
        for package, globs in patterns.items()
        for pattern in globs
        for file in ROOT.joinpath(*package.split(".")[-1:]).glob(pattern)
    }
    files = {file for package in PACKAGES for file in (ROOT / package).rglob("*") if file.is_file()}
    texts = {ROOT / package / "README.md" for package in PACKAGES}
    unpackaged = {file for file in files - packaged - texts if file.suffix not in {".py", ".pyc"}}
    assert not unpackaged


def test_the_changelog_starts_with_the_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.search(r"^## \[(.+?)\]", text, flags=re.MULTILINE)
    assert newest is not None
    assert newest[1] == grappa.__version__
    assert project()["project"]["dynamic"] == ["version"]


def test_the_license_is_whole() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert project()["project"]["license"] == "Apache-2.0"
    assert text.split()[:4] == ["Apache", "License", "Version", "2.0,"]
    assert "END OF TERMS AND CONDITIONS" in text


def test_continuous_integration_runs_the_targets() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    lines = script.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.startswith("make")] == ["make demo", "make test-narrow", "make test"]
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert {"install", "demo", "test", "test-narrow"} <= set(targets)


def test_no_machine_path_is_committed() -> None:
    names = ("pyproject.toml", "constraints.txt", "Makefile", "environment.yml", ".ci/run", ".pre-commit-config.yaml")
    for name in names:
        text = (ROOT / name).read_text(encoding="utf-8")
        assert not re.search(r"(?<![\w$)])/(home|root|opt|tmp|work|mnt)/|file://", text), name
