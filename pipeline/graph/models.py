"""Which models there are: the adaptor sets that are trained and the rows of the result table, from the settings."""

from __future__ import annotations

from grappa.pipeline.config.schema import Config

WHOLE_ROWS = ("zero_shot", "zero_shot_whitened")
FROZEN_ROWS = (*WHOLE_ROWS, "zero_shot_objects")
ON_OBJECTS = "_objects"


def adaptor_sets(config: Config) -> tuple[str, ...]:
    """Return the adaptor sets that are trained: one a granularity (or that of the labels), and the competitors."""
    labels = config.adaptors.supervision == "labels" or "supervised" in config.evaluation.extra_rows
    extra = {"multi_head": "multi_head" in config.evaluation.extra_rows, "supervised": labels}
    return (*config.granularities, *(name for name, wanted in extra.items() if wanted))


def embedding_rows(config: Config) -> tuple[str, ...]:
    """Return the models whose embeddings are kept.

    ``zero_shot_objects``: the frozen backbone on object views; ``concat``: the granularities' embeddings side by side;
    ``multi_head``: one set trained on all granularities at once; ``supervised``: one set trained on the train labels.
    ``fused_objects`` (or of what else is deployed): the adapted model on object views. A single set has neither mean,
    fusion nor student.
    """
    extra = config.evaluation.extra_rows
    frozen = FROZEN_ROWS if "zero_shot_objects" in extra else WHOLE_ROWS
    on_objects = (f"{deployed_row(config)}{ON_OBJECTS}",) if "adapted_objects" in extra else ()
    if config.model.source == "single":
        return (*frozen, *adaptor_sets(config), *on_objects)
    views = ("fused_views",) if "views" in config.fusion.pairs else ()
    concat = ("concat",) if "concat" in extra else ()
    alone = adaptor_sets(config)[len(config.granularities) :]
    return (*frozen, *config.granularities, "mean", "fused", "student", *views, *concat, *alone, *on_objects)


def _without_head(row: str) -> bool:
    return row in FROZEN_ROWS or row.endswith(ON_OBJECTS)


def head_rows(config: Config) -> tuple[str, ...]:
    """Return the embedding rows that get a head: the adapted models, and the frozen backbone if there is a head."""
    adapted = tuple(row for row in embedding_rows(config) if not _without_head(row))
    return adapted if config.heads.kind == "none" else ("zero_shot", *adapted)


def evaluated_rows(config: Config) -> dict[str, tuple[str, str]]:
    """Return the rows of the result table but the oracle, each with the stage and instance of its final embeddings.

    Adapted models are evaluated with their head. ``zero_shot_head`` is the frozen backbone with one, and ``fused_raw``
    the fused model without (of a single set that set's): left out where no head is asked for.
    """
    raw = adaptor_sets(config)[0] if config.model.source == "single" else "fused"
    rows = {}
    for row in embedding_rows(config):
        rows[row] = ("embeddings" if _without_head(row) else "heads", row)
        if row == "zero_shot_whitened" and config.heads.kind != "none":
            rows["zero_shot_head"] = ("heads", "zero_shot")
        if row == raw and config.heads.kind != "none":
            rows[f"{row}_raw"] = ("embeddings", row)
    return rows


def deployed_row(config: Config) -> str:
    """Return the embedding row of the model that is deployed, indexed and searched."""
    return adaptor_sets(config)[0] if config.model.source == "single" else config.model.source


def fusions(config: Config) -> tuple[str, ...]:
    """Return the fusions that are trained: none over a single set."""
    return () if config.model.source == "single" else config.fusion.pairs


def fusion_instance(row: str) -> str:
    """Return the fusion behind an embedding row: ``fused`` -> ``neighbors``, ``fused_views`` -> ``views``."""
    return {"fused": "neighbors", "fused_views": "views"}[row]
