"""`grappa embed`: embed new images with the model of a run or with an exported model."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from grappa import load_model
from grappa.core.atomic import fsync_folder
from grappa.images.sources.urls import is_url
from grappa.pipeline.commands.listed import changed_means_again
from grappa.pipeline.commands.search import max_pixels
from grappa.pipeline.store.artifacts import RUN_FILE, RunFolder
from grappa.pipeline.store.digests import known_digest
from grappa.pipeline.store.storage import refuse_existing, storage_errors

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor

    from grappa.images.files import RejectedFileError
    from grappa.model import GrappaModel
    from grappa.pipeline.commands.embedded_shards import Shards

Progress = Callable[[int, int], None]
BATCH = 64
NO_BOX = (float("nan"),) * 4
COLUMNS = ["path", "domain"]
ARRAY_FILE, ID_FILE, REJECTED_FILE = "embeddings.npy", "ids.parquet", "rejected.parquet"
_NOT_WRITTEN = "arrow bin csv feather h5 hdf5 json jsonl npz pickle pkl pt safetensors tar tsv txt xlsx zip"
OTHER_FORMATS = tuple(f".{each}" for each in _NOT_WRITTEN.split())
REMOTE_THREADS = 16  # that wait for a network


def embed(run_or_model: Path, images: Path | str, out: Path, progress: Progress | None = None) -> str:
    """Write the embeddings of images, in the order of ``list_images``, to ``out``, which appears whole or not at all.

    The name of ``out`` says in which form:

    - FILE.npy: float32 (n, D); its rows are named by FILE.ids.parquet beside it (path, domain), which appears first.
    - FILE.parquet: one table with path, domain and embedding (a list of D float32).
    - any other: a new folder with ``embeddings.npy``, ``ids.parquet`` and ``rejected.parquet`` (path, domain, reason).

    ``images`` is a source of ``list_images``: a folder, a table, a tar, a Parquet file of images, or a URL of one of
    these; files directly in the folder have the domain "". ``progress`` is called with the number of images done and of
    all images. Returns the result in one sentence, with the first image that cannot be used and its reason.

    Threads decode ahead of the model. Finished rows are kept in ``.NAME.partial`` beside ``out``: killed at any moment,
    the same call goes on there and writes the same bytes; only images that did not come over a network are asked for
    again. Memory does not grow with the embeddings. LockedError where another process writes ``out``,
    ImagesChangedError where an image is not what was listed.
    """
    from grappa.images.originals import homes_of
    from grappa.images.table import list_images
    from grappa.pipeline.commands.embedded_shards import Shards, stamps, work_folder

    _refuse_used(out)
    model, listing, largest = load_model(run_or_model), list_images([images], loose_domain=""), max_pixels(run_or_model)
    listing["stamp"] = stamps(homes_of(listing, listing.attrs["roots"]))
    versions = {name: metadata.version(name) for name in ("torch", "timm")}
    identity = {"model": _model_digests(run_or_model), "batch": BATCH, "max_pixels": largest, "versions": versions}
    with storage_errors(out), work_folder(out) as folder, changed_means_again():
        shards = Shards(folder, listing, model.embedding_dim, identity)
        _fill(model, shards, largest, progress or (lambda done, total: None))
        found = _counts(shards)
        if found.kept:
            _publish(shards, found.kept, out)
        shards.remove()
    if not found.kept:
        raise ValueError(f"none of the {len(listing)} files can be used; first: {found.first}")
    return _sentence(found, shards, out)


def _sentence(found: _Counts, shards: Shards, out: Path) -> str:
    passed = "".join(f", {words} passed over" for words in shards.listing.attrs["passed_over"])
    rejected = len(shards.listing) - found.kept
    first = f"; first of the rejected: {found.first}" if rejected else ""
    late = f", {found.unanswered} of them did not come over the network" if found.unanswered else ""
    dimensions = f"{found.kept} embeddings of {shards.width} dimensions"
    return f"{dimensions}, {rejected} files rejected{late}, in {out}{passed}{first}"


def _model_digests(run_or_model: Path) -> list[str]:
    """Return the sha256 of the model's two files."""
    is_run = (run_or_model / RUN_FILE).exists()
    folder = RunFolder.open(run_or_model).artifact("model").home if is_run else run_or_model
    return [known_digest(folder / name) for name in ("model.json", "weights.safetensors")]


# ---------------------------------------------------------------- computing


def _fill(model: GrappaModel, shards: Shards, largest: int, progress: Progress) -> None:
    """Write the shards that are missing or damaged."""
    import numpy as np

    from grappa.deploy.encoding import forward, prepared_ahead
    from grappa.images.files import RejectedFileError, UnansweredError

    missing = [number for number in range(len(shards)) if not shards.is_whole(number)]
    total, waiting = len(shards.listing), iter(missing)
    done = total - sum(len(shards.rows(number)) for number in missing)
    progress(done, total)
    vectors: list[Any] = []
    problems: list[RejectedFileError | None] = []
    number = next(waiting, None)
    rows_ahead = chain.from_iterable(map(shards.rows, missing))
    for found in prepared_ahead(_preparation(model, shards, largest), rows_ahead, BATCH, num_threads=_threads(shards)):
        usable = np.array([not isinstance(each, Exception) for each in found])
        rows = np.zeros((len(found), shards.width), np.float32)
        if usable.any():
            rows[usable] = forward(model, [each for each in found if not isinstance(each, Exception)])
        vectors.append(rows)
        problems += [each if isinstance(each, RejectedFileError) else None for each in found]
        if number is not None and len(problems) == len(shards.rows(number)):
            reasons = [None if each is None else str(each) for each in problems]
            unanswered = sum(isinstance(each, UnansweredError) for each in problems)
            shards.write(number, np.concatenate(vectors), reasons, unanswered=unanswered)
            vectors, problems, number = [], [], next(waiting, None)
        done += len(found)
        progress(done, total)


def _threads(shards: Shards) -> int | None:
    """Return how many threads read: more than processors where most of them wait for a network."""
    return REMOTE_THREADS if any(is_url(root) for root in shards.listing.attrs["roots"]) else None


def _preparation(model: GrappaModel, shards: Shards, largest: int) -> Callable[[int], Tensor | RejectedFileError]:
    """Return the function that gives the model's input of a row of the listing, or why the image cannot be used."""
    from grappa.deploy.encoding import prepared
    from grappa.images.files import RejectedFileError, decode_bytes
    from grappa.images.originals import open_rows

    read = open_rows(shards.listing, shards.listing.attrs["roots"], max_pixels=largest)

    def prepare(row: int) -> Tensor | RejectedFileError:
        try:
            decoded = decode_bytes(read(row), NO_BOX, cache_size=model.cache_size, max_pixels=largest)
        except RejectedFileError as error:
            return error
        return prepared(model, decoded.pixels, largest)

    return prepare


# ---------------------------------------------------------------- publishing


class _Counts(NamedTuple):
    """How many rows have an embedding, how many have none because they did not come, and the first without, and why."""

    kept: int
    unanswered: int
    first: str


def _counts(shards: Shards) -> _Counts:
    kept, unanswered, first = 0, 0, ""
    for number in range(len(shards)):
        reasons = shards.reasons(number)
        kept += reasons.count(None)
        unanswered += shards.unanswered(number)
        row = next((row for row, reason in zip(shards.rows(number), reasons, strict=True) if reason is not None), None)
        if row is not None and not first:
            first = f"{shards.listing['path'].iloc[row]}: {reasons[row - shards.rows(number).start]}"
    return _Counts(kept, unanswered, first)


def _refuse_used(out: Path) -> None:
    """Refuse names of other formats, and names that exist.

    The ids of an array may have been published by a call that was killed just then.
    """
    from grappa.pipeline.commands.embedded_shards import work_of

    if out.suffix.lower() in OTHER_FORMATS:
        raise ValueError(f"{out} is to be one file in .npy or .parquet, or a new folder; give such a name")
    refuse_existing(out)
    if _is_array(out) and not work_of(out).is_dir():
        refuse_existing(_ids_of(out))


def _is_array(out: Path) -> bool:
    return out.suffix.lower() == ".npy"


def _ids_of(out: Path) -> Path:
    return out.with_name(f"{out.stem}.ids.parquet")


def _publish(shards: Shards, kept: int, out: Path) -> None:
    """Give what is written its name; of an array the ids get theirs first, so that one that is there has them."""
    if _is_array(out):
        draft, ids = _written_array(shards, kept, shards.folder / "draft"), _ids_of(out)
        if ids.exists() and ids.read_bytes() != (draft / ID_FILE).read_bytes():
            refuse_existing(ids)
        refuse_existing(out)
        os.rename(draft / ID_FILE, ids)
        fsync_folder(out.parent)
        os.rename(draft / ARRAY_FILE, out)
    else:
        written = _written_table if out.suffix.lower() == ".parquet" else _written_folder
        draft = written(shards, kept)
        refuse_existing(out)
        os.rename(draft, out)
    fsync_folder(out.parent)


def _written_array(shards: Shards, kept: int, draft: Path) -> Path:
    """Return a new folder ``draft`` with embeddings.npy and ids.parquet, written a shard at a time."""
    import numpy as np

    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    with (draft / ARRAY_FILE).open("wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (kept, shards.width)}
        np.lib.format.write_array_header_1_0(file, header)
        for number in range(len(shards)):
            vectors, reasons = shards.read(number)
            file.write(vectors[[each is None for each in reasons]].tobytes())
    _write_parts(draft / ID_FILE, (_known(shards, number) for number in range(len(shards))))
    for path in draft.iterdir():
        _flush(path)
    return draft


def _written_folder(shards: Shards, kept: int) -> Path:
    """Return a finished folder with embeddings.npy, ids.parquet and rejected.parquet."""
    draft = _written_array(shards, kept, shards.folder / "draft")
    _write_parts(draft / REJECTED_FILE, (_rejected(shards, number) for number in range(len(shards))))
    _flush(draft / REJECTED_FILE)
    return draft


def _written_table(shards: Shards, kept: int) -> Path:
    """Return a finished table with the embeddings, in which each shard is a group of rows."""
    draft = shards.folder / "draft.parquet"
    _write_parts(draft, (_embedded(shards, number) for number in range(len(shards))))
    _flush(draft)
    return draft


def _known(shards: Shards, number: int) -> pa.Table:
    """Return the files of a shard that have an embedding."""
    return _described(shards, number, [each is None for each in shards.reasons(number)])


def _rejected(shards: Shards, number: int) -> pa.Table:
    """Return the files of a shard that have no embedding, with the reason."""
    import pyarrow as pa

    reasons = shards.reasons(number)
    part = _described(shards, number, [each is not None for each in reasons])
    return part.append_column("reason", pa.array([each for each in reasons if each is not None], pa.string()))


def _embedded(shards: Shards, number: int) -> pa.Table:
    """Return the files of a shard that have an embedding, with it."""
    from grappa.pipeline.commands.embedded_shards import VECTOR, fixed_lists

    vectors, reasons = shards.read(number)
    chosen = [each is None for each in reasons]
    return _described(shards, number, chosen).append_column(VECTOR, fixed_lists(vectors[chosen]))


def _described(shards: Shards, number: int, chosen: list[bool]) -> pa.Table:
    """Return path and domain of the chosen rows of a shard."""
    import pyarrow as pa

    return pa.Table.from_pandas(
        shards.part(number).loc[chosen, COLUMNS], preserve_index=False
    ).replace_schema_metadata()


def _write_parts(file: Path, parts: Iterator[pa.Table]) -> None:
    """Write tables of one schema as Parquet, each that has rows as a group of rows."""
    import pyarrow.parquet as pq

    first = next(parts)
    with pq.ParquetWriter(file, first.schema) as writer:
        writer.write_table(first)
        for part in parts:
            if len(part):
                writer.write_table(part.cast(first.schema))


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
