"""`grappa vectors` and `grappa links`: the collection for other tools, as a Parquet file, for FiftyOne, or folders."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grappa.core.atomic import write_whole
from grappa.pipeline.commands.search import check_deployed, index_now
from grappa.pipeline.open_run import Run, open_run
from grappa.pipeline.store.artifacts import RunFolder
from grappa.pipeline.store.storage import atomic_write_json, new_folder, refuse_existing, storage_errors

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

Say = Callable[[str], None]
VECTOR = "embedding"
BLOCK_ROWS = 16384
NUM_NEIGHBORS = 10
# The version of FiftyOne whose data sets are written; later ones bring them up to their own when they load them.
FIFTYONE_VERSION = "1.0.0"


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
        name = ascii(error.object)[:200]
        raise ValueError(f"{name} is no UTF-8 name, which Parquet cannot hold; rename the file") from error
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


# ---------------------------------------------------------------- FiftyOne


def fiftyone(root: Path, out: Path, *, model: str | None, say: Say) -> None:
    """Write the collection as it is now as a data set of FiftyOne into the new folder ``out``; images are not copied.

    ``fiftyone.Dataset.from_dir(out, dataset_type=fiftyone.types.FiftyOneDataset)`` loads it; nothing of FiftyOne is
    needed to write it. A sample has its split as a tag, and the fields image_id, domain, label and clusters (k00256
    ...; classifications), embedding (D float32, by ``model``), neighbors (the ids of the samples of the ten nearest
    images by the deployed model, nearest first, without itself) and similarities (their cosines). ValueError where an
    image is no local file of its own.
    """
    from grappa.images.originals import refuse_packed

    if out.suffix.lower() == ".parquet":
        raise ValueError(f"{out} is to be a folder for FiftyOne; give another name, or leave out --format fiftyone")
    refuse_existing(out)
    run = open_run(root)
    embeddings, _ = run.embeddings(model, live=True)
    table = _described(run).set_index("image_id")
    refuse_packed(table["file"], "`grappa vectors --format fiftyone`")
    table = table.join(run.images(live=True)[["width", "height"]], validate="one_to_one")
    clusters = run.config.granularities
    with new_folder(out) as draft:
        atomic_write_json(draft / "metadata.json", _data_set(out.name, clusters))
        samples = _samples(table, clusters, embeddings, _nearest(run, table.index))
        with (draft / "samples.json").open("w", encoding="ascii") as file:
            file.write('{"samples": [')
            for number, sample in enumerate(samples):
                file.write(("," if number else "") + "\n" + json.dumps(sample, allow_nan=False))
            file.write("\n]}\n")
    say(f"wrote {len(table)} samples for FiftyOne, vectors by {model or run.deployed}, to {out}")


def _nearest(run: Run, ids: pd.Index) -> Iterator[tuple[list[str], list[float]]]:
    """Yield the ids of the nearest images, and their cosines, of each image of the collection."""
    folder = RunFolder.open(run.root)
    check_deployed(folder)
    index, (embeddings, _) = index_now(folder), run.embeddings(live=True)
    k = min(NUM_NEIGHBORS + 1, len(index))
    for start in range(0, len(ids), BLOCK_ROWS):
        found = index.search(embeddings[start : start + BLOCK_ROWS], k)
        for image_id, names, similarities in zip(ids[start : start + BLOCK_ROWS], *found, strict=True):
            pairs = zip(names.tolist(), similarities.tolist(), strict=True)
            others = [(name, similarity) for name, similarity in pairs if name != image_id][:NUM_NEIGHBORS]
            yield [name for name, _ in others], [similarity for _, similarity in others]


def _samples(
    table: pd.DataFrame,
    clusters: tuple[str, ...],
    embeddings: NDArray[np.float32],
    nearest: Iterator[tuple[list[str], list[float]]],
) -> Iterator[dict[str, Any]]:
    """Yield the samples as FiftyOne has them in JSON; ValueError for a file name that is no UTF-8."""
    rows: Iterator[Any] = table.itertuples()
    for row, embedding, (names, similarities) in zip(rows, embeddings, nearest, strict=True):
        image_id, file, split = str(row.Index), str(row.file), _text(row.split)
        check_text(file)
        yield {
            "_id": {"$oid": _object_id(image_id)},
            "_media_type": "image",
            "_rand": int(_object_id(image_id, "order"), 16) / 16**24,
            "filepath": file,
            "tags": [split] if split else [],
            "metadata": {"_cls": "ImageMetadata", "width": int(row.width), "height": int(row.height)},
            "image_id": image_id,
            "domain": row.domain,
            **{name: _classified(image_id, name, _text(getattr(row, name))) for name in ("label", *clusters)},
            VECTOR: {"$binary": {"base64": _packed(embedding), "subType": "00"}},
            "neighbors": [_object_id(name) for name in names],
            "similarities": similarities,
        }


def check_text(file: str) -> None:
    """Refuse a file name that is no UTF-8."""
    try:
        file.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{ascii(file)[:200]} is no UTF-8 name, which JSON cannot hold; rename the file") from error


def _text(value: Any) -> str | None:
    """Return a cell of a table as text, None where nothing is given."""
    import pandas as pd

    return None if pd.isna(value) else str(value)


def _classified(image_id: str, field: str, text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    return {"_id": {"$oid": _object_id(image_id, field)}, "_cls": "Classification", "tags": [], "label": text}


def _object_id(*parts: str) -> str:
    """Return the id of a document, the same for the same image each time."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def _packed(vector: NDArray[np.float32]) -> str:
    """Return an array (D,) as FiftyOne keeps it: an npy file, by zlib."""
    import numpy as np

    buffer = io.BytesIO()
    np.save(buffer, np.asarray(vector), allow_pickle=False)
    return base64.b64encode(zlib.compress(buffer.getvalue())).decode()


def _data_set(name: str, clusters: tuple[str, ...]) -> dict[str, Any]:
    """Return what FiftyOne has to know of a data set: its version, its fields and their types."""
    texts, numbers = "fiftyone.core.fields.StringField", "fiftyone.core.fields.FloatField"
    label = [_field("id", "ObjectId", column="_id"), _field("tags", "List", of=texts), _field("label", "String")]
    label += [_field("confidence", "Float"), _field("logits", "Vector")]
    metadata = [_field("size_bytes", "Int"), _field("mime_type", "String")]
    metadata += [_field(each, "Int") for each in ("width", "height", "num_channels")]
    fields = [
        _field("id", "ObjectId", column="_id"),
        _field("filepath", "String"),
        _field("tags", "List", of=texts),
        _field("metadata", "EmbeddedDocument", document="fiftyone.core.metadata.ImageMetadata", fields=metadata),
        _field("_media_type", "String"),
        _field("_rand", "Float"),
        _field("_dataset_id", "ObjectId"),
        _field("created_at", "DateTime", read_only=True),
        _field("last_modified_at", "DateTime", read_only=True),
        _field("image_id", "String"),
        _field("domain", "String"),
        *(
            _field(each, "EmbeddedDocument", document="fiftyone.core.labels.Classification", fields=label)
            for each in ("label", *clusters)
        ),
        _field(VECTOR, "Vector"),
        _field("neighbors", "List", of=texts),
        _field("similarities", "List", of=numbers),
    ]
    return {"name": name, "version": FIFTYONE_VERSION, "media_type": "image", "sample_fields": fields}


def _field(
    name: str,
    kind: str,
    *,
    of: str | None = None,
    document: str | None = None,
    fields: list[dict[str, Any]] | None = None,
    column: str | None = None,
    read_only: bool = False,
) -> dict[str, Any]:
    return {
        "name": name,
        "ftype": f"fiftyone.core.fields.{kind}Field",
        "embedded_doc_type": document,
        "subfield": of,
        "fields": fields or [],
        "db_field": column or name,
        "description": None,
        "info": None,
        "read_only": read_only,
    }


# ---------------------------------------------------------------- links


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
