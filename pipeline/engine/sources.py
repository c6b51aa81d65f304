"""The artifact ``sources``: the list of images that `grappa init` publishes; the folders' paths are provenance."""

from __future__ import annotations

import os
from datetime import UTC, datetime
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
    domains = [(name, Path(folder)) for name, _, folder in pairs]
    listing = list_images([Path(source) for source in images.sources], domains=domains, layout=images.layout)
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
    same = former is not None and _plain(former).equals(_plain(listing))
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


def _plain(listing: pd.DataFrame) -> pd.DataFrame:
    """Return the listing without attributes and with None for missing texts, as it is after writing and reading."""
    plain = listing.reset_index(drop=True)
    for name in ("label", "split"):
        plain[name] = [value if isinstance(value, str) else None for value in plain[name]]
        plain[name] = plain[name].astype(object).where(plain[name].notna(), None)
    plain.attrs = {}
    return plain


def changed_files(run: RunFolder) -> list[str]:
    """Return a line for each listed file whose size changed or whose content differs from the decoded one.

    Files below an image root that no longer exists are skipped.
    """
    import pyarrow.parquet as pq

    from grappa.images.table import image_file, unescape_path

    artifact = run.artifact("sources")
    manifest = artifact.manifest()
    assert manifest is not None, "the listing was checked before its files are compared"
    roots = list(manifest.provenance["roots"])
    present = {number for number, root in enumerate(roots) if os.path.isdir(unescape_path(root))}
    table = pq.read_table(artifact.home / SOURCES_FILE, columns=["path", "root", "size"]).to_pydict()
    decoded, changed = _decoded_digests(run), []
    for path, root, size in zip(table["path"], table["root"], table["size"], strict=True):
        if root not in present:
            continue
        file = image_file(roots[root], path)
        now, known = _size(file), decoded.get((root, path))
        if now != size:
            changed.append(f"{path}: {now} bytes, listed with {size}")
        elif known and file_digest(Path(file))[1] != known:
            changed.append(f"{path}: other content than was decoded")
    return changed


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
