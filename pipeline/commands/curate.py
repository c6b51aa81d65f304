"""`grappa duplicates`, `grappa outliers` and `grappa sample`: tables that help to keep a collection clean."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd

from grappa.pipeline.commands.hand_over import check_parquet_name
from grappa.pipeline.engine.live.curation import different_rows, duplicate_pairs
from grappa.pipeline.engine.progress import Progress
from grappa.pipeline.open_run import NEAR_DUPLICATE, Which, open_run
from grappa.pipeline.store.storage import atomic_write_bytes

Say = Callable[[str], None]
MOST_LINES = 10


def duplicates(run: Path, out: Path | None, *, threshold: float | None, model: str | None, say: Say) -> None:
    """Find copies and near-duplicates of the collection as it is now; say the first ones, write all into ``out``."""
    if out is not None:
        check_parquet_name(out)
    opened, limit = open_run(run), NEAR_DUPLICATE if threshold is None else threshold
    images, (embeddings, _) = opened.images(live=True), opened.embeddings(model or "zero_shot", live=True)
    with Progress().task("comparing", len(different_rows(images))) as (advance, _):
        found = duplicate_pairs(images, embeddings, limit, progress=advance)
    for row in found.head(MOST_LINES).itertuples():
        what = "the same bytes" if row.exact else f"{row.similarity:.4f}"
        say(f"{what}  {row.domain}  {row.path}  {row.other_domain}  {row.other_path}")
    near, groups = int((~found["exact"]).sum()), found["group"].nunique()
    copies = len(found) - near
    summary = f"{copies} exact copies and {near} pairs of cosine {limit:g} or more, in {groups} groups"
    _write(found, out, summary, say)


def outliers(run: Path, out: Path | None, *, say: Say) -> None:
    """Rank the images of a run that were not removed by how far they lie from others; say the first, write all."""
    if out is not None:
        check_parquet_name(out)
    found = open_run(run).outliers(live=True)
    for row in found.head(MOST_LINES).itertuples():
        say(f"{row.distance:.3f}  {row.domain}  {row.path}  {row.Index}")
    table = found.drop(columns="file").reset_index()
    _write(
        table,
        out,
        f"{len(found)} images, those farthest from others first (1 - cosine to the nearest train images)",
        say,
    )


def sample(run: Path, number: int, out: Path, *, seed: int, rows: Which, say: Say) -> None:
    """Write a sample of the collection as it is now as a table that `grappa init --images` takes."""
    from grappa.images.originals import refuse_packed
    from grappa.images.sources.urls import is_url

    if out is not None:
        check_parquet_name(out)
    found = open_run(run).sample(number, seed=seed, rows=rows, live=True)
    if out is not None:
        refuse_packed((file for file in found["file"] if not is_url(file)), "the table of `grappa sample --out`")
    table = pd.DataFrame({"image_id": found.index})
    table["path"] = pd.Series(found["file"].to_numpy(dtype=object), dtype=object)  # a path need not be UTF-8
    for column in ("domain", "label", "split"):
        values = found[column].astype(object)
        table[column] = values.where(values.notna() & (values != ""), None).to_numpy(dtype=object)
    boxes = [name for name in found.columns if name.startswith("box_")]
    if found[boxes].notna().any(axis=None):
        table[boxes] = found[boxes].to_numpy()
    domains = found["domain"].value_counts().sort_index()
    counts = ", ".join(f"{domain} {count}" for domain, count in domains.items() if count)
    _write(table, out, f"{len(table)} images: {counts}", say)


def _write(table: pd.DataFrame, out: Path | None, summary: str, say: Say) -> None:
    if out is None:
        say(f"{summary}; --out FILE.parquet writes them")
        return
    atomic_write_bytes(out, parquet_bytes(table))
    say(f"{summary}; wrote {out}")


def parquet_bytes(table: pd.DataFrame) -> bytes:
    """Return a table as the bytes of a Parquet file; ValueError for a file name that is no UTF-8."""
    try:
        return table.to_parquet(index=False)
    except UnicodeEncodeError as error:
        name = ascii(error.object)[:200]
        raise ValueError(f"{name} is no UTF-8 name, which Parquet cannot hold; rename the file") from error
