"""The table of a sweep: tidy in sweep.csv and sweep.parquet, compact on the terminal.

Its columns: ``run`` (the folder), ``variant`` (the run without its seed), one for each changed ``section.key``; then
those of a run's result table (model, domain, gallery, metrics); then ``seconds_STAGE``, what making the run's artifacts
of that stage took, ``seconds_total``, ``seconds_here``, the part of it that was not taken over from another run, and
``seconds_partly``: whether work was interrupted, so that only the time since it was last resumed is known.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grappa.pipeline.config.schema import Config
from grappa.pipeline.config.yaml_file import flow
from grappa.pipeline.engine.execution import Selection, selected
from grappa.pipeline.engine.fingerprints import read_manifest
from grappa.pipeline.engine.status import Judge
from grappa.pipeline.graph.node import Node
from grappa.pipeline.store.artifacts import RunFolder
from grappa.pipeline.store.storage import atomic_write_bytes
from grappa.pipeline.sweep.spec import SweepFile

if TYPE_CHECKING:
    import pandas as pd

CSV_FILE, PARQUET_FILE = "sweep.csv", "sweep.parquet"
MEAN = "_mean"


def result_rows(folder: RunFolder, config: Config, file: SweepFile, columns: Mapping[str, Any]) -> pd.DataFrame | None:
    """Return a run's rows of the table, ``columns`` first; None while its evaluation is not fresh."""
    import pandas as pd

    if Judge(folder, config).state(Node("evaluation")).kind != "fresh":
        return None
    metrics = pd.read_csv(folder.artifact("evaluation").home / "metrics.csv")
    chosen = [any(fnmatchcase(model, pattern) for pattern in file.rows) for model in metrics["model"]]
    rows = metrics[chosen].assign(**_seconds(folder, config, file.until))
    for position, (name, value) in enumerate(columns.items()):
        rows.insert(position, name, [value] * len(rows))
    return rows


def setting(config: Config, key: str) -> Any:
    """Return the value of ``section.key`` for a table: numbers, truth values and texts; anything else as YAML."""
    section, _, field = key.partition(".")
    value = getattr(config, section).model_dump(mode="json")[field]
    return value if isinstance(value, str | int | float | None) else flow(value)


def _seconds(folder: RunFolder, config: Config, until: str) -> dict[str, float | bool]:
    """Return ``seconds_STAGE`` for each stage up to ``until`` and the three columns behind them."""
    from grappa.pipeline.report.costs import cost_of

    seconds, here, partly = dict[str, float](), 0.0, False
    for node in selected(config, Selection(until=until)):
        manifest, cost = read_manifest(folder, node), cost_of(folder, node)
        if manifest is None or cost is None:
            partly = True
            continue
        seconds[node.stage] = seconds.get(node.stage, 0.0) + cost.seconds
        here += 0.0 if "taken_from" in manifest.provenance else cost.seconds
        partly |= cost.partly
    columns = {f"seconds_{name}": value for name, value in seconds.items()}
    columns |= {"seconds_total": sum(seconds.values()), "seconds_here": here}
    return {name: round(value, 3) for name, value in columns.items()} | {"seconds_partly": partly}


def write_table(out: Path, parts: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Write the rows of all finished runs, each file whole or not at all; return them."""
    import pandas as pd

    table = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["run", "variant", "model"])
    for name in table.columns:
        if table[name].dtype == object:  # one kind of value a column: text where they differ
            table[name] = [value if value is None or value != value else str(value) for value in table[name]]
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False)
    atomic_write_bytes(out / PARQUET_FILE, buffer.getvalue())
    atomic_write_bytes(out / CSV_FILE, table.to_csv(index=False).encode())
    return table


def compact(table: pd.DataFrame, variants: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows: variants by models, the mean mAP over domains in each one's own gallery.

    Over several seeds a cell is the mean and its standard error; single sets are left out (their names differ between
    runs), a variant that is not finished has ``-``.
    """
    chosen = table[(table["domain"] == MEAN) & (table["gallery"] == "domain")]
    models = [name for name in dict.fromkeys(chosen["model"]) if not name[1:].isdigit()]
    rows = []
    for variant in variants:
        mine = chosen[chosen["variant"] == variant]
        values = {model: mine.loc[mine["model"] == model, "map"].dropna().tolist() for model in models}
        rows.append([variant, str(mine["run"].nunique()), *(_cell(values[model]) for model in models)])
    return ["mean mAP", "seeds", *models], rows


def _cell(values: Sequence[float]) -> str:
    """Return ``0.3380``, ``0.3380 ± 0.0021`` (standard error of the mean, from 2 values on) or ``-``."""
    if not values:
        return "-"
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f"{mean:.4f}"
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return f"{mean:.4f} ± {(variance / len(values)) ** 0.5:.4f}"
