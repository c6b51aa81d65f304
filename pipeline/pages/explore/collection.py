"""What the explorer knows of a run: its images as columns, and their embeddings before and after adaptation.

N images, row i of everything is image i. Everything is read when the explorer starts, or mapped: artifacts that are
made again meanwhile do not reach it, and ``changed`` tells.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from grappa.images.caching.uncached import Originals
from grappa.images.pixels import ImageRows
from grappa.pipeline.commands.search import indexed_model
from grappa.pipeline.config.schema import Config
from grappa.pipeline.engine.glance import stale_notice
from grappa.pipeline.engine.status import read_config
from grappa.pipeline.engine.verdict_file import fused_granularities, read_verdict
from grappa.pipeline.graph.node import Node
from grappa.pipeline.open_run import open_run
from grappa.pipeline.opening import published_originals, published_pixels
from grappa.pipeline.store.artifacts import RunFolder, check_same_origin, published, quoted, readable_manifest

BLOCK_ROWS = 65536
READ = ("images", "model", "index")


@dataclass(frozen=True)
class Column:
    """A property of the images: codes (N,) int32 are positions in ``names``, -1: not known."""

    codes: NDArray[np.int32]
    names: list[str]

    @classmethod
    def of(cls, values: pd.Series[Any]) -> Column:
        """Return a column of texts, names sorted; a missing one and "" are not known."""
        known = values.astype(object).where(values.notna() & (values.astype(object) != ""), None)
        codes, names = pd.factorize(known, sort=True)
        return cls(codes.astype(np.int32), [str(name) for name in names])

    def counts(self) -> list[int]:
        return [int(each) for each in np.bincount(self.codes[self.codes >= 0], minlength=len(self.names))]


@dataclass(frozen=True)
class Space:
    """The embeddings (N, D) float32 of all images by one model, L2-normalised."""

    model: str
    embeddings: NDArray[np.float32]

    def nearest(
        self, query: NDArray[np.float32], k: int, allowed: NDArray[np.bool_]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return rows and cosines of the ``k`` nearest images to a query (D,), nearest first, of the ``allowed``."""
        starts = range(0, len(self.embeddings), BLOCK_ROWS)
        parts = [self.embeddings[start : start + BLOCK_ROWS] @ query for start in starts]
        similarities = np.where(allowed, np.concatenate(parts), -np.inf).astype(np.float32)
        k = min(k, int(allowed.sum()))
        if k == 0:
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32)
        least = np.partition(similarities, len(similarities) - k)[len(similarities) - k]
        rows = np.flatnonzero(similarities >= least)
        rows = rows[np.argsort(-similarities[rows], kind="stable")][:k]
        return rows, similarities[rows]


@dataclass(frozen=True)
class Collection:
    """The images of a run. ``before``: the frozen backbone; ``after``: the model that is deployed and indexed.

    ids, files (the absolute paths that open), paths (relative to the image root), sha256: (N) texts. ``indexed``: (N,)
    which images can be found. ``pixels``: the decoded images; ``originals``: at full size, from where they lie.
    ``version``: changes whenever an image does.
    """

    folder: RunFolder
    config: Config
    ids: list[str]
    files: list[str]
    paths: list[str]
    sha256: list[str]
    sizes: NDArray[np.int64]
    domains: Column
    labels: Column
    splits: Column
    before: Space
    after: Space
    indexed: NDArray[np.bool_]
    pixels: ImageRows
    originals: Originals
    attention: NDArray[np.float32] | None
    fused: tuple[str, ...]
    version: str
    opened: tuple[str, ...]

    @classmethod
    def open(cls, root: Path) -> Collection:
        """Open a run; ValueError, with the command that helps, where a part is missing, damaged or does not fit."""
        folder = RunFolder.open(root)
        config = read_config(folder)
        model, source = indexed_model(folder)
        published(folder, "model")
        table = open_run(root).images()
        ids = [str(each) for each in table.index]
        index = published(folder, "index", "ids.parquet")
        found = pd.read_parquet(index / "ids.parquet")["image_id"]
        return cls(
            folder=folder,
            config=config,
            ids=ids,
            files=[str(each) for each in table["file"]],
            paths=[str(each) for each in table["path"]],
            sha256=[str(each) for each in table["sha256"]],
            sizes=table[["width", "height"]].to_numpy(dtype=np.int64),
            domains=Column.of(table["domain"]),
            labels=Column.of(table["label"]),
            splits=Column.of(table["split"]),
            before=_space(folder, "zero_shot", Node("embeddings", "zero_shot")),
            after=_space(folder, "zero_shot_head" if source == Node("heads", "zero_shot") else model, source),
            indexed=np.asarray(table.index.isin(found), dtype=bool),
            pixels=published_pixels(folder),
            originals=published_originals(folder, config.images.max_pixels),
            attention=_attention(folder, config),
            fused=fused_granularities(folder, config),
            version=_identity(folder, "images")[:16],
            opened=tuple(_identity(folder, name) for name in READ),
        )

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def row_of(self) -> dict[str, int]:
        return {image_id: row for row, image_id in enumerate(self.ids)}

    @cached_property
    def rows_of_file(self) -> dict[str, list[int]]:
        """The rows of each file's content, by its sha256."""
        found: dict[str, list[int]] = {}
        for row, digest in enumerate(self.sha256):
            found.setdefault(digest, []).append(row)
        return found

    @cached_property
    def words(self) -> list[str]:
        """What an image is found by when a text is looked for: path, id, label and domain, folded to one case."""
        labels = [*self.labels.names, ""]
        domains = self.domains.names
        parts = zip(self.paths, self.ids, self.labels.codes, self.domains.codes, strict=True)
        return [
            f"{path} {image_id} {labels[label]} {domains[domain]}".casefold() for path, image_id, label, domain in parts
        ]

    def space(self, name: str) -> Space:
        return self.before if name == "before" else self.after

    def allowed(self, domain: str | None, without: list[int]) -> NDArray[np.bool_]:
        """Return which images may be found (N,): indexed, of a domain (None: any), and not those of some rows."""
        found = self.indexed.copy()
        if domain is not None:
            found &= self.domains.codes == self.domains.names.index(domain)
        found[without] = False
        return found

    def notices(self) -> list[str]:
        """Return sentences: what is stale, and whether the run was made again since it was opened."""
        if not self.folder.root.is_dir():
            return [f"{self.folder.root} is not there any more; what is shown was read when the explorer started"]
        stale = stale_notice(self.folder.root, *READ)
        changed = tuple(_identity(self.folder, name) for name in READ) != self.opened
        again = f"the run was made again since it was opened; start `grappa explore {quoted(self.folder.root)}` again"
        return [each for each in (stale, again if changed else "") if each]

    def verdict(self) -> str | None:
        found = read_verdict(self.folder)
        return found.sentence if found else None


def _space(folder: RunFolder, model: str, node: Node) -> Space:
    file = published(folder, node.name, "embeddings.npy") / "embeddings.npy"
    return Space(model, np.load(file, mmap_mode="r", allow_pickle=False))


def _attention(folder: RunFolder, config: Config) -> NDArray[np.float32] | None:
    """Return the attention of each image over the granularities, (N, L, G), where the run has it."""
    name = "attention/neighbors"
    if not config.granularities or readable_manifest(folder, name) is None:
        return None
    check_same_origin(folder, "images", name)
    loaded: NDArray[np.float32] = np.load(
        published(folder, name, "attention.npy") / "attention.npy", mmap_mode="r", allow_pickle=False
    )
    return loaded


def _identity(folder: RunFolder, name: str) -> str:
    """Return a text that changes when an artifact does."""
    manifest = readable_manifest(folder, name)
    digests = sorted(entry["sha256"] for entry in manifest.outputs.values()) if manifest else []
    return hashlib.sha256("".join(digests).encode()).hexdigest()
