"""From listed files to the image table and the pixel cache, in one pass over the files.

Files are decoded in shards. After a shard's pixels its manifest is written, which records the digest of the pixels and
what became of the files. So an interrupted pass decodes only what is not whole, and ends with the same bytes. At the
end the rows are ordered by content (image_id): neither the order of a listing nor the names of its files has an
influence on what is computed from the pixels.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from grappa.core.notes import UntrustedError, check_claim, claim, read_note, write_note
from grappa.images.files import DecodedFile, ImagesChangedError, RejectedFileError, UnansweredError, decode_bytes
from grappa.images.originals import described, open_rows
from grappa.images.paths import PLACE_COLUMNS
from grappa.images.pixels import shard_file, write_index, write_shard
from grappa.images.table import BOX_COLUMNS

__all__ = ["ImagesChangedError", "decode_all", "decode_shards"]

_ID_DIGITS = 16
Record = dict[str, Any]  # {"reason"} of a rejected file, or {"sha256", "height", "width", "box", "place", "notes"}


def decode_all(
    listing: pd.DataFrame,
    roots: Sequence[str],
    folder: Path,
    *,
    cache_size: int,
    max_pixels: int,
    shard_size: int,
    manifests: Path | None = None,
    num_workers: int = 1,
    progress: Callable[[int], None] | None = None,
    dropped: Callable[[str], None] | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Decode every listed file once into the pixel cache in ``folder``, and return the tables of images and rejects.

    Args:
        listing, roots: what ``list_images`` gave (the frame and its ``attrs["roots"]``).
        cache_size: shorter side of the cached pixels; smaller images stay as they are.
        max_pixels: an image with more is rejected as a decompression bomb before it is decoded.
        shard_size: files a shard; ``shard_size`` cached images and ``num_workers`` originals are held in memory.
        manifests: the folder of the shards' manifests, by which a later call can go on; None: ``folder``.
        num_workers: decoding threads; changes no byte of the result.
        progress: called with the number of files newly done; the files of shards that are whole already count too.
        dropped: called with a sentence for a shard of an earlier call that is damaged and decoded again.

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
        listing,
        roots,
        folder,
        slice(None),
        cache_size=cache_size,
        max_pixels=max_pixels,
        shard_size=shard_size,
        manifests=manifests,
        num_workers=num_workers,
        progress=progress,
        dropped=dropped,
    )
    return _tables(listing, records, folder)


def decode_shards(
    listing: pd.DataFrame,
    roots: Sequence[str],
    folder: Path,
    shards: slice,
    *,
    cache_size: int,
    max_pixels: int,
    shard_size: int,
    manifests: Path | None = None,
    num_workers: int = 1,
    progress: Callable[[int], None] | None = None,
    dropped: Callable[[str], None] | None = None,
) -> list[Record]:
    """Decode the shards of a slice, but for whole ones, and return the records of their files, in listing order.

    Several processes may each decode a slice, such as ``slice(1, None, 2)``, before one of them calls
    :func:`decode_all`, which then has no more to decode. The other arguments and the errors are those of
    :func:`decode_all`.
    """
    manifests = manifests or folder
    for place in (folder, manifests):
        place.mkdir(parents=True, exist_ok=True)
    load = _loader(listing, roots, cache_size=cache_size, max_pixels=max_pixels)
    settings = {"cache_size": cache_size, "max_pixels": max_pixels}
    records: list[Record] = []
    with ThreadPoolExecutor(num_workers, "decode") as pool:
        for start in range(0, len(listing), shard_size)[shards]:
            part, shard = range(start, min(start + shard_size, len(listing))), start // shard_size
            mark = fingerprint(settings, described(listing.iloc[start : part.stop]))
            manifest = manifests / f"{shard:05d}.json"
            records += _whole_shard(folder, shard, manifest, mark, progress, dropped) or _decode_shard(
                folder, shard, manifest, mark, _run(pool, load, part, progress)
            )
    return records


# ---------------------------------------------------------------- shards and their manifests


def fingerprint(settings: Any, part: Any) -> str:
    """Return the SHA-256 of what a shard is made of: ``settings`` and the files of its ``part``, both as JSON."""
    return hashlib.sha256(json.dumps([settings, part]).encode()).hexdigest()


def write_shard_manifest(folder: Path, shard: int, manifest: Path, mark: str, records: list[Record]) -> None:
    """Write the manifest of a shard whose pixels have been written before.

    mark: the shard's :func:`fingerprint`. records: what became of each file, in order.
    """
    write_note(manifest, {"mark": mark, "pixels": claim(shard_file(folder, shard)), "records": records})


def read_shard_manifest(
    folder: Path, shard: int, manifest: Path, mark: str, dropped: Callable[[str], None] | None = None
) -> list[Record] | None:
    """Return the records of a shard that an earlier pass wrote whole, with the same mark; else None.

    ``dropped`` gets a sentence where the shard or its manifest is damaged.
    """
    try:
        found = read_note(manifest)
        if found is None or found.get("mark") != mark:
            return None
        check_claim(shard_file(folder, shard), found.get("pixels"))
        records: list[Record] = found["records"]
        return records
    except UntrustedError as error:
        if dropped:
            dropped(f"{error}; the images of shard {shard} are decoded again")
        return None


def _decode_shard(
    folder: Path, shard: int, manifest: Path, mark: str, results: Iterator[DecodedFile | RejectedFileError]
) -> list[Record]:
    outcomes = list(results)
    decoded = [outcome for outcome in outcomes if isinstance(outcome, DecodedFile)]
    places = iter(write_shard(folder, shard, [one.pixels for one in decoded]).tolist())
    records = [_record(outcome, places) for outcome in outcomes]
    if not any(isinstance(outcome, UnansweredError) for outcome in outcomes):
        write_shard_manifest(folder, shard, manifest, mark, records)
    return records


def _whole_shard(
    folder: Path,
    shard: int,
    manifest: Path,
    mark: str,
    progress: Callable[[int], None] | None,
    dropped: Callable[[str], None] | None,
) -> list[Record] | None:
    records = read_shard_manifest(folder, shard, manifest, mark, dropped)
    if records and progress:
        progress(len(records))
    return records


def _record(outcome: DecodedFile | RejectedFileError, places: Iterator[list[int]]) -> Record:
    if isinstance(outcome, RejectedFileError):
        return {"reason": str(outcome)}
    box = None if np.isnan(outcome.box[0]) else outcome.box
    size = {"height": outcome.height, "width": outcome.width}
    notes = {"notes": list(outcome.notes)} if outcome.notes else {}
    return {"sha256": outcome.sha256, **size, "box": box, "place": next(places), **notes}


# ---------------------------------------------------------------- files


def _loader(
    listing: pd.DataFrame, roots: Sequence[str], *, cache_size: int, max_pixels: int
) -> Callable[[int], DecodedFile | RejectedFileError]:
    """Return a function that reads and decodes a row of the listing; threads call it."""
    read = open_rows(listing, roots, max_pixels=max_pixels)
    boxes = listing[list(BOX_COLUMNS)].to_numpy()

    def load(row: int) -> DecodedFile | RejectedFileError:
        try:
            x0, y0, x1, y1 = boxes[row].tolist()
            return decode_bytes(read(row), (x0, y0, x1, y1), cache_size=cache_size, max_pixels=max_pixels)
        except RejectedFileError as error:
            return type(error)(str(error))  # without the traceback, which would keep the decoded image alive

    return load


def _run(
    pool: Executor,
    load: Callable[[int], DecodedFile | RejectedFileError],
    part: range,
    progress: Callable[[int], None] | None,
) -> Iterator[DecodedFile | RejectedFileError]:
    for outcome in pool.map(load, part):
        if progress:
            progress(1)
        yield outcome


# ---------------------------------------------------------------- tables


def _tables(
    listing: pd.DataFrame, records: list[Record], folder: Path
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    rejected = [row for row, record in enumerate(records) if "reason" in record]
    accepted = [row for row, record in enumerate(records) if "reason" not in record]
    ids, originals = _image_ids([records[row]["sha256"] for row in accepted])
    order = sorted(range(len(ids)), key=ids.__getitem__)
    rows = [accepted[position] for position in order]
    write_index(folder, np.array([records[row]["place"] for row in rows], dtype=np.int64).reshape(-1, 4))
    image_id = pd.Series([ids[position] for position in order], dtype="str")
    images = _images(image_id, listing.iloc[rows], [records[row] for row in rows])
    images.attrs["notes"] = dict(Counter(note for row in rows for note in records[row].get("notes", ())))
    images["duplicate_of"] = pd.Series([originals[position] for position in order], dtype="str")
    label = [None if pd.isna(label) else label for label in listing["label"].iloc[rows]]
    labels = pd.DataFrame({"image_id": image_id, "label": pd.Series(label, dtype="object")})
    return images, labels, _rejected(listing.iloc[rejected], [records[row]["reason"] for row in rejected])


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
