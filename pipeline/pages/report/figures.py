"""The figures of a report as SVG. The same run gives the same bytes; text is drawn as outlines, which need no font.

Shapes: M domains, G pseudo-granularities, L blocks.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter
from numpy.typing import NDArray

from grappa.core.printing import printable

STYLE: Any = {
    "svg.hashsalt": "grappa",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,  # a domain may be called $x$
    "text.usetex": False,
}
NO_METRICS = {"stage", "instance", "step", "epoch", "learning_rate"}
MAX_NAME = 18
MAX_DOMAINS = 24  # the first ones by name are drawn in maps
MAX_NUMBERS = 150  # cells of a map up to which their values are written


@matplotlib.rc_context(STYLE)
def save(figure: Figure, target: Path | BinaryIO) -> None:
    """Write a figure as SVG without a date and without a background: the page's own is behind it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # the font draws a box for a letter that it lacks
        figure.savefig(target, format="svg", transparent=True, metadata={"Date": None, "Creator": None})


@matplotlib.rc_context(STYLE)
def learning_curves(curves: pd.DataFrame) -> Figure:
    """Return the metrics of the training stages along the epochs: raw values, and smoothed ones as a line an instance.

    ``curves`` is the table of ``grappa.pipeline.tables.learning_curves``.
    """
    panels = [
        (stage, metric)
        for stage, own in curves.groupby("stage", sort=False, observed=True)
        for metric in own.columns
        if metric not in NO_METRICS and own[metric].notna().any()
    ]
    figure, axes = _grid(len(panels), 3, 3.4, 2.4)
    for axis, (stage, metric) in zip(axes, panels, strict=True):
        own = curves[curves["stage"] == stage]
        for number, (instance, part) in enumerate(own.groupby("instance", sort=False, observed=True)):
            smooth = part[metric].rolling(max(1, len(part) // 15), center=True, min_periods=1).mean()
            axis.plot(part["epoch"], part[metric], color=f"C{number}", alpha=0.25, linewidth=0.7)
            axis.plot(part["epoch"], smooth, color=f"C{number}", label=str(instance))
        axis.set_title(f"{stage}: {str(metric).replace('_', ' ')}")
        axis.set_xlabel("epoch")
        axis.legend(fontsize=7, frameon=False)
    return figure


@matplotlib.rc_context(STYLE)
def cluster_sizes(sizes: pd.DataFrame) -> Figure:
    """Return the numbers of train images of the clusters, largest first: a line for each granularity.

    ``sizes`` is the table of ``grappa.pipeline.tables.cluster_sizes``.
    """
    figure, (axis,) = _grid(1, 1, 6.5, 3.0)
    for name, own in sizes.groupby("granularity", sort=False, observed=True):
        falling = own["num_train"].sort_values(ascending=False).to_numpy()
        edges = np.linspace(0, 1, len(falling) + 1)
        axis.stairs(falling, edges, baseline=None, label=str(name), linewidth=1.5)
    axis.set_yscale("symlog", linthresh=1)
    axis.yaxis.set_major_formatter(ScalarFormatter())
    axis.set_ylim(bottom=0)
    axis.set_xlim(0, 1)
    axis.set_xlabel("clusters, largest first (share)")
    axis.set_ylabel("train images")
    axis.legend(fontsize=7, frameon=False)
    return figure


@matplotlib.rc_context(STYLE)
def shared_clusters(mix: pd.DataFrame) -> Figure:
    """Return the shares of all domains in the cluster of an image, by the image's domain: an (M, M) map a granularity.

    ``mix`` is the table of ``grappa.pipeline.tables.domain_mix``. At most ``MAX_DOMAINS`` are drawn. Rows of a map of
    all domains sum to 1; where the diagonal is 1, no cluster mixes domains.
    """
    names = sorted(mix["domain"].unique())[:MAX_DOMAINS]
    granularities = list(mix["granularity"].unique())
    side = max(2.2, 0.32 * len(names) + 1.0)
    figure, axes = _grid(len(granularities), 4, side, side)
    for axis, granularity in zip(axes, granularities, strict=True):
        shares = domain_shares(mix[mix["granularity"] == granularity], names)
        _map(axis, shares, [_short(name) for name in names], [_short(name) for name in names], granularity)
    return figure


def domain_shares(mix: pd.DataFrame, names: list[str]) -> NDArray[np.float64]:
    """Return shares (M, M), 0 to 1: row a, column b is the mean share of domain b in the cluster of an image of a."""
    shares = mix.pivot(index="pseudo_label", columns="domain", values="share").reindex(columns=names).fillna(0.0)
    counts = mix.pivot(index="pseudo_label", columns="domain", values="num_images").reindex(columns=names).fillna(0.0)
    sums: NDArray[np.float64] = counts.to_numpy().T @ shares.to_numpy()
    return sums / np.maximum(counts.to_numpy().sum(0)[:, None], 1)


@matplotlib.rc_context(STYLE)
def attention(table: pd.DataFrame) -> Figure:
    """Return each domain's mean granularity attention: an (M, G) map for each block.

    ``table`` is the table of ``grappa.pipeline.tables.load_attention``.
    """
    blocks = list(table["block"].unique())
    names, granularities = list(table["domain"].unique())[:MAX_DOMAINS], list(table["granularity"].unique())
    figure, axes = _grid(len(blocks), 4, max(2.2, 0.42 * len(granularities) + 1.2), max(1.6, 0.26 * len(names) + 0.9))
    for axis, block in zip(axes, blocks, strict=True):
        own = table[table["block"] == block].pivot(index="domain", columns="granularity", values="mean")
        values = own.reindex(index=names, columns=granularities).to_numpy()
        _map(axis, values, [_short(name) for name in names], granularities, f"block {block}")
    return figure


def _grid(number: int, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """Return a figure with ``number`` panels of ``width`` x ``height`` inches, and the panels' axes."""
    columns = min(columns, number)
    rows = -(-number // columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, [figure.add_subplot(rows, columns, place + 1) for place in range(number)]


def _map(axis: Axes, values: NDArray[np.float64], rows: Sequence[str], columns: Sequence[str], title: str) -> None:
    """Draw a map of values in 0..1, and the values as numbers where they are few."""
    axis.pcolormesh(values, cmap="Blues", vmin=0.0, vmax=1.0)
    axis.invert_yaxis()
    axis.set_xticks(np.arange(len(columns)) + 0.5, list(columns), rotation=90, fontsize=7)
    axis.set_yticks(np.arange(len(rows)) + 0.5, list(rows), fontsize=7)
    axis.tick_params(length=0)
    axis.set_title(title)
    for (row, column), value in np.ndenumerate(values) if values.size <= MAX_NUMBERS else ():
        text = f"{value:.2f}".replace("0.", ".", 1)
        color = "white" if value > 0.6 else "black"
        axis.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=6, color=color)


def _short(name: str) -> str:
    name = printable(name)
    return name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 1]}…"
