"""Stage ``images``: the listed files decoded once into the pixel cache; the image table, labels and rejected files.

``pixels/``: the cache, raw or of JPEGs; with ``images.cache`` none the list of originals, decoded again when they are
read.
"""

from __future__ import annotations

from typing import Any

import pandas as pd

from grappa.images.ingest import decode_all, decode_shards
from grappa.pipeline.engine.context import StageContext
from grappa.pipeline.store.artifacts import SCRATCH_FOLDER


class TooManyRejectedError(ValueError):
    """More files than ``images.max_rejected`` could not be used."""


def run(context: StageContext) -> str:
    settings = context.config.images
    path, roots = context.sources()
    listing = pd.read_parquet(path)
    how: dict[str, Any] = {
        "cache": settings.form,
        "cache_size": settings.shorter_side,
        "max_pixels": settings.max_pixels,
        "shard_size": settings.shard_size,
        "manifests": context.path / SCRATCH_FOLDER,
        "num_workers": context.num_workers,
        "dropped": context.say_dropped,
        "written": context.written,
    }
    if context.team.size > 1:
        _decode_own_shards(context, listing, roots, how)
        if not context.leads:
            return ""
    with context.task("decoding" if context.team.size == 1 else "collecting", len(listing)) as advance:
        images, labels, rejected = decode_all(
            listing, roots, context.path / "pixels", **how, progress=advance, checked=context.team.size > 1
        )
    _check_rejected(rejected, len(listing), settings.max_rejected)
    notes = images.attrs.pop("notes")
    for name, table in (("images", images), ("labels", labels), ("rejected", rejected)):
        table.to_parquet(context.path / f"{name}.parquet", index=False)
    return _summary(images, rejected) + "".join(f", {number} of {note}" for note, number in notes.items())


def _decode_own_shards(context: StageContext, listing: pd.DataFrame, roots: list[str], how: dict[str, Any]) -> None:
    """Decode every n-th shard, as one of n processes; return when all processes have decoded theirs."""
    team, size = context.team, context.config.images.shard_size
    own = slice(team.rank, None, team.size)
    number = sum(min(size, len(listing) - start) for start in range(0, len(listing), size)[own])
    with context.task(f"decoding (one of {team.size} processes)", number) as advance:
        decode_shards(listing, roots, context.path / "pixels", own, **how, progress=advance)
    team.wait_for_all("decoded")


def _check_rejected(rejected: pd.DataFrame, num_listed: int, max_rejected: float) -> None:
    if len(rejected) <= max_rejected * num_listed and len(rejected) < num_listed:
        return
    reasons = rejected["reason"].value_counts()
    number = f"{reasons.iloc[0]} file{'' if reasons.iloc[0] == 1 else 's'}"
    first = rejected.iloc[0]
    raise TooManyRejectedError(
        f"{len(rejected)} of {num_listed} files could not be used (images.max_rejected allows {max_rejected:.0%}); "
        f"most often: {reasons.index[0]} ({number}); first: {first['path']}: {first['reason']}"
    )


def _summary(images: pd.DataFrame, rejected: pd.DataFrame) -> str:
    duplicates, domains = int((images["duplicate_of"] != "").sum()), images["domain"].nunique()
    of = f"{len(images)} images of {domains} domain{'' if domains == 1 else 's'}"
    return f"{of}, {len(rejected)} rejected{_first(rejected)}, {duplicates} exact duplicates"


def _first(rejected: pd.DataFrame) -> str:
    if rejected.empty:
        return ""
    first = rejected.iloc[0]
    return f" (first {first['path']}: {first['reason']}; all are in images/rejected.parquet)"
