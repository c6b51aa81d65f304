"""What a report shows, by name: the values of its templates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from grappa.core.names import MEAN
from grappa.core.printing import printable
from grappa.metrics.attention import MEAN_BLOCK
from grappa.pipeline import tables
from grappa.pipeline.commands.run import caption
from grappa.pipeline.config.schema import Config
from grappa.pipeline.engine.status import read_config, states
from grappa.pipeline.engine.verdict_file import SELECTION, Verdict, deployed_in, fused_granularities, read_verdict
from grappa.pipeline.graph.models import FREE, evaluated_models, final_node, find_entry, fusions
from grappa.pipeline.graph.node import Node
from grappa.pipeline.graph.stages import nodes
from grappa.pipeline.pages.report import costs, examples, figures, medoids, summary
from grappa.pipeline.pages.report.pictures import MAX_SIDE, Drawing, Pictures
from grappa.pipeline.pages.report.summary import Table, number
from grappa.pipeline.store.artifacts import RunFolder, check_same_origin, quoted, readable_manifest

HEADLINES = {
    "helped": "Adaptation helped",
    "hurt": "Adaptation hurt",
    "no certain difference": "Adaptation made no certain difference",
    "too few images": "There are too few images to tell whether adaptation helped",
}


def collect(run: Path) -> dict[str, Any]:
    """Return all values that the templates show, pictures aside.

    ValueError, with the command that helps, when an artifact is missing or when artifacts were made from different
    inputs.
    """
    source = RunFolder.open(run)
    config = read_config(source)
    metrics, per_query = tables.load_metrics(run), tables.load_per_query(run)
    made = [node for node in nodes(config) if _is_made(source, node)]
    check_same_origin(source, *(node.name for node in made))
    models = list(dict.fromkeys(metrics["model"])) if metrics["map"].notna().any() else []
    verdict, deployed = read_verdict(source), deployed_in(source, config)
    spent = costs.load_costs(source, config)
    return {
        "name": printable(source.root.resolve().name),
        "facts": _facts(source, config),
        "test": "test " if (tables.load_assignments(run)["split"] == "test").any() else "",
        "not_fresh": [f"{each.name} {each.state}" for each in states(source, config) if each.state.kind != "fresh"],
        "deployed": deployed,
        "meaning": find_entry(deployed).meaning,
        "backbone": _backbone(config),
        **_results(metrics, per_query, models, verdict, deployed),
        "meanings": [(model, find_entry(model).meaning) for model in models],
        "costs": costs.cost_table(spent, models or list(dict.fromkeys(spent["model"]))),
        "sampled": caption(run / "evaluation" / "metrics.csv"),
        "partly_known": costs.partly_known(spent),
        "examples": examples.load_examples(source, _before_and_after(source, config, deployed), per_query),
        "more_domains": metrics["domain"].nunique() > examples.MAX_QUERIES + 1,
        "attention": _attention(source, config) if Node("attention", "neighbors") in made else None,
        "attention_command": f"grappa run {quoted(source.root)} --stage attention" if fusions(config) else None,
        **_clusters(source, config),
        "config": source.config_path.read_text(encoding="utf-8", errors="replace"),
    }


def rows_shown(content: dict[str, Any]) -> set[int]:
    """Return the rows of all images of which a report shows a picture."""
    shown = [x for each in content["examples"] for x in (each.query, *(n for r in each.rankings for n in r.nearest))]
    shown += [x for each in content["granularities"] for cluster in each.clusters for x in cluster.medoids]
    return {each.row for each in shown}


def draw(run: Path, content: dict[str, Any], pictures: Pictures) -> dict[str, Drawing]:
    """Return the figures of a report by name."""
    made = {"learning_curves": figures.learning_curves(tables.learning_curves(run))}
    if content["health"]:
        made["cluster_sizes"] = figures.cluster_sizes(tables.cluster_sizes(run))
        made["shared_clusters"] = figures.shared_clusters(tables.domain_mix(run))
    if content["attention"]:
        made["attention"] = figures.attention(tables.load_attention(run))
    return {name: pictures.figure(name, figure) for name, figure in made.items()}


def _is_made(run: RunFolder, node: Node) -> bool:
    return readable_manifest(run, node) is not None


def _before_and_after(run: RunFolder, config: Config, deployed: str) -> dict[str, Node]:
    """Return the frozen backbone and the deployed model, which may be the same with a head, and their embeddings."""
    sources = evaluated_models(config)
    after = next(name for name, node in sources.items() if node == final_node(config, deployed))
    return {each: sources[each] for each in dict.fromkeys(("zero_shot", after)) if _is_made(run, sources[each])}


def _results(
    metrics: pd.DataFrame, per_query: pd.DataFrame, models: list[str], verdict: Verdict | None, deployed: str
) -> dict[str, Any]:
    """Return the verdict, the table that matters, and the results of all models; ``models``: [] without labels."""
    compared = _compared(verdict, deployed)
    found = {
        gallery: summary.comparisons(metrics, per_query, gallery, deployed=compared)
        for gallery in (summary.GALLERIES if models else ())
    }
    galleries = [_gallery(metrics, own, gallery, deployed) for gallery, own in found.items()]
    known = any((own["candidate"] == compared).any() for own in found.values())
    return {
        "verdict": _verdict(verdict, galleries, deployed) if verdict else None,
        "compared": compared,
        "main": summary.before_after_table(metrics, found, compared) if known else None,
        "galleries": galleries,
        "means": summary.means_table(metrics) if models else None,
        "reciprocity": summary.reciprocity_table(metrics),
    }


def _compared(verdict: Verdict | None, deployed: str) -> str:
    """Return the adapted model whose gain is told: the deployed one, or, where that needs no training, the best one."""
    if deployed not in FREE:
        return deployed
    adapted = [each for each in verdict.models if each.model not in FREE] if verdict else []
    return max(adapted, key=lambda each: each.indicator).model if adapted else deployed


def _gallery(metrics: pd.DataFrame, found: pd.DataFrame, gallery: str, deployed: str) -> dict[str, Any]:
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
        "headline": HEADLINES[found.verdict],
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
    return [
        ("images", f"{len(listing):,} ({counts}); {split if num_test else 'not split: all to learn from and to test'}"),
        ("backbone", _backbone(config)),
        ("pseudo-granularities", ", ".join(config.granularities) or "none: trained on the labels"),
        *([("fused sets", _fused(run, config))] if SELECTION in nodes(config) else []),
        ("seeds", _seeds(config)),
        ("commit", _several(each.get("git_commit") for each in made)),
        ("device", _several(each.get("device") for each in made)),
        ("precision", _several((each.get("resolved") or {}).get("precision") for each in made)),
        ("finished", max((str(each["ended"]) for each in made if "ended" in each), default="-")),
    ]


def _fused(run: RunFolder, config: Config) -> str:
    names = fused_granularities(run, config)
    left = [name for name in config.granularities if name not in names]
    return ", ".join(names) + (f"; certainly weaker, and left out: {', '.join(left)}" if left else "; none left out")


def _backbone(config: Config) -> str:
    return config.backbone.name + (f" at {config.backbone.image_size} px" if config.backbone.image_size else "")


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


def _clusters(run: RunFolder, config: Config) -> dict[str, Any]:
    """Return the clusters as pictures, and their health by granularity and domain; with labels, how well they agree."""
    names = config.granularities
    if not names:
        return {"granularities": [], "health": None, "own_domain": None, "agreement": None, "agreements": []}
    mix = tables.domain_mix(run.root)
    known = (run.artifact("evaluation").home / "clusters.csv").exists()  # an older evaluation has none
    metrics = tables.cluster_metrics(run.root) if known else None
    agreement = summary.agreement_table(metrics) if metrics is not None else None
    kinds = {"nmi": "NMI", "purity": "purity"} if agreement else {}
    agreements = [summary.by_domain_table(metrics, *kind) for kind in kinds.items()] if metrics is not None else []
    return {
        "granularities": medoids.load_clusters(tables.load_assignments(run.root), names),
        "health": _health(tables.cluster_sizes(run.root), mix),
        "own_domain": summary.by_domain_table(summary.own_domain(mix), "share", "own domain"),
        "agreement": agreement,
        "agreements": agreements,
    }


def _health(sizes: pd.DataFrame, mix: pd.DataFrame) -> Table:
    """Return a row for each granularity: the sizes of its clusters, and the mean share of an image's own domain."""
    rows = []
    for name, own in sizes.groupby("granularity", sort=False, observed=True):
        part = mix[mix["granularity"] == name]
        own_domain = (part["share"] * part["num_images"]).sum() / part["num_images"].sum()
        train = own["num_train"]
        counts = [len(own), int((train == 0).sum()), int((train == 1).sum()), f"{train.median():g}", int(train.max())]
        rows.append([str(name), *map(str, counts), number(float(own_domain))])
    return Table("clusters", ["", "clusters", "empty", "of one", "median", "largest", "own domain"], rows)


def limits() -> dict[str, int]:
    """Return the bounds of a report: pictures, the pixels of their longer side, domains in the maps."""
    by_query = 1 + 2 * examples.NUM_NEAREST
    of_clusters = medoids.MAX_GRANULARITIES * medoids.NUM_CLUSTERS * medoids.NUM_MEDOIDS
    pictures = examples.MAX_QUERIES * by_query + of_clusters
    return {"pictures": pictures, "side": MAX_SIDE, "mapped": figures.MAX_DOMAINS}
