"""The graph as data: what each stage reads, which instances it has, and where its code lives.

A stage's *recipe* is its version, the configuration it lists here and the digests of the files it lists here: nothing
else can change its result. Bump ``version`` when the same recipe would give another result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pipeline.config import Config

PIXELS = ("images.parquet", "pixels/")
WEIGHTS = ("weights.safetensors", "backbone.json")
FROZEN_ROWS = ("zero_shot", "zero_shot_whitened", "zero_shot_objects")


@dataclass(frozen=True)
class Input:
    """Files of one upstream artifact: names, or folders ending in ``/``."""

    stage: str
    files: tuple[str, ...]
    instance: str | None = None

    @property
    def name(self) -> str:
        return artifact_name(self.stage, self.instance)


@dataclass(frozen=True)
class Stage:
    """One step of the pipeline.

    ``settings`` gives the sections or single fields of the configuration that an instance reads; ``externals`` the
    things outside the run folder that it reads (``sources``: the list of images, ``weights``: the backbone's file,
    ``originals``: the images' files, whose digests the image table holds, ``detector``: the one of ``objects.model``).
    ``parallel``: several processes can compute it, if there are; any other stage is left to the first of them.
    """

    name: str
    version: int
    settings: Callable[[str | None], tuple[str, ...]]
    inputs: Callable[[Config, str | None], tuple[Input, ...]]
    instances: Callable[[Config], tuple[str | None, ...]] = lambda config: (None,)
    externals: tuple[str, ...] = ()
    parallel: bool = False

    @property
    def module(self) -> str:
        return f"pipeline.{self.name}"


def artifact_name(stage: str, instance: str | None) -> str:
    """Return ``features`` or ``clusters/k00256``."""
    return stage if instance is None else f"{stage}/{instance}"


def _settings(*names: str) -> Callable[[str | None], tuple[str, ...]]:
    return lambda instance: names


def _embedding_settings(instance: str | None) -> tuple[str, ...]:
    if instance in ("zero_shot", "zero_shot_objects", "concat"):
        return ()
    return ("embeddings.whitening_power",) if instance == "zero_shot_whitened" else ("embeddings.precision",)


def _granularities(config: Config) -> tuple[str | None, ...]:
    return config.granularities


def adaptor_sets(config: Config) -> tuple[str, ...]:
    """Return the adaptor sets that are trained: one a granularity, and the competitors that were asked for."""
    extra = (name for name in ("multi_head", "supervised") if name in config.evaluation.extra_rows)
    return (*config.granularities, *extra)


def embedding_rows(config: Config) -> tuple[str, ...]:
    """Return the models whose embeddings are kept.

    ``zero_shot_objects``: the frozen backbone on object views; ``concat``: the granularities' embeddings side by side;
    ``multi_head``: one set trained on all granularities at once; ``supervised``: one set trained on the train labels.
    """
    views = ("fused_views",) if "views" in config.fusion.pairs else ()
    extra = config.evaluation.extra_rows
    frozen = FROZEN_ROWS if "zero_shot_objects" in extra else FROZEN_ROWS[:2]
    concat = ("concat",) if "concat" in extra else ()
    alone = adaptor_sets(config)[len(config.granularities) :]
    return (*frozen, *config.granularities, "mean", "fused", "student", *views, *concat, *alone)


def head_rows(config: Config) -> tuple[str, ...]:
    """Return the embedding rows that get a head: the adapted models, and the frozen backbone if there is a head."""
    adapted = tuple(row for row in embedding_rows(config) if row not in FROZEN_ROWS)
    return adapted if config.heads.kind == "none" else ("zero_shot", *adapted)


def evaluated_rows(config: Config) -> dict[str, tuple[str, str]]:
    """Return the rows of the result table but the oracle, each with the stage and instance of its final embeddings.

    Adapted models are evaluated with their head. ``zero_shot_head`` is the frozen backbone with one, and ``fused_raw``
    the fused model without: left out where no head is asked for.
    """
    rows = {}
    for row in embedding_rows(config):
        rows[row] = ("embeddings" if row in FROZEN_ROWS else "heads", row)
        if row == "zero_shot_whitened" and config.heads.kind != "none":
            rows["zero_shot_head"] = ("heads", "zero_shot")
        if row == "fused" and config.heads.kind != "none":
            rows["fused_raw"] = ("embeddings", "fused")
    return rows


def _feature_inputs(config: Config, instance: str | None) -> tuple[Input, ...]:
    return (Input("images", ("images.parquet",)), Input("features", ("features.npy",)))


def _object_instances(config: Config) -> tuple[str | None, ...]:
    return () if config.objects.provider == "none" else (None,)


def _object_inputs(config: Config, instance: str | None) -> tuple[Input, ...]:
    reads_backbone = config.objects.provider in ("backbone", "random")
    return (Input("images", PIXELS), *((Input("backbone", WEIGHTS),) if reads_backbone else ()))


def _set_inputs(config: Config, instance: str | None) -> tuple[Input, ...]:
    if instance == "supervised":
        images = Input("images", (*PIXELS, "labels.parquet"))
        return (images, Input("backbone", WEIGHTS), Input("features", ("features.npy",)))
    names = config.granularities if instance == "multi_head" else (instance,)
    clusters = (Input("clusters", ("assignments.parquet", "centroids.npy"), name) for name in names)
    return (Input("images", PIXELS), Input("backbone", WEIGHTS), *clusters)


def _adaptor_inputs(config: Config) -> tuple[Input, ...]:
    return tuple(Input("adaptors", ("adaptors.safetensors",), name) for name in config.granularities)


def _fusion_inputs(config: Config, instance: str | None) -> tuple[Input, ...]:
    neighbors = (Input("neighbors", ("neighbors.npy",)),) if instance == "neighbors" else ()
    return (Input("images", PIXELS), Input("backbone", WEIGHTS), *neighbors, *_adaptor_inputs(config))


def fusion_instance(row: str) -> str:
    """Return the fusion behind an embedding row: ``fused`` -> ``neighbors``, ``fused_views`` -> ``views``."""
    return {"fused": "neighbors", "fused_views": "views"}[row]


def _fused_inputs(config: Config, instance: str | None = "neighbors") -> tuple[Input, ...]:
    fusion = Input("fusion", ("fusion.safetensors",), instance or "neighbors")
    return (Input("backbone", WEIGHTS), *_adaptor_inputs(config), fusion)


def _student_inputs(config: Config) -> tuple[Input, ...]:
    return (Input("backbone", WEIGHTS), Input("student", ("student.safetensors",)))


def _model_inputs(config: Config, instance: str | None) -> tuple[Input, ...]:
    source = config.model.source
    parts = _student_inputs(config) if source == "student" else _fused_inputs(config)
    return (*parts, Input("heads", ("head.safetensors",), source))


def _embedding_inputs(config: Config, instance: str | None) -> tuple[Input, ...]:
    row = str(instance)
    if row == "zero_shot":
        return (Input("features", ("features.npy",)),)
    if row == "zero_shot_objects":
        return (Input("object_features", ("features.npy",)),)
    if row == "zero_shot_whitened":
        return _feature_inputs(config, instance)
    if row == "student":
        return (Input("images", PIXELS), *_student_inputs(config))
    if row == "concat":
        return tuple(Input("embeddings", ("embeddings.npy",), name) for name in config.granularities)
    base = (Input("images", PIXELS), Input("backbone", WEIGHTS))
    if row == "mean":
        return (*base, *_adaptor_inputs(config))
    if row in adaptor_sets(config):
        return (*base, Input("adaptors", ("adaptors.safetensors",), row))
    return (Input("images", PIXELS), *_fused_inputs(config, fusion_instance(row)))


def _head_inputs(config: Config, instance: str | None) -> tuple[Input, ...]:
    return (Input("images", ("images.parquet",)), Input("embeddings", ("embeddings.npy",), instance))


def _attention_inputs(config: Config, instance: str | None) -> tuple[Input, ...]:
    return (Input("images", PIXELS), *_fused_inputs(config, instance))


def _evaluation_inputs(config: Config, instance: str | None) -> tuple[Input, ...]:
    rows = evaluated_rows(config).values()
    embeddings = tuple(Input(stage, ("embeddings.npy",), row) for stage, row in rows)
    return (Input("images", ("images.parquet", "labels.parquet")), *embeddings)


STAGES: tuple[Stage, ...] = (
    Stage("backbone", 1, _settings("backbone"), lambda config, instance: (), externals=("weights",)),
    Stage("images", 1, _settings("images"), lambda config, instance: (), externals=("sources",), parallel=True),
    Stage(
        "features",
        1,
        _settings("features"),
        lambda config, instance: (Input("images", PIXELS), Input("backbone", WEIGHTS)),
        parallel=True,
    ),
    Stage(
        "objects",
        1,
        _settings("objects", "images.cache_size", "images.shard_size", "features.precision"),
        _object_inputs,
        _object_instances,
        externals=("originals", "detector"),
    ),
    Stage(
        "object_features",
        1,
        _settings("features"),
        lambda config, instance: (Input("objects", ("pixels/",)), Input("backbone", WEIGHTS)),
        _object_instances,
        parallel=True,
    ),
    Stage(
        "neighbors",
        1,
        _settings("neighbors"),
        _feature_inputs,
        parallel=True,
    ),
    Stage(
        "clusters",
        1,
        _settings("clusters.num_iterations", "clusters.seed"),
        _feature_inputs,
        _granularities,
    ),
    Stage("adaptors", 1, _settings("adaptors"), _set_inputs, adaptor_sets, parallel=True),
    Stage("fusion", 1, _settings("fusion"), _fusion_inputs, lambda config: config.fusion.pairs, parallel=True),
    Stage(
        "student",
        1,
        _settings("student"),
        lambda config, instance: (Input("images", PIXELS), *_fused_inputs(config)),
        parallel=True,
    ),
    Stage("embeddings", 1, _embedding_settings, _embedding_inputs, embedding_rows, parallel=True),
    Stage("heads", 1, _settings("heads"), _head_inputs, head_rows),
    Stage(
        "model",
        1,
        _settings("images.cache_size"),
        _model_inputs,
    ),
    Stage("evaluation", 2, _settings("evaluation"), _evaluation_inputs),
    Stage(
        "index",
        1,
        _settings("index"),
        lambda config, instance: (
            Input("images", ("images.parquet",)),
            Input("heads", ("embeddings.npy",), config.model.source),
        ),
    ),
    Stage(
        "attention",
        1,
        _settings("embeddings.precision"),
        _attention_inputs,
        lambda config: config.fusion.pairs,
        parallel=True,
    ),
)


def find_stage(name: str) -> Stage:
    """Return a stage by name, or a ValueError that lists the names."""
    for stage in STAGES:
        if stage.name == name:
            return stage
    raise ValueError(f"no stage is called {name!r}; the stages are {', '.join(stage.name for stage in STAGES)}")
