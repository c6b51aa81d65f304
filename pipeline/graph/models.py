"""The models of the result table: one line declares a model, and every other part of the pipeline reads it here.

A new model is a line of ``MODELS``. If its embeddings are made in a new way, the way needs a word of ``Making`` and a
function in ``grappa.pipeline.stages.embeddings``. If it reads new files, they need a word of ``Part`` and an entry of
``PARTS`` in ``grappa.pipeline.graph.stages``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from fnmatch import fnmatchcase
from functools import cache
from typing import Literal

from grappa.core.names import ORACLE
from grappa.pipeline.config.schema import Config, ExtraModel
from grappa.pipeline.graph.node import Node

# fmt: off
Part = Literal[
    "table", "pixels", "features", "object_features", "object_views", "backbone", "set", "sets", "neighbors_fusion",
    "views_fusion", "student", "embeddings", "on_objects",
]
Making = Literal[
    "features", "object_features", "whitening", "side_by_side", "set", "mean", "neighbors_fusion", "views_fusion",
    "student", "on_objects",
]
# fmt: on
SUPERVISED, MULTI_HEAD = "supervised", "multi_head"
CHOOSING_MODEL = "zero_shot"  # by whose embeddings the weight of all heads is chosen


def _always(config: Config) -> bool:
    return True


def _has_several_sets(config: Config) -> bool:
    return config.model.source != "single"


def model_before_head(config: Config) -> str:
    """Return the adapted model that is also looked at without its head: fused, or the only set."""
    return "fused" if _has_several_sets(config) else deployed_model(config)


def _asked(extra: ExtraModel) -> Callable[[Config], bool]:
    return lambda config: extra in config.evaluation.extra_rows


def _learns_from_labels(config: Config) -> bool:
    return config.adaptors.supervision == "labels" or _asked("supervised")(config)


@dataclass(frozen=True)
class Entry:
    """An entry of the result table.

    ``name``: the name, or a pattern such as ``k*[0-9]``; ``meaning``: a description for people. ``free``: the model
    needs no training, so that gains are computed against the best free model. ``labels``: labels were used to make it.
    """

    name: str
    meaning: str
    _: KW_ONLY
    free: bool = False
    labels: bool = False


@dataclass(frozen=True)
class Model(Entry):
    """A model with embeddings, an instance of the stage ``embeddings``.

    ``making``: the function of that stage that makes the embeddings; ``parts``: the inputs of this function;
    ``settings``: the fields of the configuration that it reads. ``exists``: whether a run has the model; ``names``: its
    names in a run, where ``name`` is a pattern. ``head``: whether an embedding head makes the final embeddings.
    ``compared``: whether the report shows the gain of the model.
    """

    making: Making
    parts: tuple[Part, ...]
    exists: Callable[[Config], bool] = _always
    names: Callable[[Config], tuple[str, ...]] | None = None
    settings: tuple[str, ...] = ("embeddings.precision",)
    head: bool = True
    compared: bool = False

    def names_in(self, config: Config) -> tuple[str, ...]:
        """Return the names of the model in a run: none, one, or one for each granularity."""
        if not self.exists(config):
            return ()
        return self.names(config) if self.names else (self.name,)


@dataclass(frozen=True)
class Variant(Entry):
    """A model evaluated a second time: with a head (``stage`` heads) or without (``stage`` embeddings).

    Variants exist only where heads are fitted. ``of``: returns the model; ``after``: the model behind which the variant
    stands in the result table, if not ``of``.
    """

    stage: Literal["embeddings", "heads"]
    of: Callable[[Config], str]
    after: str | None = None

    def follows(self, model: str, config: Config) -> bool:
        """Tell whether the variant stands after a model in the result table."""
        return config.heads.kind != "none" and model == (self.after or self.of(config))


# fmt: off
MODELS = (
    Model("zero_shot", "the unadapted backbone",
          "features", ("features",), settings=(), head=False, free=True),
    Model("zero_shot_whitened",
          "the same after PCA whitening: free, so gains count against the best of the zero-shot models",
          "whitening", ("table", "features"), settings=("embeddings.whitening_power",), head=False, free=True),
    Model("zero_shot_objects",
          "the unadapted backbone on object views, as queries and as gallery: what objects could teach",
          "object_features", ("object_features",), _asked("zero_shot_objects"), settings=(), head=False),
    Model("k*[0-9]", "the adaptor set of this pseudo-granularity alone",
          "set", ("pixels", "backbone", "set"), names=lambda config: config.granularities),
    Model("mean", "the fused adaptor sets with equal attention: nothing learned beyond the sets",
          "mean", ("pixels", "backbone", "sets"), _has_several_sets, compared=True),
    Model("fused", "the learned attention over the fused sets",
          "neighbors_fusion", ("pixels", "backbone", "sets", "neighbors_fusion"), _has_several_sets,
          compared=True),
    Model("student", "one adaptor set that was taught by the fused model",
          "student", ("pixels", "backbone", "student"), _has_several_sets, compared=True),
    Model("fused_views", "the ablation: attention learned from two views of an image instead of neighbours",
          "views_fusion", ("pixels", "backbone", "sets", "views_fusion"), lambda config: "views" in fusions(config)),
    Model("concat", "the sets' embeddings side by side: an upper reference of several times the size",
          "side_by_side", ("embeddings",), _asked("concat"), settings=()),
    Model(MULTI_HEAD, "one adaptor set trained on all granularities at once",
          "set", ("pixels", "backbone", "set"), _asked("multi_head")),
    Model(SUPERVISED, "adaptors trained on the train labels: what labels would have bought",
          "set", ("pixels", "backbone", "set"), _learns_from_labels, labels=True),
    Model("*_objects", "the same model on object views, as queries and as gallery",
          "on_objects", ("object_views", "on_objects"), _asked("adapted_objects"),
          lambda config: (f"{model_on_objects(config)}_objects",), head=False),
)
VARIANTS = (
    Variant("zero_shot_head", "the unadapted backbone with an embedding head: free too",
            "heads", lambda config: "zero_shot", after="zero_shot_whitened", free=True),
    Variant("*_raw", "the same without its embedding head",
            "embeddings", model_before_head),
)
# fmt: on
ENTRIES: tuple[Entry, ...] = (
    *MODELS,
    *VARIANTS,
    Entry(ORACLE, "the best single set of each domain, chosen with labels", labels=True),
)
FREE = tuple(entry.name for entry in ENTRIES if entry.free)


@cache
def find_entry(name: str) -> Entry:
    """Return the entry with a name of the result table, such as ``k00256``; ValueError for an unknown name."""
    for entry in ENTRIES:
        if name == entry.name or ("*" in entry.name and fnmatchcase(name, entry.name)):
            return entry
    raise ValueError(f"no model is called {name!r}; the models are {', '.join(entry.name for entry in ENTRIES)}")


def find_model(name: str) -> Model:
    """Return the model that an instance of the stage ``embeddings`` embeds with."""
    entry = find_entry(name)
    assert isinstance(entry, Model), f"{name} is no instance of the stage embeddings"
    return entry


def saw_labels(name: str) -> bool:
    """Tell whether labels were used to make an entry of the result table, or the model of which it is a variant."""
    return any(entry.labels and name.startswith(entry.name) for entry in ENTRIES)


def embedding_models(config: Config) -> tuple[str, ...]:
    """Return the models of a run that have embeddings: the instances of the stage ``embeddings``."""
    return tuple(name for model in MODELS for name in model.names_in(config))


def evaluated_models(config: Config) -> dict[str, Node]:
    """Return the entries of the result table except the oracle, with the nodes of their final embeddings."""
    evaluated = {}
    for name in embedding_models(config):
        evaluated[name] = Node("heads" if find_model(name).head else "embeddings", name)
        for variant in VARIANTS:
            if variant.follows(name, config):
                of = variant.of(config)
                evaluated[variant.name.replace("*", of)] = Node(variant.stage, of)
    return evaluated


def head_models(config: Config) -> tuple[str, ...]:
    """Return the models for which an embedding head is fitted: all that are evaluated with a head."""
    return tuple(str(node.instance) for node in evaluated_models(config).values() if node.stage == "heads")


def adaptor_sets(config: Config) -> tuple[str, ...]:
    """Return the adaptor sets that are trained: one for each granularity (or one on labels), and the competitors."""
    return tuple(name for model in MODELS if model.making == "set" for name in model.names_in(config))


def taught_by(config: Config, adaptor_set: str) -> tuple[str, ...]:
    """Return the granularities whose pseudo-labels train an adaptor set; empty where labels train it."""
    if adaptor_set == SUPERVISED:
        return ()
    return config.granularities if adaptor_set == MULTI_HEAD else (adaptor_set,)


def candidate_models(config: Config) -> tuple[str, ...]:
    """Return the models that the verdict compares: the frozen backbone, then every model that could be deployed."""
    sets = adaptor_sets(config)[:1] if config.model.source == "single" else config.granularities
    return ("zero_shot", *sets, *(("mean", "fused", "student") if _has_several_sets(config) else ()))


def deployable_models(config: Config) -> tuple[str, ...]:
    """Return the models that may be deployed: the given one, or all candidates where the verdict chooses."""
    return candidate_models(config) if config.model.source == "auto" else (deployed_model(config),)


def deployed_model(config: Config, chosen: str | None = None) -> str:
    """Return the model that is deployed, indexed and searched.

    ``chosen``: the model that the verdict chose; needed where ``model.source`` is auto, ignored elsewhere.
    """
    if config.model.source == "single":
        return adaptor_sets(config)[0]
    if config.model.source != "auto":
        return config.model.source
    if chosen not in candidate_models(config):
        known = ", ".join(candidate_models(config))
        raise ValueError(f"the verdict chose {chosen!r}, not one of {known}; run it again")
    return str(chosen)


def model_on_objects(config: Config) -> str:
    """Return the model that is also evaluated on object views: the deployed one, or fused where the verdict chooses."""
    return "fused" if config.model.source == "auto" else deployed_model(config)


def final_node(config: Config, model: str) -> Node:
    """Return the node with the final embeddings of a model, with its head where it has one."""
    return Node("heads" if model in head_models(config) else "embeddings", model)


def fusions(config: Config) -> tuple[str, ...]:
    """Return the fusions that are trained; empty where there is only one adaptor set."""
    return () if config.model.source == "single" else config.fusion.pairs
