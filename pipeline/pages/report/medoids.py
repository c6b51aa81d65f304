"""Clusters as pictures: of a few clusters of each granularity the most typical images, size, domains and purity."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.colors import to_hex
from numpy.typing import NDArray

from grappa.pipeline.pages.explore.collection import Column
from grappa.pipeline.pages.explore.groups import Groups, Purity
from grappa.pipeline.pages.report.pictures import Shown

MAX_GRANULARITIES = 8
NUM_CLUSTERS = 6
NUM_MEDOIDS = 4


@dataclass(frozen=True)
class Share:
    """The images of one domain in a cluster: their share (0 to 1), and the domain's colour."""

    domain: str
    color: str
    share: float


@dataclass(frozen=True)
class Cluster:
    """A cluster: its name, its images' number and domains, the share of the most frequent label (None: no label) of
    those that have one."""

    title: str
    size: int
    domains: list[Share]
    purity: float | None
    num_labelled: int
    label: str
    medoids: list[Shown]

    @property
    def share(self) -> str:
        """The share of the most frequent label, and of how many images where not all have a label; "" without any."""
        if self.purity is None:
            return ""
        return f"{self.purity:.0%}" + (f" of {self.num_labelled:,} labelled" if self.num_labelled < self.size else "")


@dataclass(frozen=True)
class Granularity:
    """A granularity and the clusters of it that are shown, from the largest to the smallest."""

    name: str
    num_clusters: int
    clusters: list[Cluster]


def load_clusters(assignments: pd.DataFrame, granularities: tuple[str, ...]) -> list[Granularity]:
    """Return the granularities as pictures, at most ``MAX_GRANULARITIES``, evenly spread over those there are.

    ``assignments`` is the table of ``grappa.Run.assignments``: what was named, merged or split in the explorer is
    shown so. Of each, ``NUM_CLUSTERS`` evenly over the clusters by size; the medoids are nearest to the centroid.
    """
    domains, labels = Column.of(assignments["domain"]), Column.of(assignments["label"])
    return [
        _granularity(assignments, granularities[place], domains, labels)
        for place in spread(len(granularities), MAX_GRANULARITIES)
    ]


def spread(number: int, most: int) -> NDArray[np.int64]:
    """Return at most ``most`` of the places 0 .. number - 1, evenly spread, the first and the last among them."""
    return np.unique(np.linspace(0, number - 1, min(number, most)).round().astype(np.int64))


def color_of(code: int) -> str:
    """Return the colour of a domain by its place among the sorted names; twenty differ."""
    return to_hex(colormaps["tab20"]((2 * code + code // 10) % 20))


def _granularity(table: pd.DataFrame, name: str, domains: Column, labels: Column) -> Granularity:
    numbers = table[f"{name}_group" if f"{name}_group" in table else name].to_numpy(dtype=np.int64)
    named = table[f"{name}_name"].astype(str) if f"{name}_name" in table else [""] * len(table)
    names = {int(number): text for number, text in zip(numbers, named, strict=True) if text}
    groups = Groups.of_images(name, numbers, table[f"{name}_distance"].to_numpy(dtype=np.float32), names)
    purity, mix = Purity.of(groups, labels), groups.mix(domains)
    by_size = np.argsort(-groups.sizes, kind="stable")
    shown = [
        _cluster(table, groups, int(place), mix[place], purity, domains, labels)
        for place in by_size[spread(len(groups), NUM_CLUSTERS)]
    ]
    return Granularity(name, len(groups), shown)


def _cluster(
    table: pd.DataFrame,
    groups: Groups,
    place: int,
    mix: NDArray[np.int64],
    purity: Purity,
    domains: Column,
    labels: Column,
) -> Cluster:
    size, label = int(groups.sizes[place]), int(purity.label[place])
    codes = [int(code) for code in np.argsort(-mix, kind="stable") if mix[code]]
    return Cluster(
        title=groups.title(place) or f"cluster {groups.numbers[place]}",
        size=size,
        domains=[Share(domains.names[code], color_of(code), mix[code] / size) for code in codes],
        purity=None if label < 0 else float(purity.share[place]),
        num_labelled=int(purity.labelled[place]),
        label="" if label < 0 else labels.names[label].removeprefix(f"{domains.names[codes[0]]}/"),
        medoids=[Shown.of(table, int(row)) for row in groups.rows(place)[:NUM_MEDOIDS]],
    )
