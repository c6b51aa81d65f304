"""The artifact ``sources``: the list of images that `grappa init` publishes; the folders' paths are provenance."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from grappa.pipeline.config.schema import Images
from grappa.pipeline.engine.fingerprints import SOURCES_FILE, SOURCES_FINGERPRINT, read_manifest
from grappa.pipeline.store.artifacts import RunFolder
from grappa.pipeline.store.provenance import provenance
from grappa.pipeline.store.storage import atomic_write_bytes, file_digest
from grappa.pipeline.store.work import open_work, recover

if TYPE_CHECKING:
    import pandas as pd

NO_BOXES = (
    "objects.provider is columns, but no image has a box; give a table with the columns box_x0, box_y0, box_x1 and "
    "box_y1, or set objects.provider=backbone"
)


def list_sources(images: Images) -> pd.DataFrame:
    """Return the listing of ``grappa.images.table.list_images``, split as ``images.protocol`` says.

    ValueError where more files are missing than ``images.max_rejected`` allows: the stage ``images`` would refuse them.
    """
    from grappa.images.closed_set import closed_set
    from grappa.images.table import MISSING, list_images

    pairs = (text.partition("=") for text in images.domains)
    domains = [(name, folder) for name, _, folder in pairs]
    listing = list_images(images.sources, domains=domains, layout=images.layout)
    if (listing["size"] == MISSING).sum() > images.max_rejected * len(listing):
        allowed = f"images.max_rejected allows {images.max_rejected:.0%}"
        raise ValueError(f"{listing.attrs['missing']}; {allowed}: correct the paths, or bring the files")
    return listing if images.protocol == "as_given" else closed_set(listing, images.protocol_seed)


def published_listing(run: RunFolder) -> pd.DataFrame | None:
    """Return the published listing of a run; None where it is missing or a byte of it is damaged."""
    import pandas as pd

    artifact = run.artifact("sources")
    recover(artifact)
    if artifact.check(verify=True):
        return None
    return pd.read_parquet(artifact.home / SOURCES_FILE)


def publish_listing(run: RunFolder, listing: pd.DataFrame, images: Images, former: pd.DataFrame | None) -> None:
    """Publish a listing. If its content equals ``former``, the bytes of the former file stay: nothing becomes stale."""
    manifest, roots = read_manifest(run, "sources"), list(listing.attrs["roots"])
    same = former is not None and _is_same(former, listing)
    origin = {"roots": roots, **images.listed_by}
    if same and manifest and origin.items() <= dict(manifest.provenance).items():
        return
    started = datetime.now(UTC)
    data = (run.artifact("sources").home / SOURCES_FILE).read_bytes() if same else None
    with open_work(run.artifact("sources"), SOURCES_FINGERPRINT) as work:
        if data is None:
            _plain(listing).to_parquet(work.path / SOURCES_FILE, index=False)
        else:
            atomic_write_bytes(work.path / SOURCES_FILE, data)
        work.publish({**provenance(started=started, device="cpu"), **origin})


def _is_same(former: pd.DataFrame, listing: pd.DataFrame) -> bool:
    """Tell whether two listings have the same rows; NaN and None are alike."""
    import pyarrow as pa

    def column(table: pd.DataFrame, name: str) -> pa.Array:
        found = pa.array(table[name], from_pandas=True)
        found = found.combine_chunks() if isinstance(found, pa.ChunkedArray) else found
        return found if pa.types.is_primitive(found.type) else found.cast(pa.large_string())

    if len(former) != len(listing) or list(former.columns) != list(listing.columns):
        return False
    return all(column(former, name).equals(column(listing, name)) for name in listing.columns)


def _plain(listing: pd.DataFrame) -> pd.DataFrame:
    """Return the listing without attributes and with None for missing texts, as it is after writing and reading."""
    import numpy as np
    import pandas as pd

    plain = listing.reset_index(drop=True)
    for name in ("label", "split"):
        values = np.array(plain[name], dtype=object)
        values[pd.isna(values)] = None
        plain[name] = pd.Series(values, dtype="object")
    plain.attrs = {}
    return plain


def changed_files(run: RunFolder) -> list[str]:
    """Return a line for each listed file whose size changed or whose content differs from the decoded one.

    Files below an image root that no longer exists are skipped, and so are images behind URLs.
    """
    import pandas as pd

    from grappa.images.originals import are_plain_files, open_rows
    from grappa.images.table import image_file, unescape_path

    artifact = run.artifact("sources")
    manifest = artifact.manifest()
    assert manifest is not None, "the listing was checked before its files are compared"
    roots = list(manifest.provenance["roots"])
    present = {number for number, root in enumerate(roots) if os.path.isdir(unescape_path(root))}
    table = pd.read_parquet(artifact.home / SOURCES_FILE)
    plain, read = are_plain_files(table, roots), open_rows(table, roots, max_pixels=Images().max_pixels)
    decoded, changed = _decoded_digests(run), []
    for row, (path, root, size) in enumerate(zip(table["path"], table["root"], table["size"], strict=True)):
        known = decoded.get((root, path))
        if root not in present:
            continue
        if not plain[row]:
            changed += _changed_in_shard(path, partial(read, row), known)
            continue
        file = image_file(roots[root], path)
        now = _size(file)
        if now != size:
            changed.append(f"{path}: {now} bytes, listed with {size}")
        elif known and file_digest(Path(file))[1] != known:
            changed.append(f"{path}: other content than was decoded")
    return changed


def _changed_in_shard(path: str, read: Callable[[], bytes], known: str | None) -> list[str]:
    """Return a line where an image in a shard is not what was decoded; ``known``: its digest, None: not decoded."""
    from grappa.images.files import ImagesChangedError, RejectedFileError

    if known is None:
        return []
    try:
        same = hashlib.sha256(read()).hexdigest() == known
    except (ImagesChangedError, RejectedFileError, OSError) as error:
        return [f"{path}: {error}"]
    return [] if same else [f"{path}: other content than was decoded"]


def _decoded_digests(run: RunFolder) -> dict[tuple[int, str], str]:
    """Return the sha256 of each decoded file by (root, path); empty before the stage ``images`` has run."""
    import pyarrow.parquet as pq

    images = run.artifact("images")
    if images.check(read=["images.parquet"]):
        return {}
    table = pq.read_table(images.home / "images.parquet", columns=["path", "root", "sha256"]).to_pydict()
    return dict(zip(zip(table["root"], table["path"], strict=True), table["sha256"], strict=True))


def _size(file: str) -> int:
    try:
        return os.stat(file).st_size
    except OSError:
        return -1
