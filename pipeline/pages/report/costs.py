"""The cost of each model of the result table: the time of all stages that its embeddings depend on."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from grappa.core.names import ORACLE
from grappa.pipeline.config.schema import Config
from grappa.pipeline.engine.execution import spent
from grappa.pipeline.graph.models import evaluated_models
from grappa.pipeline.graph.node import Node
from grappa.pipeline.graph.stages import STAGES, with_upstream
from grappa.pipeline.pages.report.summary import Table
from grappa.pipeline.store.artifacts import LOG_FILE, RunFolder
from grappa.pipeline.store.storage import read_json_lines


@dataclass(frozen=True)
class Cost:
    """The seconds in which an artifact was made; ``partly``: it was resumed, only the time of the last try is known."""

    seconds: float
    partly: bool
    images_per_second: float | None


def model_nodes(config: Config) -> dict[str, set[Node]]:
    """Return the nodes that each model of the result table depends on; the oracle depends on those of all sets."""
    found = {model: with_upstream([node], config) for model, node in evaluated_models(config).items()}
    if config.model.source == "single":
        return found
    return found | {ORACLE: set().union(*(found[name] for name in config.granularities))}


def cost_of(run: RunFolder, node: Node) -> Cost | None:
    """Return the cost of a published artifact from its manifest and log; None where they do not hold it."""
    artifact = run.artifact(node)
    manifest = artifact.manifest()
    if manifest is None or "seconds" not in manifest.provenance:
        return None
    records = read_json_lines(artifact.home / LOG_FILE)
    speeds = [each["per_second"] for each in records if each.get("unit") == "images" and "per_second" in each]
    resumed = any(each.get("resumed") for each in records)
    return Cost(float(manifest.provenance["seconds"]), resumed, speeds[-1] if speeds else None)


def load_costs(run: RunFolder, config: Config) -> pd.DataFrame:
    """Return seconds by model and stage: model, stage, instance, seconds, partly, images_per_second."""
    order = [stage.name for stage in STAGES]
    records = []
    for model, nodes in model_nodes(config).items():
        for node in sorted(nodes, key=lambda node: (order.index(node.stage), str(node.instance))):
            cost = cost_of(run, node)
            found = (cost.seconds, cost.partly, cost.images_per_second) if cost else (float("nan"), True, None)
            records.append((model, node.stage, node.instance, *found))
    return pd.DataFrame(records, columns=["model", "stage", "instance", "seconds", "partly", "images_per_second"])


def cost_table(costs: pd.DataFrame, models: list[str]) -> Table:
    """Return the times of the stages by model, their sum, and the speed of embedding; ``*``: only known in part."""
    stages = list(dict.fromkeys(costs["stage"]))
    stages.sort(key=[stage.name for stage in STAGES].index)
    rows = []
    for model in (each for each in models if each in set(costs["model"])):
        own = costs[costs["model"] == model]
        cells = [_spent(own[own["stage"] == stage]) for stage in stages]
        speed = own.loc[own["instance"] == model, "images_per_second"].dropna()
        rows.append([model, *cells, _spent(own), f"{speed.iloc[-1]:,.0f}" if len(speed) else ""])
    return Table("time", ["", *stages, "together", "images/s"], rows)


def partly_known(costs: pd.DataFrame) -> list[str]:
    """Return the names of the artifacts of which only the time of the last try is known."""
    own = costs[costs["partly"]]
    return sorted({Node(*pair).name for pair in zip(own["stage"], own["instance"], strict=True)})


def _spent(own: pd.DataFrame) -> str:
    if not len(own):
        return ""
    known = own["seconds"].dropna()
    return (spent(float(known.sum())) if len(known) else "-") + ("*" if own["partly"].any() else "")
