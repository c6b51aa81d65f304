"""The table of models: what is declared there is what the stages read, and nothing beside it names a model's ways."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from grappa.pipeline.commands.run import read_table
from grappa.pipeline.config.schema import Config, ExtraModel
from grappa.pipeline.config.yaml_file import ConfigError, parse_settings
from grappa.pipeline.engine.context import StageContext
from grappa.pipeline.engine.status import read_config
from grappa.pipeline.graph.models import (
    ENTRIES,
    FREE,
    MODELS,
    Making,
    Part,
    adaptor_sets,
    embedding_models,
    evaluated_models,
    find_entry,
    saw_labels,
)
from grappa.pipeline.graph.node import Node
from grappa.pipeline.graph.stages import PARTS, nodes, upstream
from grappa.pipeline.stages.embeddings import COMPUTED, OPENED
from grappa.pipeline.store.artifacts import RunFolder
from tests.helpers.tiny import draw_images, make_run, run_all, split_of, write_table, write_weights

EVERYTHING = {
    "evaluation__extra_rows": "[concat, multi_head, supervised, zero_shot_objects, adapted_objects]",
    "fusion__pairs": "[neighbors, views]",
    "objects__provider": "backbone",
}
SINGLE = {"model__source": "single", "evaluation__extra_rows": "[]", "fusion__pairs": "[neighbors]"}
SINGLE |= {"objects__provider": "none"}


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("material")
    draw_images(folder / "images")
    write_weights(folder / "weights.safetensors")
    write_table(folder / "images", folder / "table.csv", label=lambda path: path.parent.name, split=split_of)
    return folder


class Reads:
    """What the instances of the stages ask of their context, by name."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.found: dict[str, set[str]] = {}
        given = StageContext.input

        def told(context: StageContext, stage: str, instance: str | None = None) -> Path:
            self.found.setdefault(context.name, set()).add(Node(stage, instance).name)
            return given(context, stage, instance)

        monkeypatch.setattr(StageContext, "input", told)


@pytest.mark.parametrize(
    ("ways", "made"),
    [
        ([EVERYTHING, EVERYTHING | {"model__source": "student"}], ["embeddings/fused_objects", "embeddings/concat"]),
        ([SINGLE | {"clusters__num_clusters": "[6]"}], ["embeddings/k00006", "model"]),
        ([SINGLE | {"adaptors__supervision": "labels"}], ["embeddings/supervised", "adaptors/supervised"]),
        ([{"adaptors__object_weight": 0.5, "adaptors__background_weight": 0.5, "student__object_share": 0.5,
           "objects__provider": "backbone", "clusters__view": "objects", "model__source": "auto"}],
         ["student", "clusters/k00004", "verdict"]),
    ],
    ids=["several", "single", "labels", "object views"],
)  # fmt: skip
def test_what_is_declared_is_what_is_read(
    ways: list[dict[str, object]], made: list[str], material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = Reads(monkeypatch)
    for changes in ways:
        run = make_run(tmp_path / "run", [material / "table.csv"], material / "weights.safetensors", **changes)
        reads.found.clear()
        run_all(run)
        config = read_config(run)
        declared = _declared(config)
        for name, found in reads.found.items():
            # The adapted model's pixels are declared with its parts, though it sees the object views instead.
            adapted = name.startswith("embeddings/") and name != "embeddings/zero_shot_objects"
            needless = {"images"} if adapted and name.endswith("_objects") else set()
            if name in ("model", "index") and config.model.source == "auto":
                assert {"verdict"} < found < declared[name]  # of the models that could be deployed only the chosen one
            else:
                assert found == declared[name] - needless, name
        _tell_what_is_there(run, config)
        if changes is ways[0]:
            assert {*made, "evaluation", "index"} <= reads.found.keys()


def _declared(config: Config) -> dict[str, set[str]]:
    return {node.name: {each.name for each in upstream(node, config)} for node in nodes(config)}


def _tell_what_is_there(run: RunFolder, config: Config) -> None:
    rows = [row[0] for row in read_table(run.artifact("evaluation").path / "metrics.csv")[1] if row[0] != "gap closed"]
    oracle = [] if config.model.source == "single" else ["oracle"]
    assert rows == [*evaluated_models(config), *oracle]


def test_every_way_and_every_part_is_there_and_used() -> None:
    assert COMPUTED.keys() | OPENED.keys() == {model.making for model in MODELS} == set(get_args(Making))
    assert not COMPUTED.keys() & OPENED.keys()
    assert PARTS.keys() == {part for model in MODELS for part in model.parts} == set(get_args(Part))


@pytest.mark.parametrize("extra", get_args(ExtraModel))
def test_every_extra_model_is_one_of_the_table(extra: str) -> None:
    settings = {"clusters": {"num_clusters": [4, 8]}, "objects": {"provider": "backbone"}}
    plain = embedding_models(parse_settings(settings, "test"))
    more = embedding_models(parse_settings({**settings, "evaluation": {"extra_rows": [extra]}}, "test"))
    assert len(more) == len(plain) + 1 and set(plain) < set(more)


@pytest.mark.parametrize("extra", get_args(ExtraModel))
def test_an_extra_model_that_reads_object_views_needs_a_provider(extra: str) -> None:
    settings = {"clusters": {"num_clusters": [4, 8]}, "evaluation": {"extra_rows": [extra]}}
    config = parse_settings({**settings, "objects": {"provider": "backbone"}}, "test")
    reads = any(
        each.stage.startswith("object")
        for name in embedding_models(config)
        for each in upstream(Node("embeddings", name), config)
    )
    if reads:
        with pytest.raises(ConfigError, match=f"the model {extra} needs object views"):
            parse_settings(settings, "test")
    else:
        parse_settings(settings, "test")


def test_a_name_finds_its_entry() -> None:
    names = {"k00256": "k*[0-9]", "k00256_raw": "*_raw", "k00256_objects": "*_objects", "student_objects": "*_objects"}
    own = ("zero_shot", "zero_shot_objects", "zero_shot_head", "fused_views", "supervised", "oracle")
    assert {name: find_entry(name).name for name in [*names, *own]} == names | {name: name for name in own}
    with pytest.raises(ValueError, match="no model is called 'fusd'; the models are zero_shot, "):
        find_entry("fusd")


def test_what_is_free_and_what_saw_labels() -> None:
    assert FREE == ("zero_shot", "zero_shot_whitened", "zero_shot_head")
    names = ["oracle", "supervised", "supervised_raw", "supervised_objects", "fused", "zero_shot"]
    assert [saw_labels(name) for name in names] == [True] * 4 + [False] * 2
    assert len({entry.name for entry in ENTRIES}) == len({entry.meaning for entry in ENTRIES}) == len(ENTRIES)


def test_the_adaptor_sets_are_the_models_of_one_set() -> None:
    settings = {"clusters": {"num_clusters": [8, 4]}, "evaluation": {"extra_rows": ["supervised", "multi_head"]}}
    assert adaptor_sets(parse_settings(settings, "test")) == ("k00004", "k00008", "multi_head", "supervised")
