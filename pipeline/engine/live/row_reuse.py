"""Rows of an earlier result that are still true: features of images that were there before, when a collection grew.

A stage that embeds images one by one is stale as soon as one image comes or goes. Its former result, which is on
disk until the new one is published, holds the rows of all other images. They are taken over where its fingerprint
differs by the list of images only, where device, precision, batch size and versions are those of the former result, and
where the image has the same pixels (a digest of them stands beside the rows).

The result has the bytes that computing all rows gives, as far as a machine rounds a row of a whole batch alike wherever
it stands in the batch. That is not taken for granted: every time rows of the former result are computed again beside
the new ones, in other places, and where one bit differs nothing is taken over. Rows of the last, smaller batch (of
the former and of the new result) are always computed, for a batch of another size may round otherwise.
"""

# B images of a batch, N images now, M images of the former result

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grappa.images.pixels import ImageRows
from grappa.pipeline.engine.context import StageContext
from grappa.pipeline.engine.fingerprints import read_manifest
from grappa.pipeline.store.artifacts import Manifest
from grappa.pipeline.store.work import Work

DIGESTS_FILE = "row_digests.npy"
DIGEST_BYTES = 16
IMAGE_LISTS = ("images", "objects")  # inputs that may differ: which images there are
MIN_SHARE = 0.5  # of rows that are taken over; below it, all are computed, with checkpoints along the rows


@dataclass(frozen=True)
class Reuse:
    """Which rows of the former array are taken over, and which are computed.

    former: the array (M, D). rows: (N,) int64, the former row of each row, -1: computed. computed: the rows to compute,
    in whole batches but for the last; ``checks`` of them, at the places ``checked``, are taken over too and compared.
    """

    former: NDArray[np.float32]
    rows: NDArray[np.int64]
    computed: NDArray[np.int64]
    checked: NDArray[np.int64]

    def agrees(self, found: NDArray[np.float32]) -> bool:
        """Tell whether the computed rows that are known have the bits of the former ones."""
        known = self.former[self.rows[self.computed[self.checked]]]
        return bool(np.array_equal(known.view(np.uint32), found[self.checked].view(np.uint32)))

    def fill(self, out: NDArray[np.float32], found: NDArray[np.float32], block: int = 4096) -> None:
        """Write all N rows into ``out``: the former ones, and the computed ones from ``found``."""
        for start in range(0, len(out), block):
            part = self.rows[start : start + block]
            kept = np.flatnonzero(part >= 0)
            out[start + kept] = self.former[part[kept]]
        new = np.setdiff1d(np.arange(len(self.computed)), self.checked)
        out[self.computed[new]] = found[new]


def row_digests(cache: ImageRows) -> NDArray[np.uint8]:
    """Return a digest of what each image is made from, (N, 16) uint8: of its pixels where they are raw."""
    digests = np.empty((len(cache), DIGEST_BYTES), dtype=np.uint8)
    for row in range(len(cache)):
        image = cache.content(row)
        digest = hashlib.blake2b(str(image.shape).encode(), digest_size=DIGEST_BYTES)
        digest.update(np.ascontiguousarray(image).data)
        digests[row] = np.frombuffer(digest.digest(), dtype=np.uint8)
    return digests


def plan_reuse(context: StageContext, file: str, digests: NDArray[np.uint8], batch_size: int) -> Reuse | None:
    """Return what the former result of a stage saves, or None where it saves too little, or cannot be trusted."""
    folder = _former_folder(context, file)
    if folder is None:
        return None
    former = np.load(folder / file, mmap_mode="r", allow_pickle=False)
    known = np.load(folder / DIGESTS_FILE, allow_pickle=False)
    if known.shape != (len(former), DIGEST_BYTES) or known.dtype != np.uint8:
        return None
    return _planned(former, _matches(known, digests), batch_size)


def _former_folder(context: StageContext, file: str) -> Path | None:
    """Return the folder of a former result that was made as this one is, of other images."""
    artifact, manifest = context.run.artifact(context.node), read_manifest(context.run, context.node)
    if manifest is None or DIGESTS_FILE not in manifest.outputs or not _made_alike(context, manifest):
        return None
    return artifact.home if not artifact.check(read=[file, DIGESTS_FILE]) else None


def _made_alike(context: StageContext, manifest: Manifest) -> bool:
    assert isinstance(context.work, Work)
    before, now = (_without_images(each) for each in (manifest.fingerprint, context.work.fingerprint))
    packages = manifest.provenance.get("packages", {})
    same_torch = packages.get("torch") == metadata.version("torch")
    return before == now and same_torch and manifest.provenance.get("resolved") == context.resolved


def _without_images(fingerprint: Any) -> dict[str, Any]:
    inputs = {name: files for name, files in fingerprint["inputs"].items() if name not in IMAGE_LISTS}
    return {**fingerprint, "inputs": inputs}


def _matches(known: NDArray[np.uint8], digests: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Return the first former row with the same digest, (N,) int64; -1 where there is none."""
    places: dict[bytes, int] = {}
    for row, digest in enumerate(known):
        places.setdefault(digest.tobytes(), row)
    return np.array([places.get(digest.tobytes(), -1) for digest in digests], dtype=np.int64)


def _planned(former: NDArray[np.float32], rows: NDArray[np.int64], batch: int) -> Reuse | None:
    whole, former_whole = len(rows) // batch * batch, len(former) // batch * batch
    rows = np.where((rows < former_whole) & (np.arange(len(rows)) < whole), rows, -1)
    taken, new = np.flatnonzero(rows >= 0), np.flatnonzero(rows[:whole] < 0)
    fill = -len(new) % batch
    number = fill if fill >= batch // 4 else fill + batch  # enough of them to be a check
    if len(taken) < MIN_SHARE * len(rows) or len(taken) < number or number == 0:
        return None
    again = taken[np.linspace(0, len(taken) - 1, number).astype(np.int64)]
    computed = np.concatenate([new, again, np.arange(whole, len(rows))])
    return Reuse(former, rows, computed, np.arange(len(new), len(new) + number))
