"""`grappa embed`: embed new images with the model of a run or with an exported model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from grappa import load_model
from grappa.pipeline.commands.search import max_pixels
from grappa.pipeline.store.storage import new_folder, refuse_existing

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from grappa.model import GrappaModel

BATCH = 64
NO_BOX = (float("nan"),) * 4


def embed(run_or_model: Path, images: Path, out: Path, progress: Callable[[int, int], None] | None = None) -> str:
    """Write ``embeddings.npy`` (n, D) float32 and ``ids.parquet`` (its rows: path, domain) into the new folder ``out``;
    where its name ends in .parquet, one table with path, domain and embedding (a list of D float32).

    ``images`` is a folder or a table; files directly in the folder have the domain "". Files that cannot be used are
    listed with the reason in ``rejected.parquet`` of the folder. ``progress`` is called with the number of files done
    and of all files. Returns the result in one sentence; ``out`` appears whole or not at all.
    """
    from grappa.images.originals import refuse_others
    from grappa.images.table import list_images

    refuse_existing(out)
    model, listing = load_model(run_or_model), list_images([images], loose_domain="")
    refuse_others(listing, listing.attrs["roots"], "`grappa embed`")
    if out.suffix.lower() == ".parquet":
        with TemporaryDirectory(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent) as place:
            sentence = _write(model, listing, Path(place), progress, largest=max_pixels(run_or_model))
            _write_table(Path(place), out)
    else:
        with new_folder(out) as draft:
            sentence = _write(model, listing, draft, progress, largest=max_pixels(run_or_model))
    passed = "".join(f", {words} passed over" for words in listing.attrs["passed_over"])
    return f"{sentence} in {out}{passed}"


def _write_table(folder: Path, out: Path) -> None:
    """Write what the folder holds as one table."""
    import numpy as np
    import pandas as pd

    from grappa.pipeline.commands.hand_over import write_vectors

    embeddings = np.load(folder / "embeddings.npy", mmap_mode="r", allow_pickle=False)
    write_vectors(out, pd.read_parquet(folder / "ids.parquet"), embeddings)


def _write(
    model: GrappaModel,
    listing: pd.DataFrame,
    folder: Path,
    progress: Callable[[int, int], None] | None,
    *,
    largest: int,
) -> str:
    import numpy as np

    from grappa.deploy.encoding import forward

    kept: list[int] = []
    rejected: dict[int, str] = {}
    parts = [np.empty((0, model.embedding_dim), np.float32)]
    for start in range(0, len(listing), BATCH):
        rows = range(start, min(start + BATCH, len(listing)))
        inputs = dict(_inputs(model, listing, rows, rejected, largest))
        if inputs:
            parts.append(forward(model, list(inputs.values())))
        kept.extend(inputs)
        if progress:
            progress(rows.stop, len(listing))
    if not kept:
        first = listing["path"].iloc[0]
        raise ValueError(f"none of the {len(listing)} files can be used; first: {first}: {rejected[0]}")
    np.save(folder / "embeddings.npy", np.concatenate(parts), allow_pickle=False)
    columns = ["path", "domain"]
    listing.iloc[kept][columns].to_parquet(folder / "ids.parquet", index=False)
    bad = listing.iloc[list(rejected)][columns].assign(reason=list(rejected.values()))
    bad.to_parquet(folder / "rejected.parquet", index=False)
    return f"{len(kept)} embeddings of {model.embedding_dim} dimensions, {len(rejected)} files rejected,"


def _inputs(
    model: GrappaModel, listing: pd.DataFrame, rows: range, rejected: dict[int, str], largest: int
) -> Iterator[tuple[int, Tensor]]:
    from grappa.deploy.encoding import prepared
    from grappa.images.files import ListedFile, RejectedFileError, decode_file

    for row in rows:
        path, number, size = (listing[name].iloc[row] for name in ("path", "root", "size"))
        listed = ListedFile(path, int(number), listing["domain"].iloc[row], NO_BOX, int(size))
        root = listing.attrs["roots"][number]
        try:
            decoded = decode_file(listed, root, cache_size=model.cache_size, max_pixels=largest)
        except RejectedFileError as error:
            rejected[row] = str(error)
        else:
            yield row, prepared(model, decoded.pixels, largest)
