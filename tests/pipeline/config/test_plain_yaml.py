"""What is read without PyYAML is read as PyYAML reads it, and anything else is left to PyYAML."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from grappa.pipeline.config.plain_yaml import PLAIN_BYTES, plain_sections
from grappa.pipeline.config.yaml_file import PRESETS, dump_config, parse_settings
from grappa.pipeline.config.yaml_text import parsed_yaml

CHANGED = {
    "images": {"sources": ["/data/birds", "s3://bucket/cars.tar"], "domains": ["a=/b"], "cache_size": 256},
    "backbone": {"options": {"depth": 6, "qkv_bias": False, "x": 0.5, "act": "gelu"}, "mean": [0.5, 0.25, 1e-05]},
    "clusters": {"num_clusters": [8, 64]},
    "evaluation": {"extra_rows": ["concat"]},
}


@pytest.mark.parametrize("settings", [{}, CHANGED])
def test_the_configuration_of_a_run_is_read_without_pyyaml(settings: dict[str, dict[str, object]]) -> None:
    text = dump_config(parse_settings(settings, "here"))
    assert plain_sections(text) is not None
    assert repr(plain_sections(text)) == repr(parsed_yaml(text))


def test_presets_are_read_as_pyyaml_reads_them() -> None:
    for path in (*PRESETS.glob("*.yaml"), *PRESETS.glob("*/*.yaml")):
        same(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "text",
    [
        *("", "# a\n", "a: 1\n", "  a: 1\n", "a:\n    b: 1\n", "a:\n\tb: 1\n", "a:\n  b: 1\n  b: 2\n", "a:\na:\n"),
        *("a:\n  b: 'x'\n", 'a:\n  b: "x"\n', "a:\n  b: 1_0\n", "a:\n  b: 010\n", "a:\n  b: 1:30\n", "a:\n  b: .5\n"),
        *("a:\n  b: Yes\n", "a:\n  on: 1\n", "a:\n  b: NULL\n", "a:\n  b: ~\n", "a:\n  b: .inf\n", "a:\n  b: +1\n"),
        *("a:\n  b: x\n    y\n", "a:\n  b: x: y\n", "a:\n  b: &x 1\n", "a:\n  b: *x\n", "a:\n  b: !!str 1\n"),
        *("a:\n  b: [1,2]\n", "a:\n  b: [1, [2]]\n", "a:\n  b: {c: 1, c: 2}\n", "a:\n  b: [x, ]\n", "a:\n  b: |\n"),
        *("a:\n  b:\n    c: 1\n", "a:\n  b:1\n", "--- \na:\n  b: 1\n", "a:\n  b: \xe9\n", "a:\n  b: 2001-01-01\n"),
        "a:\n  b: 1\n" + "#" * PLAIN_BYTES,
    ],
)
def test_what_is_not_plain_is_left_to_pyyaml(text: str) -> None:
    assert plain_sections(text) is None


LINES = st.sampled_from(
    [
        *("", "# c", "  # c", "a:", "b:  # c", "yes:", "  k: 1", "  k: 0.5  # c", "  l: x y", "  l:", "    - x"),
        *("  m: [1, x]", "  m: {a: 1, b: x}", "  n: null", "  n: No", "  n: a:b", "  n: a: b", "  n: a :b", "    o: 1"),
        *("  - x", "- x", "  k: x#y", "  k: 1.0e-05", "  k: 1e5", "  k: -1", "  k: [a b, c]", "  k: {a:1}", "  k: []"),
        *("  k: a  b ", "    - 1 # c"),
    ]
)
SIGNS = st.text(st.sampled_from("ab1.-:?!&*<>=|{}[],'\"# \n~0xe/"), max_size=12)


@settings(deadline=None, max_examples=400)
@example(["a:", "  k: a/=b"])
@given(st.lists(LINES | SIGNS | SIGNS.map(lambda text: f"  k: {text}"), max_size=8).map(lambda rest: ["a:", *rest]))
def test_any_text_that_is_plain_means_what_pyyaml_reads(lines: list[str]) -> None:
    same("\n".join(lines))


def same(text: str) -> None:
    """By repr, in which 1, 1.0 and True differ."""
    plain = plain_sections(text)
    assert plain is None or repr(plain) == repr(parsed_yaml(text))
