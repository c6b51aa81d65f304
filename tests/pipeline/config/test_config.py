"""The configuration's own rules: what is identity, what is checked, how k is chosen."""

from __future__ import annotations

import subprocess
import sys

import pytest
from pydantic import ValidationError

from grappa.pipeline.config.schema import (
    Clusters,
    Config,
    Evaluation,
    Fusion,
    Objects,
    SampledViews,
    automatic_num_clusters,
    granularity_name,
    identity_settings,
    num_clusters_of,
)
from grappa.pipeline.config.yaml_file import field_names
from grappa.pipeline.graph.stages import STAGES, find_stage


def test_it_is_frozen_and_every_field_is_described() -> None:
    config = Config()
    with pytest.raises(ValidationError):
        config.clusters.seed = 1  # type: ignore[misc]
    for name in field_names():
        section, _, field = name.partition(".")
        assert type(getattr(config, section)).model_fields[field].description


def test_paths_and_speed_are_no_identity() -> None:
    settings = identity_settings(Config(), ("images", "backbone", "compute", "fusion"))
    for name in ("images.sources", "backbone.weights", "compute.device", "compute.num_workers", "fusion.pairs"):
        assert name not in settings
    assert "evaluation.extra_rows" not in identity_settings(Config(), ("evaluation",))
    assert identity_settings(Config(), ("evaluation",))["evaluation.max_queries"] == "auto"
    as_before = Config(evaluation=Evaluation(max_queries=None))
    assert identity_settings(as_before, ("evaluation",)) == {"evaluation.seed": 0}, "older tables stay fresh"
    assert settings["images.cache_size"] == "auto"


def test_images_that_are_judged_belong_to_the_views_of_adapted_models() -> None:
    now, before = Config(), Config(views=SampledViews(num_judged=None))
    frozen, adapted = (find_stage(name).settings("x") for name in ("frozen_views", "views"))
    assert identity_settings(now, adapted)["views.num_judged"] == 512
    assert identity_settings(now, frozen) == identity_settings(before, frozen) == identity_settings(before, adapted)


def test_a_single_field_is_read_by_its_name() -> None:
    assert identity_settings(Config(), ("clusters.seed",)) == {"clusters.seed": 0}


def test_every_identity_field_is_read_by_a_stage() -> None:
    config = Config(clusters=Clusters(num_clusters=(2, 4, 8)), objects=Objects(provider="backbone"))
    sections = tuple(Config.model_fields)
    read = {
        name
        for stage in STAGES
        for instance in stage.instances(config)
        for name in identity_settings(config, stage.settings(instance))
    }
    chosen_by_name = {"clusters.num_clusters"}
    assert set(identity_settings(config, sections)) - read <= chosen_by_name


@pytest.mark.parametrize("num_train", [4, 5, 9, 100, 5884, 1_000_000])
def test_automatic_granularities_are_few_ascending_and_at_most_half(num_train: int) -> None:
    values = automatic_num_clusters(num_train)
    assert 1 <= len(values) <= 4
    assert list(values) == sorted(set(values))
    assert values[0] >= 2 and values[-1] <= num_train // 2


def test_automatic_granularities_are_geometric() -> None:
    assert automatic_num_clusters(6400) == (100, 277, 769, 2133)
    assert automatic_num_clusters(6400, "auto:1") == (462,)
    assert automatic_num_clusters(100, "auto:16")[-1] <= 50


@pytest.mark.parametrize(
    ("num_train", "finest"), [(60, 10), (180, 30), (300, 50), (600, 149), (1000, 333), (6400, 2133)]
)
def test_of_few_images_the_finest_clusters_hold_more_of_them(num_train: int, finest: int) -> None:
    assert automatic_num_clusters(num_train)[-1] == finest


def test_automatic_granularities_have_a_bound_and_keep_their_ratios() -> None:
    bounded = automatic_num_clusters(1_000_000, "auto", 65_536)
    assert bounded == automatic_num_clusters(10**9, "auto", 65_536) == automatic_num_clusters(3 * 65_536)
    assert bounded[-1] == 65_536 and bounded[0] == 3072
    assert set(bounded) < set(automatic_num_clusters(1_000_000, "auto:7", 65_536))
    assert automatic_num_clusters(5884, "auto", 65_536) == automatic_num_clusters(5884), "few images: as without it"
    assert automatic_num_clusters(100, "auto", 2) == (2,)
    with pytest.raises(ValidationError, match="greater than or equal to 2"):
        Clusters(max_clusters=1)


@pytest.mark.parametrize("num_train", [200, 5884, 59551, 1_000_000])
def test_more_automatic_granularities_hold_the_fewer(num_train: int) -> None:
    two, four, seven = (automatic_num_clusters(num_train, how) for how in ("auto:2", "auto", "auto:7"))
    assert set(two) < set(four) < set(seven)
    assert (len(two), len(four), len(seven)) == (2, 4, 7)


def test_granularities_are_ordered_by_number() -> None:
    config = Config(clusters=Clusters(num_clusters=(1024, 64, 131072)))
    assert config.granularities == ("k00064", "k01024", "k131072")
    assert [num_clusters_of(name) for name in config.granularities] == [64, 1024, 131072]
    assert granularity_name(7) == "k00007"


def test_extra_rows_are_known_and_named_once() -> None:
    assert Evaluation(extra_rows=("supervised", "concat")).extra_rows == ("supervised", "concat")
    with pytest.raises(ValidationError, match="give each model once"):
        Evaluation(extra_rows=("concat", "concat"))
    with pytest.raises(ValidationError, match="'zero_shot_objects' or 'adapted_objects'"):
        Evaluation.model_validate({"extra_rows": ["oracle"]})


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"evaluation": {"extra_rows": ["zero_shot_objects"]}},
            "zero_shot_objects needs object views, but objects.provider is none",
        ),
        ({"objects": {"provider": "grounding_dino"}}, "objects.model is null; give a hub name or folder"),
        ({"objects": {"min_area": 0.9, "max_area": 0.5}}, "min_area is 0.9 and max_area 0.5"),
    ],
)
def test_objects_are_asked_for_in_full(settings: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        Config.model_validate(settings)


def test_auto_has_no_granularities_yet() -> None:
    with pytest.raises(ValueError, match="still `auto`"):
        _ = Config().granularities


@pytest.mark.parametrize("pairs", [("views",), ("neighbors", "neighbors"), ()])
def test_the_fusion_of_neighbors_is_always_trained(pairs: tuple[str, ...]) -> None:
    with pytest.raises(ValidationError, match="give \\[neighbors\\] or"):
        Fusion.model_validate({"pairs": pairs})


def test_a_section_as_json_is_what_pydantic_would_write() -> None:
    given = {
        "images": {"sources": ["a", "b"]},
        "backbone": {"mean": [0.5, 0.25, 1], "std": [1, 1, 2], "options": {"depth": 6, "init_values": 0.5}},
        "clusters": {"num_clusters": [8, 64]},
        "evaluation": {"extra_rows": ["concat"], "max_queries": 100},
    }
    for config in (Config(), Config.model_validate(given)):
        whole = config.model_dump(mode="json")
        for name in Config.model_fields:
            assert repr(getattr(config, name).to_json()) == repr(whole[name])


def test_the_check_of_a_configuration_asks_for_no_plugins_of_pydantic() -> None:
    code = (
        "import importlib.metadata as metadata\n"
        "def asked(**kinds): raise AssertionError(kinds)\n"
        "metadata.entry_points = asked\n"
        "from grappa.pipeline.config.schema import Config\n"
        "Config.model_validate(dict.fromkeys(Config.model_fields, {}))\n"
        "import os; assert 'PYDANTIC_DISABLE_PLUGINS' not in os.environ\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
