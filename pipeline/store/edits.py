"""What people changed about the clusters of a run: names, merges and splits, in one small file of the run folder.

No artifact is touched. An entry of the file belongs to one clustering, which the digest of its ``assignments.parquet``
identifies: after other clusters were made the entry stays in the file, and is not applied to them. In an edited
clustering, images belong to *groups*: the cluster c is the group c, and what is split off gets the next free number.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError

from grappa.pipeline.config.yaml_file import validation_sentence
from grappa.pipeline.store.artifacts import RunFolder, readable_manifest
from grappa.pipeline.store.storage import atomic_write_json

EDITS_FILE = "cluster_edits.json"
FORMAT = 1
MAX_NAME = 100


class Edits(BaseModel):
    """The changes to one clustering.

    ``names``: group -> name. ``merged``: group -> the group that it became part of. ``moved``: image_id -> the group
    into which the image was split off.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    granularity: str
    assignments: str
    names: dict[NonNegativeInt, str] = {}
    merged: dict[NonNegativeInt, NonNegativeInt] = {}
    moved: dict[str, NonNegativeInt] = {}

    def groups(self, labels: NDArray[np.int64], ids: Sequence[str]) -> NDArray[np.int64]:
        """Return the group of each image (N,) int64; labels (N,): the pseudo-labels, ids (N): the image ids."""
        found = np.array(labels, dtype=np.int64)
        if self.moved:
            found = np.array([self.moved.get(i, int(own)) for i, own in zip(ids, found, strict=True)], dtype=np.int64)
        for group, target in self.merged.items():
            found[found == group] = target
        return found

    def named(self, group: int, name: str) -> Edits:
        """Return the edits with another name of a group; an empty one takes the name away."""
        names = {each: text for each, text in self.names.items() if each != group}
        return self.model_copy(update={"names": names | ({group: checked_name(name)} if name.strip() else {})})

    def merging(self, groups: Sequence[int]) -> Edits:
        """Return the edits after groups became one: the first of them."""
        target, others = groups[0], set(groups[1:])
        merged = {each: target if into in others else into for each, into in self.merged.items()}
        names = {each: text for each, text in self.names.items() if each not in others}
        return self.model_copy(update={"merged": merged | dict.fromkeys(sorted(others), target), "names": names})

    def splitting(self, ids: Iterable[str], group: int) -> Edits:
        """Return the edits after images were split off into ``group``, a number of :meth:`free`."""
        return self.model_copy(update={"moved": self.moved | dict.fromkeys(ids, group)})

    def free(self, num_clusters: int) -> int:
        """Return the smallest number above those of all clusters and groups."""
        return max([num_clusters - 1, *self.moved.values(), *self.merged, *self.merged.values(), *self.names]) + 1

    @property
    def is_empty(self) -> bool:
        return not (self.names or self.merged or self.moved)


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int
    clusterings: tuple[Edits, ...]


def checked_name(name: str) -> str:
    """Return a name without blanks around it; ValueError for one that is too long or cannot stand in a table."""
    name = " ".join(name.split())
    if len(name) > MAX_NAME:
        raise ValueError(f"the name has {len(name)} characters; give at most {MAX_NAME}")
    if any(ord(each) < 32 or 0x7F <= ord(each) < 0xA0 or 0xD800 <= ord(each) < 0xE000 for each in name):
        raise ValueError("the name holds a control character; give plain text")
    return name


def read_edits(run: RunFolder) -> dict[str, Edits]:
    """Return the edits of each granularity whose present clusters they belong to; ValueError for a damaged file."""
    return {each.granularity: each for each in _read(run) if each.assignments == clustering_of(run, each.granularity)}


def passed_over(run: RunFolder) -> list[str]:
    """Return the granularities that have edits of other clusters than the present ones only."""
    present = read_edits(run)
    return sorted({each.granularity for each in _read(run)} - set(present))


def write_edits(run: RunFolder, edits: Mapping[str, Edits]) -> None:
    """Write the edits of some granularities, atomically; other entries of the file stay as they are."""
    replaced = {(each.granularity, each.assignments) for each in edits.values()}
    others = [each for each in _read(run) if (each.granularity, each.assignments) not in replaced]
    entries = sorted([*others, *edits.values()], key=lambda each: each.granularity)
    content = {"format": FORMAT, "clusterings": [each.model_dump() for each in entries if not each.is_empty]}
    atomic_write_json(run.root / EDITS_FILE, content)


def clustering_of(run: RunFolder, granularity: str) -> str:
    """Return the sha256 of the published assignments of a granularity, or "" where there are none."""
    manifest = readable_manifest(run, f"clusters/{granularity}")
    return str(manifest.outputs["assignments.parquet"]["sha256"]) if manifest else ""


def _read(run: RunFolder) -> tuple[Edits, ...]:
    path: Path = run.root / EDITS_FILE
    if not path.exists():
        return ()
    try:
        found = _File.model_validate(json.loads(path.read_bytes()))
    except ValidationError as error:
        problem = validation_sentence(error, str).removeprefix(": ")
    except (ValueError, RecursionError) as error:
        problem = f"not JSON ({error})"
    else:
        if found.format == FORMAT:
            return found.clusterings
        problem = f"format {found.format}, this version reads {FORMAT}"
    raise ValueError(f"{path}: {problem}; mend the file, or move it away to do without the names of clusters")
