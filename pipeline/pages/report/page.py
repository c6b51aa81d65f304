"""Writing a report: index.html with figures and thumbnails, and its tables as results.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from grappa.core.names import MEAN
from grappa.core.printing import printable
from grappa.metrics.attention import MEAN_BLOCK
from grappa.pipeline import tables
from grappa.pipeline.config.schema import Config
from grappa.pipeline.engine.status import read_config, states
from grappa.pipeline.engine.verdict_file import Verdict, deployed_in, read_verdict
from grappa.pipeline.graph.models import FREE, evaluated_models, find_entry, fusions
from grappa.pipeline.graph.node import Node
from grappa.pipeline.graph.stages import nodes
from grappa.pipeline.pages.report import costs, examples, figures, summary
from grappa.pipeline.pages.report.summary import Table, number
from grappa.pipeline.store.artifacts import RunFolder, check_same_origin, quoted, readable_manifest
from grappa.pipeline.store.storage import new_folder, refuse_existing

FIGURES, THUMBNAILS, PAGE, MARKDOWN = "figures", "images", "index.html", "results.md"


def write_report(run: Path, folder: Path) -> str:
    """Write the report of a finished run into the new folder ``folder``, whole or not at all; return a sentence.

    The same run gives the same bytes. ValueError, with the command that helps, when an artifact is missing or when
    artifacts were made from different inputs.
    """
    refuse_existing(folder)
    source = RunFolder.open(run)
    config = read_config(source)
    metrics, per_query = tables.load_metrics(run), tables.load_per_query(run)
    made = [node for node in nodes(config) if _is_made(source, node)]
    check_same_origin(source, *(node.name for node in made))
    content = _content(source, config, metrics, per_query, attention=Node("attention", "neighbors") in made)
    with new_folder(folder) as draft:
        _write_figures(
            run, draft / FIGURES, attention=content["attention"] is not None, clusters=bool(config.granularities)
        )
        (draft / THUMBNAILS).mkdir()
        examples.write_thumbnails(source, content["examples"], draft / THUMBNAILS)
        (draft / PAGE).write_text(_render("page.html.j2", content), encoding="utf-8")
        (draft / MARKDOWN).write_text(_render("results.md.j2", content), encoding="utf-8")
    return f"wrote the report to {folder / PAGE}; its tables for a README are in {folder / MARKDOWN}"


def _is_made(run: RunFolder, node: Node) -> bool:
    return readable_manifest(run, node) is not None


def _content(
    run: RunFolder, config: Config, metrics: pd.DataFrame, per_query: pd.DataFrame, *, attention: bool
) -> dict[str, Any]:
    """Return all values that the templates show, by name."""
    models = list(dict.fromkeys(metrics["model"])) if metrics["map"].notna().any() else []
    sources, verdict = evaluated_models(config), read_verdict(run)
    deployed = deployed_in(run, config)
    galleries = [_gallery(metrics, per_query, gallery, deployed) for gallery in summary.GALLERIES] if models else []
    pictured = dict.fromkeys([*examples.PICTURED, deployed])
    shown = {each: sources[each] for each in pictured if each in sources and _is_made(run, sources[each])}
    spent = costs.load_costs(run, config)
    return {
        "name": printable(run.root.resolve().name),
        "facts": _facts(run, config),
        "not_fresh": [f"{each.name} {each.state}" for each in states(run, config) if each.state.kind != "fresh"],
        "verdict": _verdict(verdict, galleries, deployed) if verdict else None,
        "galleries": galleries,
        "means": summary.means_table(metrics) if models else None,
        "meanings": [(model, find_entry(model).meaning) for model in models],
        "costs": costs.cost_table(spent, models or list(dict.fromkeys(spent["model"]))),
        "partly_known": costs.partly_known(spent),
        "examples": examples.load_examples(run, shown, per_query),
        "attention": _attention(run, config) if attention else None,
        "attention_command": f"grappa run {quoted(run.root)} --stage attention" if fusions(config) else None,
        "clusters": _clusters(run) if config.granularities else None,
        "agreement": _agreement(run) if config.granularities else None,
        "config": run.config_path.read_text(encoding="utf-8", errors="replace"),
        "thumbnails": THUMBNAILS,
        "figures": FIGURES,
        "more_domains": metrics["domain"].nunique() > examples.MAX_DOMAINS + 1,
        "side": examples.THUMBNAIL_SIDE,
    }


def _gallery(metrics: pd.DataFrame, per_query: pd.DataFrame, gallery: str, deployed: str) -> dict[str, Any]:
    found = summary.comparisons(metrics, per_query, gallery, deployed=deployed)
    means = found[found["domain"] == MEAN]
    return {
        "where": summary.GALLERIES[gallery],
        "table": summary.result_table(metrics, gallery),
        "gains": summary.gain_table(found) if len(found) else None,
        "sentences": [summary.gain_sentence(row) for _, row in means.iterrows()],
        "of_deployed": [summary.gain_sentence(row) for _, row in means.iterrows() if _tells_of(row, deployed)],
    }


def _tells_of(row: pd.Series[Any], deployed: str) -> bool:
    """Tell whether a gain is the deployed model's; where that needs no training, the gains of all others tell of it."""
    return row["against"] == "zero-shot" and (row["candidate"] == deployed or deployed in FREE)


def _verdict(found: Verdict, galleries: list[dict[str, Any]], deployed: str) -> dict[str, Any]:
    """Return the verdict in words, the label-free table, and what the labels of test images say of the deployed model.

    ``by_labels``: pairs of a gallery in words and a sentence; empty where no test image has a label.
    """
    return {
        "word": found.verdict,
        "evidence": found.evidence,
        "deployed": deployed,
        "by_labels": [(gallery["where"], line) for gallery in galleries for line in gallery["of_deployed"]],
        "table": summary.verdict_table(found),
        "images": f"{found.num_images:,} {found.images} images",
    }


def _facts(run: RunFolder, config: Config) -> list[tuple[str, str]]:
    """Return the facts that identify the result: images, backbone, granularities, seeds, commits, device, precision."""
    listing = tables.load_assignments(run.root)
    num_test = int((listing["split"] == "test").sum())
    split = f"{len(listing) - num_test:,} to learn from, {num_test:,} to test"
    counts = ", ".join(f"{domain} {len(own):,}" for domain, own in listing.groupby("domain", observed=True))
    origin = [run.artifact(node).manifest() for node in nodes(config)]
    made = [each.provenance for each in origin if each is not None]
    backbone = config.backbone.name + (f" at {config.backbone.image_size} px" if config.backbone.image_size else "")
    return [
        ("images", f"{len(listing):,} ({counts}); {split if num_test else 'not split: all to learn from and to test'}"),
        ("backbone", backbone),
        ("pseudo-granularities", ", ".join(config.granularities) or "none: trained on the labels"),
        ("seeds", _seeds(config)),
        ("commit", _several(each.get("git_commit") for each in made)),
        ("device", _several(each.get("device") for each in made)),
        ("precision", _several((each.get("resolved") or {}).get("precision") for each in made)),
        ("finished", max((str(each["ended"]) for each in made if "ended" in each), default="-")),
    ]


def _seeds(config: Config) -> str:
    sections = ("adaptors",) if not config.granularities else ("clusters", "adaptors")
    learned = () if config.model.source == "single" else ("fusion", "student")
    return ", ".join(f"{name} {getattr(config, name).seed}" for name in (*sections, *learned))


def _several(values: Any) -> str:
    return ", ".join(dict.fromkeys(str(value) for value in values if value)) or "-"


def _attention(run: RunFolder, config: Config) -> dict[str, Any]:
    """Return the tables of the attention, and its numbers over all domains and blocks."""
    found = tables.attention_summary(run.root)
    whole = found[(found["domain"] == MEAN) & (found["block"] == MEAN_BLOCK)].iloc[0]
    names = ["entropy", "entropy_share", "variance", "eta_squared", "image_information", "domain_information"]
    header = ["entropy", "of log G", "variance", "between domains", "image tells", "domain tells"]

    def table(by: str, rows: pd.DataFrame) -> Table:
        cells = [[_named(row[by]), *(number(float(row[name])) for name in names)] for _, row in rows.iterrows()]
        return Table(by, [by, *header], cells)

    return {
        "by_domain": table("domain", found[found["block"] == MEAN_BLOCK]),
        "by_block": table("block", found[found["domain"] == MEAN]),
        "whole": {name: number(float(whole[name])) for name in names},
        "between": f"{whole['eta_squared']:.0%}" if whole["eta_squared"] == whole["eta_squared"] else "none",
        "num_images": f"{int(whole['num_images']):,}",
    }


def _named(place: str | int) -> str:
    return "mean" if place in (MEAN, MEAN_BLOCK) else str(place)


def _clusters(run: RunFolder) -> Table:
    """Return a row for each granularity: the sizes of its clusters, and the mean share of an image's own domain."""
    sizes, mix, rows = tables.cluster_sizes(run.root), tables.domain_mix(run.root), []
    for name, own in sizes.groupby("granularity", sort=False, observed=True):
        part = mix[mix["granularity"] == name]
        own_domain = (part["share"] * part["num_images"]).sum() / part["num_images"].sum()
        train = own["num_train"]
        counts = [len(own), int((train == 0).sum()), int((train == 1).sum()), f"{train.median():g}", int(train.max())]
        rows.append([str(name), *map(str, counts), number(float(own_domain))])
    return Table("clusters", ["", "clusters", "empty", "of one", "median", "largest", "own domain"], rows)


def _agreement(run: RunFolder) -> Table | None:
    """Return how well clusters and labels agree; None without labels, and where the evaluation is too old to say it."""
    known = (run.artifact("evaluation").home / "clusters.csv").exists()
    return summary.agreement_table(tables.cluster_metrics(run.root)) if known else None


def _write_figures(run: Path, folder: Path, *, attention: bool, clusters: bool) -> None:
    folder.mkdir()
    figures.save(figures.learning_curves(tables.learning_curves(run)), folder / "learning_curves.svg")
    if clusters:
        figures.save(figures.cluster_sizes(tables.cluster_sizes(run)), folder / "cluster_sizes.svg")
        figures.save(figures.shared_clusters(tables.domain_mix(run)), folder / "shared_clusters.svg")
    if attention:
        figures.save(figures.attention(tables.load_attention(run)), folder / "attention.svg")


def _render(template: str, content: dict[str, Any]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=template.endswith(".html.j2"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "plain": summary.plain_markdown}
    return environment.get_template(template).render(content) + "\n"
