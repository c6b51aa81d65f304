"""Any YAML gives a configuration, a profile, a sweep, or one sentence: at once, on one line, without a traceback."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from grappa.pipeline.cli import app
from grappa.pipeline.config.schema import Config
from grappa.pipeline.config.yaml_file import (
    ConfigError,
    dump_config,
    field_names,
    load_config,
    parse_assignments,
    parse_settings,
)
from grappa.pipeline.sweep.spec import SweepFile, points, read_sweep
from grappa.slurm.profiles import Profile, load_profile
from tests.helpers.hostile import ACTIVE, NAMES

HUGE = 10**400
READERS: dict[str, Callable[[Path], object]] = {
    "configuration": load_config,
    "profile": lambda path: load_profile(str(path)),
    "sweep": lambda path: points(read_sweep(str(path))[0]),
    "assignment": lambda path: parse_settings(parse_assignments([f"backbone.options={path.read_text()}"]), "--set"),
}
ODD = (
    *("images: {1: 2}", "1: 2", "null: {a: 1}", "true: {}", "? [1]\n: 2", "? {a: 1}\n: 2", "images: {2001-01-01: 1}"),
    *(
        "images: " + "[" * 5000 + "]" * 5000,
        "[" * 5000,
        "{a: " * 3000,
        "- " * 5000,
        "a:\n" + " a:\n" * 3000,
        "? " * 3000,
    ),
    *("a: &x [*x]", "images: {sources: &x [*x]}", "stages: &x {a: *x}", "runs: &x {a: *x}", "a: *x", "&x *x"),
    *(
        "images: {sources: [2001-99-99]}",
        "a: !!int x",
        "a: !!float x",
        "a: !!bool x",
        "a: !!timestamp x",
        "a: !!null x",
    ),
    *(
        "a: 0x" + "f" * 9000,
        "a: " + "9" * 9000,
        f"clusters: {{seed: {HUGE}}}",
        f"cpus: {HUGE}",
        "a: 1e99999",
        "a: .nan",
    ),
    *(
        "a: !!python/object/apply:os.system [x]",
        "a: !!binary '*'",
        "a: !!set {b}",
        "a: !!omap [b: 1]",
        "a: !x y",
        "!!map x",
    ),
    *(
        "<<: 3",
        "images: {<<: [1]}",
        "images: {<<: {a: 1}}",
        "images: {=: 1}",
        "a: =",
        "'': {}",
        ".: {}",
        "images: {'': 1}",
    ),
    *(
        "\x00",
        "a: \x1b[31m",
        '"\\x1b[31m": 1',
        '"\\e[31m": {a: 1}',
        'images: {"a\\nb": 1}',
        'images: {sources: ["\\ud800"]}',
    ),
    *(
        "%YAML 9.9\n---\na: 1",
        "--- a\n--- b",
        "a:\n\t- b",
        "a: b: c",
        "a: 'b",
        "- a",
        "x",
        "",
        "# nothing",
        "---",
        "...",
    ),
    *("images: [a]", "images: x", "images: null", "images: {sources: {a: b}}", "clusters: {num_clusters: [[1]]}"),
    *(
        "stages: {images: {cpus: {}}}",
        "stages: {images: 3}",
        "stages: [a]",
        "shared: [[1]]",
        "shared: {a: b}",
        "sbatch: [a]",
    ),
    *(
        "runs: {1: {}}",
        "runs: [a]",
        "grid: {a.b: 3}",
        "grid: {a.b: []}",
        "grid: {a: [1]}",
        "seeds: {a.b: [1], c.d: [1, 2]}",
    ),
    "grid: {" + ", ".join(f"a.b{n}: [{', '.join(map(str, range(50)))}]" for n in range(9)) + "}",
    "a: &a0 [x, x, x, x, x, x, x, x, x]\n" + "\n".join(f"b{n}: &a{n + 1} [{f'*a{n}, ' * 9}]" for n in range(12)),
    "base: {set: {a.b: &a0 [x, x, x, x, x, x, x, x, x]"
    + "".join(f", a.b{n}: &a{n + 1} [{f'*a{n}, ' * 9}]" for n in range(6))
    + "}}\ngrid: {fusion.seed: [*a6, 1]}",
    "a: &a0 [x]\n" + "\n".join(f"b{n}: &a{n + 1} [*a{n}]" for n in range(4000)),
    "images: {" + ", ".join(f"a{n}: 1" for n in range(5_000)) + "}",
    "x" * 2_000_000,
)


def reads_or_says_why(reader: str, path: Path) -> None:
    begin = time.monotonic()
    try:
        READERS[reader](path)
    except ConfigError as error:
        said = str(error)
        assert 10 < len(said) < 1300 and not ACTIVE.search(said) and "\n" not in said
    assert time.monotonic() - begin < 20, "seconds on a quiet machine; the tests share theirs"


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("text", ODD, ids=lambda text: repr(text[:24]))
def test_odd_yaml_is_read_or_refused_in_a_sentence(tmp_path: Path, reader: str, text: str) -> None:
    file = tmp_path / "odd.yaml"
    file.write_text(text)
    reads_or_says_why(reader, file)


KEYS = st.sampled_from(
    [*Config.model_fields, *Profile.model_fields, *SweepFile.model_fields]
    + [name.partition(".")[2] for name in field_names()]
    + [*field_names(), *NAMES[:40], "k", "images", "set", "base"]
)
SCALARS = (
    st.none() | st.booleans() | st.integers(-5, 5) | st.sampled_from([HUGE, -HUGE, 2**63, 0.5, 1e300, float("inf")])
) | (
    st.sampled_from([float("nan"), "auto", "auto:99", "2001-01-01", "4h", "32G", "fused", *NAMES[:60]])
    | st.text(max_size=8)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(KEYS | st.integers(0, 2) | st.none(), inner, max_size=4)
    ),
    max_leaves=12,
)
FILES = st.dictionaries(KEYS, VALUES | st.dictionaries(KEYS, VALUES, max_size=3), max_size=3) | VALUES
SYNTAX = st.text(st.sampled_from("ab1.-:?!&*<>=|{}[],'\"# \n\t%@`~0xe\\\x00\x85\ufeff\u2028é"), max_size=60)


@pytest.mark.parametrize("reader", READERS)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150)
@given(value=FILES)
def test_any_value_is_read_or_refused_in_a_sentence(tmp_path: Path, reader: str, value: Any) -> None:
    file = tmp_path / "any.yaml"
    file.write_text(yaml.safe_dump(value))
    reads_or_says_why(reader, file)


@pytest.mark.parametrize("reader", READERS)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150)
@given(text=SYNTAX)
def test_any_text_is_read_or_refused_in_a_sentence(tmp_path: Path, reader: str, text: str) -> None:
    file = tmp_path / "any.yaml"
    file.write_text(text)
    reads_or_says_why(reader, file)


def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("pipe", "zero"):
        with pytest.raises(ConfigError, match="no regular file"):
            load_config(tmp_path / name)
    with pytest.raises(ConfigError):
        load_profile(str(tmp_path / "pipe"))


@pytest.mark.parametrize(
    "value", ["[" * 3000, "[" * 3000 + "]" * 3000, "{1: 2}", "&x [*x]", "9" * 9000, "!!int x", "\x1b[31m"]
)
def test_a_value_of_set_is_refused_in_a_sentence(tmp_path: Path, value: str) -> None:
    for name in ("clusters.num_clusters", "backbone.options", "backbone.mean"):
        called = CliRunner().invoke(app, ["init", str(tmp_path / "run"), "--images", "x", "--set", f"{name}={value}"])
        assert called.exit_code == 1 and called.stderr.startswith("grappa: "), called
        assert len(called.stderr.splitlines()) == 1 and not ACTIVE.search(called.stderr)
    assert not (tmp_path / "run").exists()


@example(["\x85"])
@example(["\xa0f\xa0"])
@example(["a\u2028b", "\u2029", "\r"])
@given(st.lists(st.sampled_from(NAMES) | st.text(max_size=20), max_size=4))
def test_any_names_survive_the_file(tmp_path_factory: pytest.TempPathFactory, names: list[str]) -> None:
    config = parse_settings({"images": {"sources": names}, "objects": {"prompt": "".join(names)}}, "here")
    file = tmp_path_factory.getbasetemp() / "names.yaml"
    file.write_text(dump_config(config), encoding="utf-8")
    assert load_config(file) == config
