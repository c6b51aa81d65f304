"""`grappa vectors` and `grappa links`: the collection for other tools, as one Parquet file or folders by cluster."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grappa.core.atomic import write_whole
from grappa.pipeline.open_run import Run, open_run
from grappa.pipeline.store.storage import new_folder, refuse_existing, storage_errors

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

Say = Callable[[str], None]
VECTOR = "embedding"
BLOCK_ROWS = 16384


def vectors(root: Path, out: Path, *, model: str | None, say: Say) -> None:
    """Write a row for each image of the collection as it is now, with its vector by a model, into the new file ``out``.

    Columns: image_id, file, path, domain, split, label, the clusters (k00256 ...) and embedding (a list of D float32).
    """
    check_parquet_name(out)
    run = open_run(root)
    embeddings, _ = run.embeddings(model, live=True)
    table = _described(run)
    write_vectors(out, table, embeddings)
    say(f"wrote {len(table)} vectors of {embeddings.shape[1]} dimensions by {model or run.deployed} to {out}")


def _described(run: Run) -> pd.DataFrame:
    images = run.images(live=True)[["file", "path", "domain", "split", "label"]].astype(object)
    names = run.config.granularities
    clusters = run.assignments(live=True)[[*names]].astype("Int64") if names else None
    described = images.join(clusters, validate="one_to_one") if clusters is not None else images
    return described.reset_index()


def write_vectors(out: Path, table: pd.DataFrame, embeddings: NDArray[np.float32]) -> None:
    """Write a table with its vectors (N, D) as Parquet, in parts; ValueError for a file name that is no UTF-8."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        plain = pa.Table.from_pandas(table, preserve_index=False)
    except UnicodeEncodeError as error:
        raise ValueError(f"{ascii(error.object)[:200]} is no UTF-8 name, which Parquet cannot hold") from error
    kind = pa.list_(pa.float32(), embeddings.shape[1])
    schema = plain.schema.append(pa.field(VECTOR, kind)).remove_metadata()

    def write(file: Any) -> None:
        with pq.ParquetWriter(file, schema) as writer:
            for start in range(0, len(plain), BLOCK_ROWS):
                part = plain.slice(start, BLOCK_ROWS)
                flat = pa.array(embeddings[start : start + BLOCK_ROWS].reshape(-1), pa.float32())
                column = pa.FixedSizeListArray.from_arrays(flat, type=kind)
                writer.write_table(part.append_column(VECTOR, column).cast(schema))

    with storage_errors(out):
        write_whole(out, write, draft=out.with_name(f".{out.name}.{os.getpid()}-0.tmp"))


def check_parquet_name(out: Path) -> None:
    """Refuse a name that does not end in .parquet, or that exists."""
    if out.suffix.lower() != ".parquet":
        raise ValueError(f"{out} is to be a Parquet file; give a name that ends in .parquet")
    refuse_existing(out)


def links(root: Path, out: Path, *, granularity: str | None, say: Say) -> None:
    """Make a folder for each cluster with links to its images, those nearest to the centroid first, in the new ``out``.

    ``granularity``: such as k00256; None: all, each in a folder of its own.
    """
    from grappa.images.originals import refuse_packed

    refuse_existing(out)
    run = open_run(root)
    names = _granularities(run, granularity)
    images, clusters = run.images(live=True), run.assignments(live=True)
    refuse_packed(images["file"], "`grappa links`")
    with new_folder(out) as draft:
        for name in names:
            _link_clusters(draft / name if granularity is None else draft, clusters, images["file"], name)
    say(f"linked {len(images)} images by {', '.join(names)} in {out}")


def _granularities(run: Run, granularity: str | None) -> tuple[str, ...]:
    names = run.config.granularities
    if not names:
        raise ValueError("the run has no clusters: its adaptors are trained on labels (adaptors.supervision)")
    if granularity is not None and granularity not in names:
        raise ValueError(f"there is no granularity {granularity!r}; the run has {', '.join(names)}")
    return names if granularity is None else (granularity,)


def _link_clusters(folder: Path, clusters: pd.DataFrame, files: pd.Series, name: str) -> None:
    known = clusters[clusters[name].notna()]
    width = len(str(int(known[name].max())))
    for cluster in range(int(known[name].max()) + 1):
        members = known[known[name] == cluster]
        if members.empty:
            continue
        place = folder / f"{cluster:0{width}d}"
        place.mkdir(parents=True)
        ranked = members.sort_values(f"{name}_distance", kind="stable").index
        for rank, image_id in enumerate(ranked):
            file = files[image_id]
            (place / f"{rank:05d}-{image_id}{Path(file).suffix}").symlink_to(file)
