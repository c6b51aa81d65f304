"""`grappa run`: run stages, or print the plan of a dry run; print verdict, result table and times at the end."""

from __future__ import annotations

import csv
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

from grappa.core.names import MEAN
from grappa.core.printing import printable
from grappa.pipeline.engine.execution import Say, Selection, planned, run_stages, selected, spent
from grappa.pipeline.engine.progress import Progress
from grappa.pipeline.engine.status import read_config
from grappa.pipeline.engine.verdict_file import deployed_in, read_verdict
from grappa.pipeline.graph.models import FREE, SUPERVISED
from grappa.pipeline.store.artifacts import RunFolder, published, quoted, readable_manifest
from grappa.pipeline.store.csv_cells import unguarded

METRICS_FILE = "metrics.csv"


def run_and_report(run: RunFolder, selection: Selection, *, progress: Progress, say: Say) -> None:
    """Run the selected stages, then print the verdict (if all stages were selected), the result table (if the
    evaluation was selected), how to look at a whole run, and the times."""
    config = read_config(run)
    report = run_stages(run, config, selection, progress=progress, say=say)
    if not report.leads:
        return
    if not report.seconds:
        how = "every byte was read" if selection.verify else "sizes were compared, --verify reads every byte"
        say(f"{report.num_fresh} fresh ({how}); --force runs {'it' if report.num_fresh == 1 else 'them'} again")
    verdict = None if selection.stage or selection.until else read_verdict(run)
    if verdict:
        say(f"verdict: {verdict.sentence}")
        if (deployed := deployed_in(run, config)) != verdict.choice:
            say(f"deployed is {deployed} all the same, as model.source={config.model.source} says")
    evaluated = readable_manifest(run, "evaluation")
    if (
        evaluated
        and METRICS_FILE in evaluated.outputs
        and any(node.stage == "evaluation" for node in selected(config, selection))
    ):
        metrics = published(run, "evaluation", METRICS_FILE) / METRICS_FILE
        print_table(metrics)
        if caption(metrics):
            say(caption(metrics))
    if report.seconds:
        if readable_manifest(run, "index") and not (selection.stage or selection.until):
            say(f"look at it: grappa explore {quoted(run.root)}")
        say(times_line(report.seconds))


def say_plan(run: RunFolder, selection: Selection, *, say: Say) -> None:
    """Say which artifacts ``run_and_report`` would make, and why."""
    steps = planned(run, read_config(run), selection)
    for name, state in steps:
        say(f"would run {name}: {state}")
    if not steps:
        say("nothing to run, all is fresh")


def read_table(metrics: Path) -> tuple[list[str], list[list[str]]]:
    """Return header and lines of the result table, a line for each model, from a ``metrics.csv``.

    The columns: the mAP in the domain's own gallery, for each domain; the mean over domains; its relative gain over the
    best model that needs no training; the mean in the merged gallery; the label-free reciprocity of neighbours in the
    merged gallery (the only column where no image has a label). Cells have three digits; a cell that cannot be computed
    is ``-``. With a model ``supervised``, a last line shows which share of the gap between zero_shot and supervised is
    closed without labels: (fused - zero_shot) / (supervised - zero_shot).
    """
    records = _read(metrics)
    header, rows = _quality_table(records)
    if not records or "reciprocity" not in records[0]:
        return header, rows
    found = {row["model"]: row["reciprocity"] for row in records if (row["gallery"], row["domain"]) == ("merged", MEAN)}
    rows = [[*row, _cell(found.get(row[0], ""))] for row in rows]
    if not any(_number(row["map"]) is not None for row in records):
        return ["", "reciprocity"], [[row[0], row[-1]] for row in rows]
    return [*header, "reciprocity"], rows


def _read(metrics: Path) -> list[dict[str, str]]:
    with metrics.open(newline="", encoding="utf-8") as file:
        return [{name: unguarded(cell) for name, cell in row.items()} for row in csv.DictReader(file)]


def caption(metrics: Path) -> str:
    """Return what the numbers of a ``metrics.csv`` are means over, where that is a sample; empty where it is not."""
    whole = next((row for row in _read(metrics) if row["domain"] == MEAN and "num_possible_queries" in row), None)
    if whole is None:
        return ""
    asked, possible, known, images = (
        int(whole.get(name) or 0)
        for name in ("num_queries", "num_possible_queries", "num_reciprocity_images", "num_images")
    )
    said = []
    if asked < possible:
        said.append(f"{asked:,} of {possible:,} queries, each against all images (evaluation.max_queries)")
    if known < images:
        said.append(f"reciprocity is that of {known:,} of {images:,} images")
    return "; ".join(said)


def _quality_table(records: list[dict[str, str]]) -> tuple[list[str], list[list[str]]]:
    values = {(row["model"], row["gallery"], row["domain"]): row["map"] for row in records}
    domains = [name for name in dict.fromkeys(row["domain"] for row in records) if name != MEAN]
    columns = [*(("domain", name) for name in domains), ("domain", MEAN)]
    means = {
        model: _number(values.get((model, "domain", MEAN), "")) for model in dict.fromkeys(key[0] for key in values)
    }
    reference = max((means[model] or 0.0 for model in FREE if model in means), default=0.0)
    rows = [
        [
            model,
            *(_cell(values.get((model, *column), "")) for column in columns),
            _gain(mean, reference),
            _cell(values.get((model, "merged", MEAN), "")),
        ]
        for model, mean in means.items()
    ]
    if SUPERVISED in means and "fused" in means:
        shares = [_gap_closed(values, gallery, domain) for gallery, domain in (*columns, ("merged", MEAN))]
        rows.append(["gap closed", *shares[:-1], "", shares[-1]])
    return ["mAP", *domains, "mean", "gain", "merged mean"], rows


def print_table(metrics: Path, stream: TextIO | None = None) -> None:
    """Print the result table: ruled on a terminal, plain columns elsewhere."""
    header, rows = read_table(metrics)
    if rows:
        print_rows(header, rows, stream)


def print_rows(header: list[str], rows: list[list[str]], stream: TextIO | None = None) -> None:
    """Print a table of texts: ruled on a terminal, plain columns elsewhere; the first column is left-aligned."""
    stream = sys.stdout if stream is None else stream
    header, *rows = ([printable(text) for text in row] for row in (header, *rows))
    if stream.isatty():
        _print_ruled(header, rows, stream)
        return
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    for row in (header, *rows):
        first, *rest = (
            f"{text:<{width}}" if column == 0 else f"{text:>{width}}"
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join((first, *rest)), file=stream)


def times_line(seconds: Mapping[str, float]) -> str:
    """Return ``times: images 1.2 s, features 2:05; together 2:06``."""
    parts = ", ".join(f"{stage} {spent(value)}" for stage, value in seconds.items())
    return f"times: {parts}; together {spent(sum(seconds.values()))}"


def _print_ruled(header: list[str], rows: list[list[str]], stream: TextIO) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for column, name in enumerate(header):
        table.add_column(Text(name), justify="right" if column else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(text) for text in row))
    Console(file=stream).print(table)


def _number(text: str) -> float | None:
    return float(text) if text and text != "nan" else None


def _cell(text: str) -> str:
    value = _number(text)
    return "-" if value is None else f"{value:.3f}"


def _gap_closed(values: Mapping[tuple[str, str, str], str], gallery: str, domain: str) -> str:
    """Return the share as ``35%``, or ``-`` where a value is missing or supervised is not above zero_shot (no gap)."""
    models = ("zero_shot", "fused", SUPERVISED)
    zero_shot, fused, supervised = (_number(values.get((model, gallery, domain), "")) for model in models)
    if zero_shot is None or fused is None or supervised is None or supervised <= zero_shot:
        return "-"
    return f"{(fused - zero_shot) / (supervised - zero_shot):.0%}"


def _gain(mean: float | None, reference: float) -> str:
    return "-" if mean is None or not reference or mean == reference else f"{mean / reference - 1:+.1%}"
