"""Configuration files: exact round trip, comments, changes by preset and ``--set``, errors in one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from grappa.pipeline.config.schema import (
    Clusters,
    Config,
    Evaluation,
    Features,
    Images,
    Neighbors,
    SampledViews,
    Selection,
)
from grappa.pipeline.config.trainings import Student
from grappa.pipeline.config.yaml_file import (
    ConfigError,
    Settings,
    dump_config,
    field_names,
    load_config,
    merged,
    parse_assignments,
    parse_settings,
    preset_path,
    read_settings,
)

UNUSUAL: dict[str, dict[str, Any]] = {
    "images": {"sources": ['/a b/it\'s "quoted": #1', "/byte\udcff/", "/new\nline/x", "/日本/x", "/" + 800 * "l"]},
    "backbone": {"weights": "/w: {x}.safetensors", "mean": [0.5, 0.25, 1e-5], "options": {"depth": 6, "act": "gelu"}},
    "clusters": {"num_clusters": [512, 64]},
    "adaptors": {"learning_rate": 1e-5},
}


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("settings", [{}, UNUSUAL], ids=["defaults", "unusual"])
def test_a_written_configuration_is_read_back_exactly(tmp_path: Path, settings: dict[str, dict[str, Any]]) -> None:
    config = parse_settings(settings, "here")
    assert load_config(written(tmp_path, dump_config(config))) == config


def test_every_field_is_written_with_its_description() -> None:
    text = dump_config(Config())
    for name in field_names():
        section, _, field = name.partition(".")
        description = type(getattr(Config(), section)).model_fields[field].description
        assert description and f"# {description}" in text
        assert f"  {field}: " in text
    assert max(len(line) for line in text.splitlines()) <= 120


def test_missing_and_empty_sections_have_the_defaults(tmp_path: Path) -> None:
    former = Config(  # as runs had them then
        images=Images(cache_size=256, cache="raw"),
        features=Features(whitening_power=0.0),
        neighbors=Neighbors(engine="exact"),
        clusters=Clusters(max_clusters=None, two_level_above=None),
        views=SampledViews(num_judged=None),
        evaluation=Evaluation(max_queries=None),
        selection=Selection(sets="all"),
        student=Student(whitening_power=0.0),
    )
    assert load_config(written(tmp_path, "clusters:\n")) == former
    assert load_config(written(tmp_path, "")) == former


def test_assignments_are_yaml_but_text_fields_take_the_text() -> None:
    settings = parse_assignments(
        [
            "clusters.num_clusters=[8, 9]",
            "adaptors.learning_rate=1e-3",
            "backbone.weights=/a: b#c",
            "clusters.seed = 3",
        ]
    )
    config = parse_settings(settings, "--set")
    assert config.clusters.num_clusters == (8, 9)
    assert config.adaptors.learning_rate == 1e-3
    assert config.backbone.weights == "/a: b#c"
    assert config.clusters.seed == 3
    assert parse_assignments(["backbone.weights=null"]) == {"backbone": {"weights": None}}


def test_merging_changes_fields_and_keeps_the_rest() -> None:
    base: Settings = {"clusters": {"seed": 1, "num_iterations": 5}, "index": {"rows": "all"}}
    result = merged(base, {"clusters": {"seed": 2}, "fusion": {"seed": 3}})
    assert result == {
        "clusters": {"seed": 2, "num_iterations": 5},
        "index": {"rows": "all"},
        "fusion": {"seed": 3},
    }
    assert base["clusters"]["seed"] == 1


def test_presets_are_found_by_name_or_file(tmp_path: Path) -> None:
    path = written(tmp_path, "clusters: {seed: 1}\n")
    assert preset_path(str(path)) == path
    assert preset_path("small").name == "small.yaml"
    with pytest.raises(ConfigError, match=r"no preset of that name \(.*small"):
        preset_path("smal")


@pytest.mark.parametrize("name", ["grappa", "dinov2", "dinov3", "clip", "siglip2", "small", "demo"])
def test_presets_are_valid_differ_from_the_defaults_and_say_what_they_are(name: str) -> None:
    path = preset_path(name)
    settings = read_settings(path)
    config = parse_settings(settings, name)
    for section, fields in settings.items():
        for field in fields:
            assert getattr(getattr(config, section), field) != getattr(getattr(Config(), section), field), field
    heading = path.read_text(encoding="utf-8").split("\n\n")[0]
    for word in ("Purpose:", "Time:", "Result:", "Command:"):
        assert f"# {word}" in heading


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"clusters": {"num_iteration": 3}},
            "unknown key clusters.num_iteration: did you mean clusters.num_iterations?",
        ),
        ({"cluster": {"seed": 3}}, "unknown key cluster: did you mean clusters?"),
        ({"compute": {"learning_rate": 3}}, "key compute.learning_rate: did you mean adaptors.learning_rate?"),
        ({"fusion": {"lr": 3}}, "unknown key fusion.lr: did you mean fusion.learning_rate?"),
        ({"clusters": {"num_clusters": 5}}, "found 5, expected a valid string or a list in brackets"),
        ({"index": {"zzz": 3}}, "unknown key index.zzz: expected one of rows, kind, ivf_above"),
        ({"clusters": {"num_iterations": "many"}}, "clusters.num_iterations: found 'many', expected a valid integer"),
        ({"clusters": {"num_iterations": True}}, "clusters.num_iterations: found True, expected a number"),
        ({"clusters": {"seed": -1}}, "clusters.seed: found -1, expected greater than or equal to 0"),
        ({"index": {"rows": "some"}}, "index.rows: found 'some', expected 'all', 'train' or 'test'"),
        ({"clusters": {"num_clusters": "8,16"}}, "clusters.num_clusters: found '8,16'; give auto, auto:7 "),
        ({"clusters": {"num_clusters": "auto:0"}}, "clusters.num_clusters: found 'auto:0'; give auto, auto:7 "),
        ({"clusters": {"num_clusters": [8, 8]}}, "clusters.num_clusters: found [8, 8]; give one or more different"),
        ({"backbone": {"mean": [0.5, 0.5]}}, "backbone.mean: "),
        ({"adaptors": {"learning_rate": float("nan")}}, "adaptors.learning_rate: found nan, expected"),
    ],
)
def test_errors_are_one_sentence(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_settings(settings, "config.yaml")
    text = str(caught.value)
    assert text.startswith("config.yaml: ") and message in text
    assert "\n" not in text and "pydantic" not in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("clusters: [1", "not valid YAML"),
        ("- a\n- b\n", "expected sections"),
        ("clusters: 3\n", "found 3 for `clusters`"),
        ("!!python/object:os.system {}", "not valid YAML"),
    ],
)
def test_files_that_are_no_configuration_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match="config.yaml") as caught:
        load_config(written(tmp_path, text))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(b"clusters: \xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_config(path)


@pytest.mark.parametrize("assignment", ["clusters.seed", "seed=3", "=3", "clusters.=3"])
def test_assignments_need_section_key_and_value(assignment: str) -> None:
    with pytest.raises(ConfigError, match=r"expected section\.key=value"):
        parse_assignments([assignment])


def test_only_safe_yaml_is_written() -> None:
    assert yaml.safe_load(dump_config(Config()))["clusters"]["num_clusters"] == "auto"


def test_a_key_written_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text("fusion:\n  seed: 1\n  seed: 2\n")
    with pytest.raises(ConfigError, match="`seed` is written twice"):
        read_settings(path)
