"""The graph as data: the inputs, settings and instances of each stage.

The *fingerprint* of a result holds the version of its stage, and the settings and the digests of the files that the
stage lists here; nothing else can change the result. Raise ``version`` when the same fingerprint would give another
result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from grappa.pipeline.config.schema import Config, SampledViews, identity_settings, num_clusters_of
from grappa.pipeline.graph.models import (
    CHOOSING_MODEL,
    Part,
    adaptor_sets,
    candidate_models,
    deployable_models,
    embedding_models,
    evaluated_models,
    find_model,
    fusions,
    head_models,
    model_on_objects,
    taught_by,
)
from grappa.pipeline.graph.node import Node

PIXELS = ("images.parquet", "pixels/")
LABELS = ("images.parquet", "labels.parquet")
WEIGHTS = ("weights.safetensors", "backbone.json")
VIEWS = ("views.npy", "rows.npy")
MIN_KEPT = 2  # sets that are fused in any case (grappa.method.set_choice, which takes longer to import)


@dataclass(frozen=True)
class Input:
    """Files of one upstream artifact: names, or folders ending in ``/``."""

    stage: str
    files: tuple[str, ...]
    instance: str | None = None

    @cached_property
    def node(self) -> Node:
        return Node(self.stage, self.instance)


@dataclass(frozen=True)
class Stage:
    """One step of the pipeline.

    ``settings`` returns the sections or single fields of the configuration that an instance reads; ``choices`` what it
    makes of fields that are provenance otherwise, where this can change its result. ``externals`` names
    the inputs that no stage makes (``sources``: the list of images; ``weights``: the backbone's file; ``originals``:
    the image files, whose digests the image table holds; ``detector``: the model of ``objects.model``; ``embeddings``:
    those of ``clusters.embeddings``). ``parallel``: whether several processes can compute the stage together; otherwise
    the first process computes it. ``by_rows``: whether ranges of the rows can be computed apart from each other (see
    ``by_ranges``). ``function``: what computes it, by default ``run`` of the module of its name.
    """

    name: str
    version: int
    settings: Callable[[str | None], tuple[str, ...]]
    inputs: Callable[[Config, str | None], tuple[Input, ...]]
    instances: Callable[[Config], tuple[str | None, ...]] = lambda config: (None,)
    externals: tuple[str, ...] = ()
    parallel: bool = False
    by_rows: bool = False
    function: str = ""
    choices: Callable[[Config, str | None], dict[str, Any]] = lambda config, instance: {}

    @property
    def module(self) -> str:
        """The module that computes the stage."""
        return f"grappa.pipeline.stages.{self.function.partition('.')[0] or self.name}"

    @property
    def entry(self) -> str:
        """The function of the module that computes an instance."""
        return self.function.partition(".")[2] or "run"


def _settings(*names: str) -> Callable[[str | None], tuple[str, ...]]:
    return lambda instance: names


def _embedding_settings(instance: str | None) -> tuple[str, ...]:
    return find_model(str(instance)).settings


def _granularities(config: Config) -> tuple[str | None, ...]:
    return config.granularities


def searched_node(config: Config, stage: str = "features") -> Node:
    """Return the node whose features neighbours are sought in: the whitened ones of a stage, or its raw ones."""
    return Node("whitening", stage) if config.features.whitening_power else Node(stage)


def clustered_node(config: Config) -> Node:
    """Return the node whose features are clustered: those of images, with ``clusters.view`` of object views, or with
    ``clusters.embeddings`` what a model of another run made of the images."""
    if config.clusters.embeddings is not None:
        return searched_node(config, "given_features")
    return searched_node(config, "object_features" if config.clusters.view == "objects" else "features")


def _whitened(config: Config) -> tuple[str | None, ...]:
    found = (searched_node(config), clustered_node(config))
    return tuple(dict.fromkeys(node.instance for node in found if node.stage == "whitening"))


def views_node(model: str) -> Node:
    """Return the node with the views through a model; those through the frozen backbone are there before any other."""
    return Node("frozen_views") if model == CHOOSING_MODEL else Node("views", model)


def _views(model: str) -> Input:
    node = views_node(model)
    return Input(node.stage, VIEWS, node.instance)


def _whitening_inputs(config: Config, instance: str | None) -> tuple[Input, ...]:
    made = (Input("images", ("images.parquet",)), Input(str(instance), ("features.npy",)))
    if config.features.whitening_power != "auto":
        return made
    return (*dict.fromkeys([*made, Input("features", ("features.npy",)), _views(CHOOSING_MODEL)]),)


def _neighbor_inputs(config: Config, instance: str | None) -> tuple[Input, ...]:
    node = searched_node(config)
    return (Input("images", ("images.parquet",)), Input(node.stage, ("features.npy",), node.instance))


def _cluster_inputs(config: Config, instance: str | None) -> tuple[Input, ...]:
    node = clustered_node(config)
    return (Input("images", ("images.parquet",)), Input(node.stage, ("features.npy",), node.instance))


def _cluster_choices(config: Config, instance: str | None) -> dict[str, Any]:
    """Return the way to many clusters; the one to few is what it was before there were two."""
    two = config.clusters.in_two_levels(num_clusters_of(str(instance)))
    return {"clusters.in_two_levels": True} if two else {}


def centroids_are_features(config: Config) -> bool:
    """Tell whether the centroids of clusters are mean features of the backbone, by which proxies begin."""
    return not config.features.whitening_power and config.clusters.embeddings is None


def _given(config: Config) -> tuple[str | None, ...]:
    return () if config.clusters.embeddings is None else (None,)


def _object_instances(config: Config) -> tuple[str | None, ...]:
    return () if config.objects.provider == "none" else (None,)


def _object_inputs(config: Config, instance: str | None) -> tuple[Input, ...]:
    reads_backbone = config.objects.provider in ("backbone", "random")
    return (Input("images", PIXELS), *((Input("backbone", WEIGHTS),) if reads_backbone else ()))


def _perceived(weight: float) -> tuple[Input, ...]:
    """Return the object views as an input where their ``weight`` is not 0."""
    return (Input("objects", ("objects.parquet", "pixels/")),) if weight else ()


def _set_inputs(config: Config, instance: str | None) -> tuple[Input, ...]:
    weights = config.adaptors.object_weight + config.adaptors.transfer_weight + config.adaptors.background_weight
    return (*_target_inputs(config, instance), *_perceived(weights))


def _target_inputs(config: Config, instance: str | None) -> tuple[Input, ...]:
    granularities = taught_by(config, str(instance))
    known, features = Input("backbone", WEIGHTS), Input("features", ("features.npy",))
    if not granularities:
        return (Input("images", (*PIXELS, "labels.parquet")), known, features)
    raw = centroids_are_features(config)
    files = ("assignments.parquet", "centroids.npy") if raw else ("assignments.parquet",)
    clusters = (Input("clusters", files, name) for name in granularities)
    return (Input("images", PIXELS), known, *(() if raw else (features,)), *clusters)


def _adaptor_inputs(config: Config) -> tuple[Input, ...]:
    return tuple(Input("adaptors", ("adaptors.safetensors",), name) for name in config.granularities)


def _selection(config: Config) -> tuple[str | None, ...]:
    """Return the instance of the stage ``selection``: two sets are fused in any case."""
    choosing = config.selection.sets == "auto" and len(config.granularities) > MIN_KEPT
    return (None,) if choosing and config.model.source != "single" else ()


def _selection_inputs(config: Config, instance: str | None) -> tuple[Input, ...]:
    made = (Input("images", PIXELS), Input("backbone", WEIGHTS), Input("features", ("features.npy",)))
    return (*made, *_adaptor_inputs(config))


def _fused_sets(config: Config) -> tuple[Input, ...]:
    """Return all adaptor sets, and where there is a selection the names of those that are fused."""
    chosen = (Input("selection", ("selection.json",)),) if _selection(config) else ()
    return (*_adaptor_inputs(config), *chosen)


def _fusion_inputs(config: Config, instance: str | None) -> tuple[Input, ...]:
    neighbors = (Input("neighbors", ("neighbors.npy",)),) if instance == "neighbors" else ()
    return (Input("images", PIXELS), Input("backbone", WEIGHTS), *neighbors, *_fused_sets(config))


def _fused_inputs(config: Config, instance: str | None = "neighbors") -> tuple[Input, ...]:
    fusion = Input("fusion", ("fusion.safetensors",), instance)
    return (Input("backbone", WEIGHTS), *_fused_sets(config), fusion)


PARTS: dict[Part, Callable[[Config, str], tuple[Input, ...]]] = {
    "table": lambda config, model: (Input("images", ("images.parquet",)),),
    "pixels": lambda config, model: (Input("images", PIXELS),),
    "features": lambda config, model: (Input("features", ("features.npy",)),),
    "object_features": lambda config, model: (Input("object_features", ("features.npy",)),),
    "object_views": lambda config, model: _perceived(True),
    "backbone": lambda config, model: (Input("backbone", WEIGHTS),),
    "set": lambda config, model: (Input("adaptors", ("adaptors.safetensors",), model),),
    "sets": lambda config, model: _fused_sets(config),
    "neighbors_fusion": lambda config, model: (Input("fusion", ("fusion.safetensors",), "neighbors"),),
    "views_fusion": lambda config, model: (Input("fusion", ("fusion.safetensors",), "views"),),
    "student": lambda config, model: (Input("student", ("student.safetensors",)),),
    "embeddings": lambda config, model: tuple(
        Input("embeddings", ("embeddings.npy",), name) for name in config.granularities
    ),
    "on_objects": lambda config, model: _parts_of(config, model_on_objects(config)),
}


def _parts_of(config: Config, model: str, *, but: tuple[Part, ...] = ()) -> tuple[Input, ...]:
    """Return the inputs of a model of the result table, without those of the parts ``but``."""
    return tuple(each for part in find_model(model).parts if part not in but for each in PARTS[part](config, model))


def _embedding_inputs(config: Config, instance: str | None) -> tuple[Input, ...]:
    return _parts_of(config, str(instance))


def _choice(config: Config) -> tuple[Input, ...]:
    """Return the verdict as an input where it chooses the deployed model."""
    return (Input("verdict", ("verdict.json",)),) if config.model.source == "auto" else ()


def _finals(config: Config, models: Iterable[str]) -> list[Input]:
    """Return the final embeddings of models that can be deployed."""
    fitted = head_models(config)
    return [Input("heads" if model in fitted else "embeddings", ("embeddings.npy",), model) for model in models]


def _heads_of(config: Config, models: Iterable[str]) -> list[Input]:
    fitted = head_models(config)
    return [Input("heads", ("head.safetensors",), model) for model in models if model in fitted]


def _model_inputs(config: Config, instance: str | None) -> tuple[Input, ...]:
    models = deployable_models(config)
    parts = [each for model in models for each in _parts_of(config, model, but=("pixels", "features"))]
    heads = _heads_of(config, models)
    return (*dict.fromkeys([Input("backbone", WEIGHTS), *parts, *heads, *_choice(config)]),)


def _view_settings(instance: str | None) -> tuple[str, ...]:
    return ("views", "embeddings.precision")


def _frozen_view_settings(instance: str | None) -> tuple[str, ...]:
    fields = (f"views.{field}" for field in SampledViews.model_fields if field != "num_judged")
    return (*fields, "embeddings.precision")


def _view_inputs(config: Config, instance: str | None) -> tuple[Input, ...]:
    parts = _parts_of(config, str(instance), but=("features",))
    return (*dict.fromkeys([Input("images", PIXELS), Input("backbone", WEIGHTS), *parts]),)


def _head_inputs(config: Config, instance: str | None) -> tuple[Input, ...]:
    own = (Input("images", ("images.parquet",)), Input("embeddings", ("embeddings.npy",), instance))
    if config.heads.kind != "auto":
        return own
    choosing = instance == CHOOSING_MODEL
    return (*own, _views(CHOOSING_MODEL) if choosing else Input("heads", ("choice.json",), CHOOSING_MODEL))


def _verdict_inputs(config: Config, instance: str | None) -> tuple[Input, ...]:
    models = candidate_models(config)
    embedded = (*_finals(config, models), *_heads_of(config, models))
    return (Input("images", ("images.parquet",)), *embedded, *(_views(model) for model in models))


def _attention_inputs(config: Config, instance: str | None) -> tuple[Input, ...]:
    return (Input("images", PIXELS), *_fused_inputs(config, instance))


def _retrieval_inputs(config: Config, instance: str | None) -> tuple[Input, ...]:
    node = evaluated_models(config)[str(instance)]
    return (Input("images", LABELS), Input(node.stage, ("embeddings.npy",), node.instance))


def _evaluation_inputs(config: Config, instance: str | None) -> tuple[Input, ...]:
    clusters = (Input("clusters", ("assignments.parquet",), name) for name in config.granularities)
    files = ("per_query.parquet", "reciprocity.parquet")
    models = (Input("retrieval", files, name) for name in evaluated_models(config))
    return (Input("images", LABELS), *clusters, *models)


STAGES: tuple[Stage, ...] = (
    Stage("backbone", 1, _settings("backbone"), lambda config, instance: (), externals=("weights",)),
    Stage("images", 1, _settings("images"), lambda config, instance: (), externals=("sources",), parallel=True),
    Stage(
        "features",
        2,
        _settings("features.precision"),
        lambda config, instance: (Input("images", PIXELS), Input("backbone", WEIGHTS)),
        parallel=True,
        by_rows=True,
    ),
    Stage(
        "given_features",
        1,
        _settings(),
        lambda config, instance: (Input("images", ("images.parquet",)),),
        _given,
        externals=("embeddings",),
        function="features.run_on_given",
    ),
    Stage(
        "objects",
        2,
        _settings("objects", "images.cache", "images.cache_size", "images.shard_size", "features.precision"),
        _object_inputs,
        _object_instances,
        externals=("originals", "detector"),
    ),
    Stage(
        "object_features",
        2,
        _settings("features.precision"),
        lambda config, instance: (Input("objects", ("pixels/",)), Input("backbone", WEIGHTS)),
        _object_instances,
        parallel=True,
        by_rows=True,
        function="features.run_on_objects",
    ),
    Stage(
        "frozen_views",
        1,
        _frozen_view_settings,
        lambda config, instance: (Input("images", PIXELS), Input("backbone", WEIGHTS)),
        parallel=True,
        function="embeddings.run_on_views",
    ),
    Stage(
        "whitening",
        1,
        _settings("features.whitening_power"),
        _whitening_inputs,
        _whitened,
        function="heads.run_on_features",
    ),
    Stage("neighbors", 1, _settings("neighbors"), _neighbor_inputs, parallel=True),
    Stage(
        "clusters",
        3,
        _settings("clusters.num_iterations", "clusters.seed"),
        _cluster_inputs,
        _granularities,
        parallel=True,
        choices=_cluster_choices,
    ),
    Stage("adaptors", 1, _settings("adaptors"), _set_inputs, adaptor_sets, parallel=True),
    Stage(
        "selection",
        2,
        lambda instance: ("selection", *_frozen_view_settings(instance)),
        _selection_inputs,
        _selection,
        function="adaptors.select",
    ),
    Stage("fusion", 1, _settings("fusion"), _fusion_inputs, fusions, parallel=True),
    Stage(
        "student",
        2,
        _settings("student"),
        lambda config, instance: (
            Input("images", PIXELS),
            *_fused_inputs(config),
            *_perceived(config.student.object_share),
        ),
        lambda config: () if config.model.source == "single" else (None,),
        parallel=True,
    ),
    Stage("embeddings", 2, _embedding_settings, _embedding_inputs, embedding_models, parallel=True, by_rows=True),
    Stage(
        "views",
        1,
        _view_settings,
        _view_inputs,
        lambda config: candidate_models(config)[1:],
        parallel=True,
        function="embeddings.run_on_views",
    ),
    Stage("heads", 3, _settings("heads"), _head_inputs, head_models),
    Stage("verdict", 2, _settings(), _verdict_inputs),
    Stage(
        "model",
        1,
        _settings("images.cache_size"),
        _model_inputs,
    ),
    Stage(
        "retrieval",
        1,
        _settings("evaluation"),
        _retrieval_inputs,
        lambda config: tuple(evaluated_models(config)),
        function="evaluation.run_on_model",
    ),
    Stage("evaluation", 3, _settings("evaluation"), _evaluation_inputs),
    Stage(
        "index",
        1,
        _settings("index"),
        lambda config, instance: (
            Input("images", ("images.parquet",)),
            *_choice(config),
            *_finals(config, deployable_models(config)),
        ),
    ),
    Stage(
        "attention",
        2,
        _settings("embeddings.precision"),
        _attention_inputs,
        fusions,
        parallel=True,
    ),
)


def nodes(config: Config) -> Iterator[Node]:
    """Yield every instance of every stage in the order of the graph."""
    for stage in STAGES:
        for instance in stage.instances(config):
            yield Node(stage.name, instance)


def inputs_of(node: Node, config: Config) -> tuple[Input, ...]:
    """Return the files that a node reads."""
    return find_stage(node.stage).inputs(config, node.instance)


def settings_of(node: Node, config: Config) -> dict[str, Any]:
    """Return the settings that are a part of a node's fingerprint, with what it chooses by others."""
    stage = find_stage(node.stage)
    return identity_settings(config, stage.settings(node.instance)) | stage.choices(config, node.instance)


def upstream(node: Node, config: Config) -> list[Node]:
    """Return the nodes that a node reads, without repeats."""
    return list(dict.fromkeys(each.node for each in inputs_of(node, config)))


def by_ranges(node: Node, config: Config) -> bool:
    """Tell whether ranges of a node's rows can be computed apart: each row is computed from the pixels of its image."""
    pixels = any("pixels/" in each.files for each in inputs_of(node, config))
    return find_stage(node.stage).by_rows and pixels


def with_upstream(wanted: Iterable[Node], config: Config) -> set[Node]:
    """Return the nodes and all that they read, directly or not."""
    found: set[Node] = set()
    waiting = list(wanted)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += upstream(node, config)
    return found


def find_stage(name: str) -> Stage:
    """Return the stage of a name; the ValueError for an unknown name lists the known ones."""
    for stage in STAGES:
        if stage.name == name:
            return stage
    raise ValueError(f"no stage is called {name!r}; the stages are {', '.join(stage.name for stage in STAGES)}")
