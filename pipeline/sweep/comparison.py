"""The table of a sweep: tidy in sweep.csv and sweep.parquet, compact on the terminal.

Its columns: ``run`` (the folder), ``variant`` (the run's name without its seed), one column for each changed
``section.key``; the columns of a run's result table (model, domain, gallery, metrics); ``seconds_STAGE``, the time in
which the run's artifacts of that stage were made; ``seconds_total``, their sum; ``seconds_here``, the sum without
artifacts that were reused from another run; ``seconds_partly``, whether work was interrupted, so that only the time
since the last resumption is known.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grappa.core.names import MEAN
from grappa.pipeline.config.schema import Config
from grappa.pipeline.config.yaml_file import flow
from grappa.pipeline.engine.execution import Selection, selected
from grappa.pipeline.engine.fingerprints import read_manifest
from grappa.pipeline.engine.status import Judge
from grappa.pipeline.graph.node import Node
from grappa.pipeline.store.artifacts import published
from grappa.pipeline.store.csv_cells import csv_bytes
from grappa.pipeline.store.storage import atomic_write_bytes
from grappa.pipeline.sweep.runs import Sweep, SweepRun
from grappa.pipeline.sweep.spec import SweepFile, varied

if TYPE_CHECKING:
    import pandas as pd

CSV_FILE, PARQUET_FILE = "sweep.csv", "sweep.parquet"
EMPTY = ("run", "variant", "model", "domain", "gallery", "map")


class SweepTable:
    """The table of all runs whose evaluation is fresh, in the order of the runs; each update writes it to disk."""

    def __init__(self, sweep: Sweep) -> None:
        self._sweep = sweep
        self._parts: dict[str, pd.DataFrame | None] = {}
        self.rows: pd.DataFrame
        self.update(*sweep.runs)

    def update(self, *runs: SweepRun) -> None:
        """Read the results of these runs again and write the table; nothing happens in a sweep without evaluation."""
        if self._sweep.has_table:
            self._parts.update({run.name: _result_rows(run, self._sweep.file) for run in runs})
            self.rows = _write(self._sweep.out, [rows for rows in self._parts.values() if rows is not None])


def _result_rows(run: SweepRun, file: SweepFile) -> pd.DataFrame | None:
    """Return the part of the table that belongs to a run; None while its evaluation is not fresh."""
    from grappa.pipeline.open_run import read_metrics

    if Judge(run.folder, run.config).state(Node("evaluation")).kind != "fresh":
        return None
    metrics = read_metrics(published(run.folder, "evaluation", "metrics.csv") / "metrics.csv")
    chosen = [any(fnmatchcase(model, pattern) for pattern in file.rows) for model in metrics["model"]]
    rows = metrics[chosen].assign(**_seconds(run, file.until))
    columns = {"run": run.name, "variant": run.variant, **{key: setting(run.config, key) for key in varied(file)}}
    for position, (name, value) in enumerate(columns.items()):
        rows.insert(position, name, [value] * len(rows))
    return rows


def setting(config: Config, key: str) -> Any:
    """Return the value of ``section.key`` for a table: numbers, truth values and texts as they are, others as YAML."""
    section, _, field = key.partition(".")
    value = getattr(config, section).to_json()[field]
    return value if isinstance(value, str | int | float | None) else flow(value)


def _seconds(run: SweepRun, until: str) -> dict[str, float | bool]:
    """Return ``seconds_STAGE`` for each stage up to ``until``, and the three columns after them."""
    from grappa.pipeline.pages.report.costs import cost_of

    seconds, here, partly = dict[str, float](), 0.0, False
    for node in selected(run.config, Selection(until=until)):
        manifest, cost = read_manifest(run.folder, node), cost_of(run.folder, node)
        if manifest is None or cost is None:
            partly = True
            continue
        seconds[node.stage] = seconds.get(node.stage, 0.0) + cost.seconds
        here += 0.0 if "taken_from" in manifest.provenance else cost.seconds
        partly |= cost.partly
    columns = {f"seconds_{name}": value for name, value in seconds.items()}
    columns |= {"seconds_total": sum(seconds.values()), "seconds_here": here}
    return {name: round(value, 3) for name, value in columns.items()} | {"seconds_partly": partly}


def _write(out: Path, parts: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Write the parts of all finished runs as one table, each file whole or not at all; return the table."""
    import pandas as pd

    table = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=[*EMPTY])
    for name in table.columns:
        if table[name].dtype == object:  # a column of several types becomes text
            table[name] = [value if value is None or value != value else str(value) for value in table[name]]
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False)
    atomic_write_bytes(out / PARQUET_FILE, buffer.getvalue())
    atomic_write_bytes(out / CSV_FILE, csv_bytes(table))
    return table


def compact(table: pd.DataFrame, variants: list[str]) -> tuple[list[str], list[list[str]]]:
    """Return header and lines: variants by models, the mAP in each domain's own gallery, as the mean over domains.

    For several seeds a cell is the mean and its standard error. Single adaptor sets are left out, because their names
    differ between runs. The cells of an unfinished variant are ``-``.
    """
    chosen = table[(table["domain"] == MEAN) & (table["gallery"] == "domain")]
    models = [name for name in dict.fromkeys(chosen["model"]) if not name[1:].isdigit()]
    seeds = chosen.groupby("variant")["run"].nunique().reindex(variants, fill_value=0)
    found = chosen.groupby(["variant", "model"])["map"].agg(["mean", "sem"])
    cells = found.apply(_cell, axis=1).unstack().reindex(index=variants, columns=models).fillna("-")
    rows = [[variant, str(seeds[variant]), *cells.loc[variant]] for variant in variants]
    return ["mean mAP", "seeds", *models], rows


def _cell(found: pd.Series) -> str:
    """Return ``0.3380``, ``0.3380 ± 0.0021`` (standard error of the mean, from 2 values on) or ``-``."""
    texts = [f"{value:.4f}" for value in found if value == value]
    return " ± ".join(texts) or "-"
