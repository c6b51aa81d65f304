"""The state of a running explorer: the run's images, its groups with their edits, the models, the computations."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from grappa.pipeline.config.schema import num_clusters_of
from grappa.pipeline.pages.explore.collection import Collection, Column
from grappa.pipeline.pages.explore.editing import Editor
from grappa.pipeline.pages.explore.groups import Groups, Purity, parts
from grappa.pipeline.pages.explore.jobs import Job, Jobs
from grappa.pipeline.pages.explore.layout import fitted, principal_components, tsne
from grappa.pipeline.pages.explore.queries import Encoder
from grappa.pipeline.pages.explore.similar import find_near
from grappa.pipeline.pages.explore.thumbnails import Thumbnails
from grappa.pipeline.store.artifacts import check_same_origin, published
from grappa.pipeline.store.edits import Edits

NOTICE_SECONDS = 5.0


@dataclass(frozen=True)
class Described:
    """The groups of a granularity with what the page says of them; mix (G, M): images by group and domain."""

    groups: Groups
    purity: Purity
    mix: NDArray[np.int64]
    centroids: NDArray[np.float32]


@dataclass
class Workspace:
    """All that the handlers of the server read; made by :meth:`open`, ended by :meth:`close`."""

    collection: Collection
    editor: Editor
    encoder: Encoder
    thumbnails: Thumbnails
    clusterings: dict[str, tuple[NDArray[np.int64], NDArray[np.float32]]]
    jobs: Jobs = field(default_factory=Jobs)
    _described: dict[str, Described] = field(default_factory=dict)
    _positions: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    _stale: tuple[float, list[str]] = (-np.inf, [])
    _lock: threading.RLock = field(default_factory=threading.RLock)

    @classmethod
    def open(cls, root: Path) -> Workspace:
        """Open a run; ValueError or OSError, in a sentence, where it cannot be explored."""
        collection = Collection.open(root)
        clusterings = {name: _clustering(collection, name) for name in collection.config.granularities}
        editor = Editor(collection.folder, list(clusterings))
        return cls(collection, editor, Encoder(collection.folder), Thumbnails(collection.pixels), clusterings)

    def close(self) -> None:
        self.editor.close()

    @property
    def granularities(self) -> list[str]:
        return list(self.clusterings)

    def stale(self) -> list[str]:
        """Return what is not up to date, looked up again after some seconds."""
        with self._lock:
            at, found = self._stale
            if time.monotonic() - at > NOTICE_SECONDS:
                found = self.collection.notices()
                self._stale = time.monotonic(), found
            return found

    def notices(self) -> list[str]:
        """Return what the page says on top."""
        others = [
            f"the names of {name} belong to clusters that were made again since, and are not shown"
            for name in self.editor.passed_over
        ]
        return [*self.stale(), *([self.editor.reason] if self.editor.reason else []), *others]

    def described(self, granularity: str) -> Described:
        """Return the groups of a granularity, made again after an edit."""
        with self._lock:
            if granularity not in self._described:
                self._described[granularity] = self._describe(granularity)
            return self._described[granularity]

    def _describe(self, granularity: str) -> Described:
        labels, distances = self.clusterings[granularity]
        edits = self.editor.edits(granularity)
        found = edits.groups(labels, self.collection.ids)
        groups = Groups.of_images(granularity, found, distances, edits.names)
        purity = Purity.of(groups, self.collection.labels)
        embeddings = self.collection.before.embeddings
        return Described(groups, purity, groups.mix(self.collection.domains), groups.centroids(embeddings))

    def edit(self, granularity: str, make: Callable[[Edits], Edits]) -> None:
        """Change the edits of a granularity; what was known of its groups is forgotten."""
        with self._lock:
            self.editor.change(granularity, make)
            self._described.pop(granularity, None)

    def undo(self) -> str | None:
        """Take the last edit back and return its granularity, or None."""
        with self._lock:
            granularity = self.editor.undo()
            self._described.pop(granularity or "", None)
            return granularity

    def split_off(self, granularity: str, rows: Sequence[NDArray[np.int64]], name: str = "") -> list[int]:
        """Make a new group of each array of rows; return the groups' numbers."""
        numbers: list[int] = []

        def make(edits: Edits) -> Edits:
            for each in rows:
                number = edits.free(num_clusters_of(granularity))
                edits = edits.splitting([self.collection.ids[row] for row in each], number).named(number, name)
                numbers.append(number)
            return edits

        self.edit(granularity, make)
        return numbers

    def split(self, granularity: str, place: int, num_parts: int) -> list[int]:
        """Split a group by k-means of its images' embeddings; the largest part keeps the group's number."""
        rows = self.described(granularity).groups.rows(place)
        found = parts(self.collection.after.embeddings[np.sort(rows)], num_parts)
        return self.split_off(granularity, [np.sort(rows)[found == part] for part in range(1, num_parts)])

    def column(self, name: str) -> Column | None:
        """Return a property of the images by which a map is coloured: domain, label, split or a granularity."""
        if name in self.clusterings:
            groups = self.described(name).groups
            titles = [groups.title(place) or f"cluster {groups.numbers[place]}" for place in range(len(groups))]
            return Column(groups.of.astype(np.int32), titles)
        known = {"domain": self.collection.domains, "label": self.collection.labels, "split": self.collection.splits}
        return known.get(name)

    def positions(self, space: str, method: str) -> NDArray[np.float32] | Job | None:
        """Return positions (N, 2) on the map; of t-SNE the job while it runs, None where it was not asked for."""
        if method == "tsne":
            job = self.jobs.get(f"tsne {space}")
            return job.result if job and job.state == "done" else job
        with self._lock:
            if space not in self._positions:
                self._positions[space] = fitted(principal_components(self.collection.space(space).embeddings))
            return self._positions[space]

    def start_tsne(self, space: str) -> Job:
        embeddings = self.collection.space(space).embeddings
        return self.jobs.start(f"tsne {space}", lambda report: fitted(tsne(embeddings, report)))

    def near(self) -> Job:
        """Return the job that finds the nearest images of all images, started where it was not."""
        return self.jobs.start("near", lambda report: find_near(self.collection, report))


def _clustering(collection: Collection, name: str) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return the pseudo-label (N,) and the distance (N,) of each image."""
    node, file = f"clusters/{name}", "assignments.parquet"
    check_same_origin(collection.folder, "images", node)
    table: Any = pd.read_parquet(published(collection.folder, node, file) / file).set_index("image_id")
    table = table.loc[collection.ids]
    return table["pseudo_label"].to_numpy(dtype=np.int64), table["distance"].to_numpy(dtype=np.float32)
