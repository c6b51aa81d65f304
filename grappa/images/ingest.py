"""From listed files to the image table and the pixel cache, in one pass over the files.

Files are decoded in shards. After a shard's pixels its manifest is written, which records the digest of the pixels and
what became of the files. So an interrupted pass decodes only what is not whole, and ends with the same bytes. At the
end the rows are ordered by content (image_id): neither the order of a listing nor the names of its files has an
influence on what is computed from the pixels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from grappa.core.arrays import Pixels
from grappa.core.notes import Claim
from grappa.images.caching.codec import Encoded, encode
from grappa.images.caching.manifests import Record, ShardManifests, fingerprint
from grappa.images.caching.uncached import write_uncached
from grappa.images.files import DecodedFile, ImagesChangedError, RejectedFileError, UnansweredError, decode_bytes
from grappa.images.originals import described, open_rows
from grappa.images.paths import PLACE_COLUMNS
from grappa.images.pixels import ENCODED_COLUMNS, NO_LINES, RAW_COLUMNS, write_index, write_shard_claimed
from grappa.images.table import BOX_COLUMNS

__all__ = ["ImagesChangedError", "decode_all", "decode_shards"]

# A record is {"reason"} of a rejected file, or {"sha256", "height", "width", "box", "place", "notes"}.
_ID_DIGITS = 16


def decode_all(
    listing: pd.DataFrame,
    roots: Sequence[str],
    folder: Path,
    *,
    cache: str = "raw",
    cache_size: int,
    max_pixels: int,
    shard_size: int,
    manifests: Path | None = None,
    num_workers: int = 1,
    progress: Callable[[int], None] | None = None,
    dropped: Callable[[str], None] | None = None,
    written: Callable[[Path, Claim], None] | None = None,
    checked: bool = False,
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Decode every listed file once into the pixel cache in ``folder``, and return the tables of images and rejects.

    Args:
        listing, roots: what ``list_images`` gave (the frame and its ``attrs["roots"]``).
        cache: ``raw``: the pixels are kept; ``jpeg``: as JPEG (``grappa.images.caching.codec``); ``none``: only where
            they come from (``grappa.images.caching.uncached``).
        cache_size: shorter side of the cached pixels; smaller images stay as they are.
        max_pixels: an image with more is rejected as a decompression bomb before it is decoded.
        shard_size: files a shard; ``shard_size`` cached images and ``num_workers`` originals are held in memory.
        manifests: the folder of the shards' manifests, by which a later call can go on; None: ``folder``.
        num_workers: decoding threads; changes no byte of the result.
        progress: called with the number of files newly done; the files of shards that are whole already count too.
        dropped, written, checked: see ``grappa.images.caching.manifests.ShardManifests``.

    Returns:
        ``images`` (image_id, path, root, domain, split, height, width, box_*, sha256, duplicate_of), sorted by
        image_id, the row order of the cache; image_id is the first 16 digits of the file's SHA-256, and copies of the
        same bytes get "-2", "-3", ... in (domain, path) order; split "" and duplicate_of "" mean none; height and width
        are the oriented original's; ``attrs["notes"]``: how many images each note of decoding was for. ``labels``
        (image_id, label: str or None), same rows. ``rejected`` (path, root, domain, reason) in listing order.

    Raises:
        ImagesChangedError: a file is not what was listed.
        OSError: the disk is full or the folder is read-only; what is whole stays for the next call.
    """
    records = decode_shards(
        *(listing, roots, folder, slice(None)),
        cache=cache,
        cache_size=cache_size,
        max_pixels=max_pixels,
        shard_size=shard_size,
        manifests=manifests,
        num_workers=num_workers,
        progress=progress,
        dropped=dropped,
        written=written,
        checked=checked,
    )
    images, labels, rejected, rows = _tables(listing, records)
    if cache == "none":
        write_uncached(folder, images, cache_size=cache_size, max_pixels=max_pixels)
        return images, labels, rejected
    _write_places(folder, [records[row]["place"] for row in rows], cache)
    return images, labels, rejected


def decode_shards(
    listing: pd.DataFrame,
    roots: Sequence[str],
    folder: Path,
    shards: slice,
    *,
    cache: str = "raw",
    cache_size: int,
    max_pixels: int,
    shard_size: int,
    manifests: Path | None = None,
    num_workers: int = 1,
    progress: Callable[[int], None] | None = None,
    dropped: Callable[[str], None] | None = None,
    written: Callable[[Path, Claim], None] | None = None,
    checked: bool = False,
) -> list[Record]:
    """Decode the shards of a slice, but for whole ones, and return the records of their files, in listing order.

    Several processes may each decode a slice, such as ``slice(1, None, 2)``, before one of them calls
    :func:`decode_all`, which then has no more to decode. The other arguments and the errors are those of
    :func:`decode_all`.
    """
    notes = ShardManifests(folder, manifests or folder, dropped, written, checked)
    load = _loader(listing, roots, cache=cache, cache_size=cache_size, max_pixels=max_pixels)
    settings = {"cache_size": cache_size, "max_pixels": max_pixels} | ({} if cache == "raw" else {"cache": cache})
    records: list[Record] = []
    with ThreadPoolExecutor(num_workers, "decode") as pool:
        for start in range(0, len(listing), shard_size)[shards]:
            part, shard = range(start, min(start + shard_size, len(listing))), start // shard_size
            mark = fingerprint(settings, described(listing.iloc[start : part.stop]))
            found = notes.read(shard, mark)
            if found is None:
                found = _decode_shard(notes, shard, mark, _run(pool, load, part, progress), cached=cache != "none")
            elif progress:
                progress(len(found))
            records += found
    return records


def _write_places(folder: Path, places: list[list[int]], cache: str) -> None:
    columns = ENCODED_COLUMNS if cache == "jpeg" else RAW_COLUMNS
    write_index(folder, np.array(places, dtype=np.int64).reshape(-1, columns))


# ---------------------------------------------------------------- shards


class _Outcome(NamedTuple):
    """What became of a file, and what a shard keeps of it; ``unanswered``: that may be otherwise the next time."""

    record: Record
    kept: Pixels | Encoded | None = None
    unanswered: bool = False


def _pixels_alone(pixels: Pixels) -> Pixels:
    return pixels


def _nothing(pixels: Pixels) -> None:
    return None


_KEPT: dict[str, Callable[[Pixels], Pixels | Encoded | None]] = {
    "raw": _pixels_alone,
    "jpeg": encode,
    "none": _nothing,
}


def _loader(
    listing: pd.DataFrame, roots: Sequence[str], *, cache: str, cache_size: int, max_pixels: int
) -> Callable[[int], _Outcome]:
    """Return a function that reads and decodes a row of the listing; threads call it."""
    read = open_rows(listing, roots, max_pixels=max_pixels)
    boxes = listing[list(BOX_COLUMNS)].to_numpy()
    kept = _KEPT[cache]

    def load(row: int) -> _Outcome:
        try:
            x0, y0, x1, y1 = boxes[row].tolist()
            decoded = decode_bytes(read(row), (x0, y0, x1, y1), cache_size=cache_size, max_pixels=max_pixels)
        except RejectedFileError as error:
            return _Outcome({"reason": str(error)}, unanswered=isinstance(error, UnansweredError))
        return _Outcome(_record(decoded), kept(decoded.pixels))

    return load


def _record(decoded: DecodedFile) -> Record:
    box = None if np.isnan(decoded.box[0]) else decoded.box
    notes = {"notes": list(decoded.notes)} if decoded.notes else {}
    return {"sha256": decoded.sha256, "height": decoded.height, "width": decoded.width, "box": box, **notes}


def _decode_shard(
    manifests: ShardManifests, shard: int, mark: str, results: Iterator[_Outcome], *, cached: bool
) -> list[Record]:
    """Write the shard, if it is to be cached, then its manifest."""
    outcomes = list(results)
    kept: list[Any] = [outcome.kept for outcome in outcomes if outcome.kept is not None]
    lines, pixels = write_shard_claimed(manifests.folder, shard, kept) if cached else (NO_LINES, None)
    places = iter(lines.tolist())
    records = [
        outcome.record if outcome.kept is None else {**outcome.record, "place": next(places)} for outcome in outcomes
    ]
    if not any(outcome.unanswered for outcome in outcomes):
        manifests.write(shard, mark, pixels, records)
    return records


def _run(
    pool: Executor, load: Callable[[int], _Outcome], part: range, progress: Callable[[int], None] | None
) -> Iterator[_Outcome]:
    for outcome in pool.map(load, part):
        if progress:
            progress(1)
        yield outcome


# ---------------------------------------------------------------- tables


def _tables(listing: pd.DataFrame, records: list[Record]) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame, list[int]]:
    """Return images, labels and rejected files, and the row of the listing of each image."""
    rejected = [row for row, record in enumerate(records) if "reason" in record]
    accepted = [row for row, record in enumerate(records) if "reason" not in record]
    ids, originals = _image_ids([records[row]["sha256"] for row in accepted])
    order = sorted(range(len(ids)), key=ids.__getitem__)
    rows = [accepted[position] for position in order]
    image_id = pd.Series([ids[position] for position in order], dtype="str")
    images = _images(image_id, listing.iloc[rows], [records[row] for row in rows])
    images.attrs["notes"] = dict(Counter(note for row in rows for note in records[row].get("notes", ())))
    images["duplicate_of"] = pd.Series([originals[position] for position in order], dtype="str")
    label = [None if pd.isna(label) else label for label in listing["label"].iloc[rows]]
    labels = pd.DataFrame({"image_id": image_id, "label": pd.Series(label, dtype="object")})
    refused = _rejected(listing.iloc[rejected], [records[row]["reason"] for row in rejected])
    return images, labels, refused, rows


def _image_ids(digests: list[str]) -> tuple[list[str], list[str]]:
    """Return the image_id of each file, and the image_id of the first file with the same bytes ("" for that file)."""
    copies: dict[str, int] = {}
    ids, originals = [], []
    for digest in digests:
        first = digest[:_ID_DIGITS]
        copies[digest] = copies.get(digest, 0) + 1
        ids.append(first if copies[digest] == 1 else f"{first}-{copies[digest]}")
        originals.append("" if copies[digest] == 1 else first)
    if len(set(ids)) != len(ids):
        raise ValueError("two different files share the first 16 digits of their SHA-256: remove one of them")
    return ids, originals


def _images(image_id: pd.Series, listed: pd.DataFrame, records: list[Record]) -> pd.DataFrame:
    listed = listed.reset_index(drop=True)
    boxes = [record["box"] or (np.nan,) * 4 for record in records]
    place = ("size", *PLACE_COLUMNS) if set(PLACE_COLUMNS) <= set(listed) else ()
    split = ["" if pd.isna(split) else split for split in listed["split"]]
    return pd.DataFrame(
        {
            "image_id": image_id,
            "path": listed["path"].astype("str"),
            "root": listed["root"].astype("int64"),
            "domain": listed["domain"].astype("str"),
            "split": pd.Series(split, dtype="str"),
            "height": pd.Series([record["height"] for record in records], dtype="int64"),
            "width": pd.Series([record["width"] for record in records], dtype="int64"),
            **{name: pd.Series([box[i] for box in boxes], dtype="float64") for i, name in enumerate(BOX_COLUMNS)},
            "sha256": pd.Series([record["sha256"] for record in records], dtype="str"),
            **{name: listed[name] for name in place},
        }
    )


def _rejected(listed: pd.DataFrame, reasons: list[str]) -> pd.DataFrame:
    listed = listed.reset_index(drop=True)
    return pd.DataFrame(
        {
            "path": listed["path"].astype("str"),
            "root": listed["root"].astype("int64"),
            "domain": listed["domain"].astype("str"),
            "reason": pd.Series(reasons, dtype="str"),
        }
    )
