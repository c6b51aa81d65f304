"""`grappa embed`: embed new images with the model of a run or with an exported model."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grappa import load_model
from grappa.core.atomic import fsync_folder
from grappa.pipeline.commands.search import max_pixels
from grappa.pipeline.store.artifacts import RUN_FILE, RunFolder
from grappa.pipeline.store.digests import known_digest
from grappa.pipeline.store.storage import refuse_existing, storage_errors

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor

    from grappa.images.files import ListedFile
    from grappa.model import GrappaModel
    from grappa.pipeline.commands.embedded_shards import Shards

Progress = Callable[[int, int], None]
BATCH = 64
NO_BOX = (float("nan"),) * 4
COLUMNS = ["path", "domain"]


def embed(run_or_model: Path, images: Path, out: Path, progress: Progress | None = None) -> str:
    """Write ``embeddings.npy`` (n, D) float32 and ``ids.parquet`` (its rows: path, domain) into the new folder ``out``;
    where its name ends in .parquet, one table with path, domain and embedding (a list of D float32).

    ``images`` is a folder or a table; files directly in the folder have the domain "". Files that cannot be used are
    listed with the reason in ``rejected.parquet`` of the folder. ``progress`` is called with the number of files done
    and of all files. Returns the result in one sentence; ``out`` appears whole or not at all.

    Threads decode ahead of the model. Finished rows are kept in ``.NAME.partial`` beside ``out``: killed at any moment,
    the same call goes on there and writes the same bytes. Memory does not grow with the embeddings. LockedError where
    another process writes ``out``.
    """
    from grappa.images.originals import refuse_others
    from grappa.images.table import image_file, list_images
    from grappa.pipeline.commands.embedded_shards import Shards, stamps, work_folder

    refuse_existing(out)
    model, listing, largest = load_model(run_or_model), list_images([images], loose_domain=""), max_pixels(run_or_model)
    refuse_others(listing, listing.attrs["roots"], "`grappa embed`")
    roots = listing.attrs["roots"]
    files = (image_file(roots[root], path) for root, path in zip(listing["root"], listing["path"], strict=True))
    listing["stamp"] = stamps(files)
    versions = {name: metadata.version(name) for name in ("torch", "timm")}
    identity = {"model": _model_digests(run_or_model), "batch": BATCH, "max_pixels": largest, "versions": versions}
    with storage_errors(out), work_folder(out) as folder:
        shards = Shards(folder, listing, model.embedding_dim, identity)
        _fill(model, shards, largest, progress or (lambda done, total: None))
        kept, first = _counts(shards)
        if kept:
            draft = (_written_table if out.suffix.lower() == ".parquet" else _written_folder)(shards, kept)
            refuse_existing(out)
            os.rename(draft, out)
            fsync_folder(out.parent)
        shards.remove()
    if not kept:
        raise ValueError(f"none of the {len(listing)} files can be used; first: {listing['path'].iloc[0]}: {first}")
    passed = "".join(f", {words} passed over" for words in listing.attrs["passed_over"])
    rejected = len(listing) - kept
    return f"{kept} embeddings of {shards.width} dimensions, {rejected} files rejected, in {out}{passed}"


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

    missing = [number for number in range(len(shards)) if not shards.is_whole(number)]
    total, waiting = len(shards.listing), iter(missing)
    done = total - sum(len(shards.rows(number)) for number in missing)
    progress(done, total)
    vectors: list[Any] = []
    reasons: list[str | None] = []
    number = next(waiting, None)
    for found in prepared_ahead(_preparation(model, shards, largest), _listed(shards, missing), BATCH):
        usable = np.array([not isinstance(each, str) for each in found])
        rows = np.zeros((len(found), shards.width), np.float32)
        if usable.any():
            rows[usable] = forward(model, [each for each in found if not isinstance(each, str)])
        vectors.append(rows)
        reasons += [each if isinstance(each, str) else None for each in found]
        if number is not None and len(reasons) == len(shards.rows(number)):
            shards.write(number, np.concatenate(vectors), reasons)
            vectors, reasons, number = [], [], next(waiting, None)
        done += len(found)
        progress(done, total)


def _listed(shards: Shards, numbers: list[int]) -> Iterator[ListedFile]:
    """Yield the files of shards, one after the other."""
    from grappa.images.files import ListedFile

    for number in numbers:
        part = shards.part(number)
        for path, root, domain, size in zip(*(part[name] for name in ("path", "root", "domain", "size")), strict=True):
            yield ListedFile(path, int(root), domain, NO_BOX, int(size))


def _preparation(model: GrappaModel, shards: Shards, largest: int) -> Callable[[ListedFile], Tensor | str]:
    """Return the function that gives the model's input of a listed file, or why the file cannot be used."""
    from grappa.deploy.encoding import prepared
    from grappa.images.files import RejectedFileError, decode_file

    roots = shards.listing.attrs["roots"]

    def prepare(listed: ListedFile) -> Tensor | str:
        try:
            decoded = decode_file(listed, roots[listed.root], cache_size=model.cache_size, max_pixels=largest)
        except RejectedFileError as error:
            return str(error)
        return prepared(model, decoded.pixels, largest)

    return prepare


# ---------------------------------------------------------------- publishing


def _counts(shards: Shards) -> tuple[int, str]:
    """Return how many rows have an embedding, and why the first of the others has none."""
    kept, first = 0, ""
    for number in range(len(shards)):
        reasons = shards.reasons(number)
        kept += reasons.count(None)
        first = first or next((each for each in reasons if each is not None), "")
    return kept, first


def _written_folder(shards: Shards, kept: int) -> Path:
    """Return a finished folder with embeddings.npy, ids.parquet and rejected.parquet, written a shard at a time."""
    import numpy as np

    draft = shards.folder / "draft"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    with (draft / "embeddings.npy").open("wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (kept, shards.width)}
        np.lib.format.write_array_header_1_0(file, header)
        for number in range(len(shards)):
            vectors, reasons = shards.read(number)
            file.write(vectors[[each is None for each in reasons]].tobytes())
    _write_parts(draft / "ids.parquet", (_known(shards, number) for number in range(len(shards))))
    _write_parts(draft / "rejected.parquet", (_rejected(shards, number) for number in range(len(shards))))
    for path in draft.iterdir():
        _flush(path)
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
