"""The result tables of a report: every model by domain, and gains with intervals that separate them from chance."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from grappa.core.names import MEAN
from grappa.core.printing import printable
from grappa.pipeline.engine.verdict_file import Verdict
from grappa.pipeline.graph.models import FREE, MODELS, saw_labels

GALLERIES = {"domain": "each domain's own gallery", "merged": "the merged gallery"}
METRICS = {"map": "mAP", "map_at_r": "MAP@R", "r_precision": "R-precision", "recall_at_1": "R@1"}
COMPARED = tuple(model.name for model in MODELS if model.compared)


@dataclass(frozen=True)
class Table:
    """A table of text cells for HTML and Markdown; ``strong`` holds the (row, column) of cells to stress."""

    title: str
    header: list[str]
    rows: list[list[str]]
    strong: frozenset[tuple[int, int]] = field(default_factory=frozenset)

    def markdown(self) -> str:
        """Return the table as GitHub-flavored Markdown, every cell as plain text; stressed cells are bold."""
        header, *cells = ([plain_markdown(text) for text in row] for row in (self.header, *self.rows))
        lines = [header, ["---", *["---:"] * (len(self.header) - 1)]]
        for number, row in enumerate(cells):
            lines.append(
                [
                    f"**{text.strip()}**" if text.strip() and (number, at) in self.strong else text
                    for at, text in enumerate(row)
                ]
            )
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# What Markdown, or GitHub's, does not print as it is: escapes, emphasis, code, the end of a link's text, HTML and
# entities, tables, strikethrough, formulas, addresses. Underscores within words are printed.
_MARKUP = re.compile(r"[\\`*<&|~$@]|(?<![^\W_])_|_(?![^\W_])|\](?=[(\[:])|:(?=//)|(?<=www)\.", re.IGNORECASE)


def plain_markdown(text: str) -> str:
    """Return a text so that Markdown prints it as it is, on one line."""
    return _MARKUP.sub(lambda found: f"\\{found[0]}", printable(text))


def result_table(metrics: pd.DataFrame, gallery: str, metric: str = "map") -> Table:
    """Return models by domains with the mean last, +- the standard error over queries where it is known.

    The best model of a column is stressed; models that saw labels do not take part.
    """
    own = metrics[metrics["gallery"] == gallery].set_index(["model", "domain"])
    models, domains = (list(own.index.get_level_values(level).unique()) for level in ("model", "domain"))
    values = own[metric].unstack("domain").reindex(index=models, columns=domains)
    errors = own[f"{metric}_se"].unstack("domain").reindex(models, columns=domains) if f"{metric}_se" in own else None
    rows = [
        [
            model,
            *(
                _cell(values.loc[model, each], errors.loc[model, each] if errors is not None else None)
                for each in domains
            ),
        ]
        for model in models
    ]
    best = values[[not saw_labels(model) for model in models]].max()
    strong = {
        (row, column + 1)
        for row, model in enumerate(models)
        for column, domain in enumerate(domains)
        if not saw_labels(model) and values.loc[model, domain] == best[domain]
    }
    return Table(METRICS[metric], ["", *map(domain_name, domains)], rows, frozenset(strong))


def means_table(metrics: pd.DataFrame) -> Table:
    """Return the mean over domains of every metric in both galleries, a line for each model."""
    own = metrics[metrics["domain"] == MEAN].set_index(["model", "gallery"])
    models = list(dict.fromkeys(own.index.get_level_values("model")))
    columns = [(gallery, metric) for gallery in GALLERIES for metric in METRICS]
    rows = [[model, *(_cell(own.loc[(model, gallery), metric]) for gallery, metric in columns)] for model in models]
    header = [f"{METRICS[metric]}{', merged' if gallery == 'merged' else ''}" for gallery, metric in columns]
    return Table("mean over domains", ["", *header], rows)


def verdict_table(found: Verdict) -> Table:
    """Return the models that the verdict compares by their label-free indicator; intervals above 0 are stressed."""
    rows = []
    for each in found.models:
        reference = each.difference == each.low == each.high == 0
        rows.append([each.model, number(each.indicator), "-" if reference else gain_text(asdict(each))])
    strong = frozenset((row, 2) for row, each in enumerate(found.models) if each.low > 0 and each.holds_within)
    return Table("verdict", ["", "neighbourhood standout", "difference"], rows, strong)


def before_after_table(metrics: pd.DataFrame, found: Mapping[str, pd.DataFrame], model: str) -> Table:
    """Return the table that matters where labels are known: mAP before and after adaptation, a row for each domain.

    ``found``: the table of ``comparisons`` by gallery. Columns: the frozen backbone, the best model without training in
    the domain, ``model``, its gain over that. The last row is the mean in the merged gallery. Sure gains are stressed.
    """
    rows: list[list[str]] = []
    strong: set[tuple[int, int]] = set()
    for gallery, own in found.items():
        values = metrics[metrics["gallery"] == gallery].set_index(["model", "domain"])["map"]
        gains = own[(own["candidate"] == model) & (own["against"] == "zero-shot")].set_index("domain")
        for domain in gains.index if gallery == "domain" else [MEAN]:
            gain = gains.loc[domain]
            strong |= {(len(rows), 4)} if gain["low"] > 0 else set()
            compared = ("zero_shot", gain["reference"], model)
            numbers = [number(float(values.get((each, domain), np.nan))) for each in compared]
            name = domain_name(domain) if gallery == "domain" else "mean, merged"
            rows.append([name, *numbers, gain_text(gain)])
    return Table("before and after", ["mAP", "frozen", "free", model, "gain"], rows, frozenset(strong))


def reciprocity_table(metrics: pd.DataFrame) -> Table | None:
    """Return the reciprocity of neighbours in the merged gallery, models by domains; None in older evaluations."""
    if "reciprocity" not in metrics or not metrics["reciprocity"].notna().any():
        return None
    own = metrics[(metrics["gallery"] == "merged") & metrics["reciprocity"].notna()].set_index(["model", "domain"])
    models, domains = (list(own.index.get_level_values(level).unique()) for level in ("model", "domain"))
    rows = [[model, *(_cell(own["reciprocity"].get((model, each), np.nan)) for each in domains)] for model in models]
    return Table("reciprocity", ["", *map(domain_name, domains)], rows)


def by_domain_table(found: pd.DataFrame, value: str, title: str) -> Table:
    """Return one column of a table of granularity and domain as granularities by domains."""
    wide = found.astype({"granularity": str, "domain": str}).set_index(["granularity", "domain"])[value]
    granularities, domains = (list(dict.fromkeys(wide.index.get_level_values(level))) for level in (0, 1))
    rows = [[name, *(_cell(wide.get((name, domain), np.nan)) for domain in domains)] for name in granularities]
    return Table(title, [title, *map(domain_name, domains)], rows)


def own_domain(mix: pd.DataFrame) -> pd.DataFrame:
    """Return the mean share of an image's own domain in its cluster (0 to 1): granularity, domain, share.

    ``mix`` is the table of ``grappa.Run.domain_mix``; the domain ``_mean`` is the mean over domains.
    """
    mix = mix.astype({"granularity": str, "domain": str})
    weighted = mix.assign(share=mix["share"] * mix["num_images"]).groupby(["granularity", "domain"], sort=False)
    sums = weighted[["share", "num_images"]].sum()
    shares = (sums["share"] / sums["num_images"]).rename("share").reset_index()
    shares = shares.sort_values("domain", kind="stable")
    means = shares.groupby("granularity", sort=False)["share"].mean().reset_index().assign(domain=MEAN)
    return pd.concat([shares, means], ignore_index=True)


def agreement_table(found: pd.DataFrame) -> Table | None:
    """Return granularities by the AMI in each domain, then the means over domains; None where no image has a label.

    ``found`` is the table of ``grappa.pipeline.tables.cluster_metrics``; the best granularity of a domain is stressed.
    """
    if not found["num_images"].any():
        return None
    wide = found.astype({"granularity": str, "domain": str}).set_index(["granularity", "domain"])
    granularities, domains = (list(dict.fromkeys(wide.index.get_level_values(level))) for level in (0, 1))
    values = wide["ami"].unstack("domain").reindex(index=granularities, columns=domains)
    means = wide.xs(MEAN, level="domain").loc[granularities, ["nmi", "purity"]]
    rows = [[name, *map(_cell, values.loc[name]), *map(_cell, means.loc[name])] for name in granularities]
    strong = {
        (row, column + 1)
        for row, name in enumerate(granularities)
        for column, domain in enumerate(domains)
        if values.loc[name, domain] == values[domain].max()
    }
    return Table("agreement", ["AMI", *map(domain_name, domains), "mean NMI", "mean purity"], rows, frozenset(strong))


def comparisons(
    metrics: pd.DataFrame, per_query: pd.DataFrame, gallery: str, *, deployed: str = "fused", seed: int = 0
) -> pd.DataFrame:
    """Return the mAP gain of each learned model and of ``deployed``, a row for each (candidate, against, domain).

    A deployed model that needs no training has no gain.

    ``against`` is "zero-shot" (``reference``: the best zero-shot model in this domain) or "mean" (the sets with equal
    attention, for models that learn more than the sets). Columns: candidate, against, domain, reference, difference,
    low, high (95 % interval by paired bootstrap over queries; for ``_mean`` queries are drawn within domains), relative
    (difference / reference's mAP).
    """
    scored = per_query[(per_query["gallery"] == gallery) & (per_query["num_positives"] > 0)]
    precision = scored.pivot(index="image_id", columns="model", values="average_precision")
    domains = scored.drop_duplicates("image_id").set_index("image_id")["domain"].reindex(precision.index)
    own = metrics[metrics["gallery"] == gallery].set_index(["model", "domain"])["map"]
    candidates = [each for each in dict.fromkeys([*COMPARED, deployed]) if each not in FREE]
    wanted: list[tuple[str, str, tuple[str, ...]]] = [(model, "zero-shot", FREE) for model in candidates]
    wanted += [(model, "mean", ("mean",)) for model in candidates if model != "mean"]
    rows = [
        _compare(precision, domains, own, model, references, domain, seed) | {"against": against}
        for model, against, references in wanted
        if model in precision and set(references) & set(precision)
        for domain in [*sorted(set(domains)), MEAN]
    ]
    columns = ["candidate", "against", "domain", "reference", "difference", "low", "high", "relative"]
    return pd.DataFrame(rows, columns=columns)


def _compare(
    precision: pd.DataFrame,
    domains: pd.Series[Any],
    own: pd.Series[Any],
    model: str,
    references: Sequence[str],
    domain: str,
    seed: int,
) -> dict[str, Any]:
    from grappa.metrics.retrieval import paired_bootstrap

    reference = max((each for each in references if each in precision), key=lambda each: own[each, domain])
    queries = np.ones(len(domains), dtype=bool) if domain == MEAN else (domains == domain).to_numpy()
    difference = (precision[model] - precision[reference]).to_numpy()[queries]
    groups = domains.to_numpy()[queries]
    low, high = paired_bootstrap(difference, domains=groups, seed=seed)
    gain = float(own[model, domain] - own[reference, domain])
    relative = gain / own[reference, domain] if own[reference, domain] else float("nan")
    found = {"candidate": model, "domain": domain, "reference": reference}
    return found | {"difference": gain, "low": low, "high": high, "relative": relative}


def gain_table(found: pd.DataFrame) -> Table:
    """Return the comparisons as text, a line for each (candidate, against); intervals above 0 are stressed."""
    domains = list(dict.fromkeys(found["domain"]))
    rows: list[list[str]] = []
    strong: set[tuple[int, int]] = set()
    for (candidate, against), part in found.groupby(["candidate", "against"], sort=False):
        other = "the best zero-shot" if against == "zero-shot" else against
        cells = part.set_index("domain").loc[domains]
        strong |= {(len(rows), at + 1) for at, low in enumerate(cells["low"]) if low > 0}
        rows.append([f"{candidate} vs {other}", *(gain_text(row) for _, row in cells.iterrows())])
    return Table("gain", ["", *map(domain_name, domains)], rows, frozenset(strong))


def gain_text(row: Any) -> str:
    """Return ``+.011 [+.008, +.014]``; a space that breaks no line keeps the interval together."""
    return f"{_signed(row['difference'])} [{_signed(row['low'])},\u00a0{_signed(row['high'])}]"


def gain_sentence(row: Any) -> str:
    """Return the outcome of a comparison in one sentence."""
    side = "above" if row["low"] > 0 else "below" if row["high"] < 0 else "not to be told apart from"
    share = f"{row['relative']:+.1%}, " if np.isfinite(row["relative"]) else ""
    return f"{row['candidate']} is {side} {row['reference']} ({share}{gain_text(row)})"


def domain_name(domain: str) -> str:
    """Return the heading of a domain's column."""
    return "mean" if domain == MEAN else domain


def number(value: float, digits: int = 3) -> str:
    """Return ``.086``, ``1.386``, or ``-`` where nothing could be computed."""
    return (
        "-"
        if not np.isfinite(value)
        else f"{value:.{digits}f}".replace("0.", ".", 1)
        if abs(value) < 1
        else f"{value:.{digits}f}"
    )


def _signed(value: float) -> str:
    """Return ``+.011`` or ``-12.000``; what rounds to nothing is ``+.000``."""
    rounded = round(value, 3) + 0.0
    return f"{rounded:+.3f}".replace("0.", ".", 1) if abs(rounded) < 1 else f"{rounded:+.3f}"


def _cell(value: Any, error: Any = None) -> str:
    text = number(float(value))
    return f"{text} ± {number(float(error))}" if error is not None and np.isfinite(error) and text != "-" else text
