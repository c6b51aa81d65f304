"""`grappa add` and `grappa remove`: images that come to a finished run, and images that are taken out of it.

No artifact of the run is changed and nothing becomes stale: what is added lies in ``RUN/additions/``, see
``grappa.pipeline.engine.live.additions``. Each step publishes an artifact whole or not at all, and the next call goes
on with what is missing.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grappa.pipeline.commands.listed import changed_means_again
from grappa.pipeline.commands.search import check_deployed
from grappa.pipeline.config.schema import Config, Images
from grappa.pipeline.engine.live import additions
from grappa.pipeline.engine.live.additions import FOLDER, INDEX, REMOVED, REMOVED_FILE
from grappa.pipeline.engine.packages import refuse_missing_packages
from grappa.pipeline.engine.progress import Progress
from grappa.pipeline.engine.status import read_config
from grappa.pipeline.graph.node import Node
from grappa.pipeline.graph.stages import searched_node
from grappa.pipeline.store.artifacts import (
    SCRATCH_FOLDER,
    RunFolder,
    check_same_origin,
    published,
    quoted,
    readable_manifest,
)
from grappa.pipeline.store.locks import acquire
from grappa.pipeline.store.provenance import provenance
from grappa.pipeline.store.storage import storage_errors
from grappa.pipeline.store.work import Work, open_work, recover

if TYPE_CHECKING:
    import pandas as pd

Say = Callable[[str], None]
ID_DIGITS = 16
MOST_NAMES = 5


def add(run: Path, sources: Sequence[Path | str], *, layout: str | None, progress: Progress, say: Say) -> None:
    """Add images to a run: decode and embed them, give them clusters, let them be found, and say how they drifted.

    ``sources``: those of ``list_images``; without any, what earlier calls left undone is done, and additions whose
    model was made again are embedded again. An image whose bytes the run has already, or has twice among the new ones,
    is passed over. ValueError where the run is not finished, or none of the files can be used.
    """
    folder = RunFolder.open(run, writable=True)
    config = read_config(folder)
    refuse_missing_packages(config, ["index"])
    _check_finished(folder, config)
    with _locked(folder):
        with changed_means_again():
            made = _decode(folder, config, sources, layout, progress, say) if sources else None
        for number in additions.numbers(folder):
            published(folder, additions.pictures(number), "images.parquet", "labels.parquet")
            if additions.state_of(folder, config, number, verify=True).kind != "fresh":
                _embed(folder, config, number, progress, say)
                _say_drift(folder, number, say)
        _index(folder, config, say)
    if sources and made is None:
        say("nothing was added")
    lines = additions.addition_lines(folder)
    if not (sources or lines):
        say("nothing to do: no image was added before; give new ones by --images")
    for line in lines:
        say(line)


def remove(run: Path, names: Sequence[str], *, say: Say) -> None:
    """Take images out of a run: they are found no more. A name is an image id, or a file of the collection.

    The artifacts of the run keep them; to learn without them, take the files away, then `grappa init` and `grappa run`.
    An image that was removed before stays removed. ValueError for an unknown image, and where none would be left;
    nothing is removed then.
    """
    if not names:
        raise ValueError("no image is named; give ids, as `grappa search` prints them, files, or --table FILE")
    folder = RunFolder.open(run, writable=True)
    config = read_config(folder)
    refuse_missing_packages(config, ["index"])
    _check_finished(folder, config)
    with _locked(folder):
        before = additions.removed_ids(folder)
        asked, left = _named_images(folder, names, before)
        if not left:
            raise ValueError(f"these are all images of {folder.root}; at least one must stay, so nothing was removed")
        if asked - before:
            _publish_removed(folder, sorted(before | asked))
        _index(folder, config, say)
    again = f", {_images(len(asked & before))} had been removed before" if asked & before else ""
    new = f"{_images(len(asked - before))} removed" if asked - before else "nothing to remove"
    say(f"{new}{again}; {left} left")


def ids_of_table(table: Path) -> list[str]:
    """Return the column image_id of a table; ValueError where it has none, or cannot be read."""
    import pandas as pd

    kind = table.suffix.lower()
    if kind not in (".csv", ".parquet"):
        raise ValueError(f"{table} is no table: expected a name in .csv or .parquet")
    try:
        found = pd.read_csv(table, dtype=str) if kind == ".csv" else pd.read_parquet(table)
    except FileNotFoundError:
        raise ValueError(f"there is no table {table}") from None
    except (ValueError, OSError) as error:
        raise ValueError(f"{table} cannot be read ({error}); give a .csv or .parquet table") from error
    if "image_id" not in found:
        raise ValueError(f"{table} has no column image_id; found {', '.join(map(str, found.columns))}")
    return [str(each) for each in found["image_id"]]


# ---------------------------------------------------------------- what a run must have


def _check_finished(folder: RunFolder, config: Config) -> None:
    """Refuse a run that lacks an artifact that additions are made with, or whose artifacts do not belong together."""
    names = ["images", "backbone", searched_node(config).name, "neighbors", "model", "index"]
    names += [f"clusters/{name}" for name in additions.assigned_granularities(config)]
    for name in names:
        if readable_manifest(folder, name) is None:
            command = f"grappa run {quoted(folder.root)}"
            raise ValueError(
                f"{name} is missing in {folder.root}, and only a finished run has an index to add to; run `{command}`"
            )
    check_same_origin(folder, *names)
    check_deployed(folder)


@contextmanager
def _locked(folder: RunFolder) -> Iterator[None]:
    """Let one process at a time change the additions of a run."""
    place = folder.root / FOLDER
    with storage_errors(place):
        place.mkdir(exist_ok=True)
    with acquire(place / "lock", what=f"the additions of {folder.root}"):
        known = additions.numbers(folder)
        made = [
            each
            for number in [*known, len(known) + 1]
            for each in (additions.pictures(number), additions.vectors(number))
        ]
        for node in (REMOVED, INDEX, *made):
            recover(folder.artifact(node))
        yield


def _publish(work: Work, started: datetime, **notes: Any) -> None:
    work.publish({**provenance(started=started, device=notes.pop("device", "cpu")), **notes})


# ---------------------------------------------------------------- decoding


def _decode(
    folder: RunFolder, config: Config, sources: Sequence[Path | str], layout: str | None, progress: Progress, say: Say
) -> Node | None:
    """Publish the images of ``sources`` that the run does not have as the next addition; None where there are none."""
    every = _listed(config, sources, layout, say)
    listing = _new_files(folder, every, progress, say)
    if listing.empty:
        return None
    number, started = max(additions.numbers(folder), default=0) + 1, datetime.now(UTC)
    node, roots = additions.pictures(number), list(listing.attrs["roots"])
    digest = hashlib.sha256(listing.to_json().encode() + json.dumps(roots).encode()).hexdigest()
    with open_work(folder.artifact(node), additions.pictures_fingerprint(number, config, digest)) as work:
        if work.finished:
            return node
        images, labels, rejected = _pictures(listing, config, work, node, progress)
        if images.empty:
            shutil.rmtree(work.path)
            _say_unusable(rejected, len(every) - len(listing), say)
            return None
        for name, table in (("images", images), ("labels", labels), ("rejected", rejected)):
            table.to_parquet(work.path / f"{name}.parquet", index=False)
        _publish(work, started, roots=roots, num_images=len(images))
    _say_decoded(node, images, rejected, say)
    return node


def _listed(config: Config, sources: Sequence[Path | str], layout: str | None, say: Say) -> pd.DataFrame:
    """Return the listing of ``sources``, and say how folders were read."""
    from grappa.images.table import list_images

    listing = list_images(list(sources), layout=layout or config.images.layout)
    for root, found in listing.attrs["layouts"].items():
        say(f"{root} is read as {found} (else give --layout)")
    return listing


def _pictures(
    listing: pd.DataFrame, config: Config, work: Work, node: Node, progress: Progress
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Decode the listed files as the run's own; return the tables of images, labels and rejected files."""
    from grappa.images.ingest import decode_all

    settings = config.images
    with progress.task("decoding", len(listing), artifact=node.name) as (advance, _):
        images, labels, rejected = decode_all(
            listing,
            list(listing.attrs["roots"]),
            work.path / "pixels",
            cache=settings.form,
            cache_size=settings.shorter_side,
            max_pixels=settings.max_pixels,
            shard_size=settings.shard_size,
            manifests=work.path / SCRATCH_FOLDER,
            num_workers=config.compute.num_workers or 1,
            progress=advance,
            written=work.written,
        )
    images.attrs = {}
    return images, labels, rejected


def _new_files(folder: RunFolder, listing: pd.DataFrame, progress: Progress, say: Say) -> pd.DataFrame:
    """Return the listed files whose bytes the collection does not have yet, and of copies among them only the first.

    Images that were removed come back. Files that cannot be read are kept: decoding says why.
    """
    import numpy as np

    digests = _digests_of(listing, progress)
    known, removed = _known_ids(folder), additions.removed_ids(folder)
    back = {digest for digest in digests if digest in removed}
    if back:
        _publish_removed(folder, sorted(removed - back))
        say(f"brought back: {_images(len(back))} that had been removed")
    seen: set[str] = set()
    new = []
    for digest in digests:
        new.append(not digest or not (digest in known or digest in seen))
        seen.add(digest)
    passed = len(new) - sum(new) - len(back)
    if passed > 0:
        say(f"{passed} of {len(listing)} files are in the collection already, or copies of others: passed over")
    kept = listing[np.array(new)].reset_index(drop=True)
    kept.attrs = dict(listing.attrs)
    return kept


def _digests_of(listing: pd.DataFrame, progress: Progress) -> list[str]:
    """Return the image id that each listed file would have, "" for a file that cannot be read."""
    from grappa.images.files import RejectedFileError
    from grappa.images.originals import are_plain_files, open_rows
    from grappa.images.table import image_file
    from grappa.pipeline.store.storage import file_digest

    roots, digests = listing.attrs["roots"], []
    read = open_rows(listing, roots, max_pixels=Images().max_pixels)
    files = zip(listing["root"], listing["path"], are_plain_files(listing, roots), strict=True)
    with progress.task("comparing", len(listing), unit="files") as (advance, _):
        for row, (root, path, plain) in enumerate(files):
            try:
                digest = (
                    file_digest(Path(image_file(roots[root], path)))[1]
                    if plain
                    else hashlib.sha256(read(row)).hexdigest()
                )
                digests.append(digest[:ID_DIGITS])
            except (OSError, RejectedFileError):
                digests.append("")
            advance(1)
    return digests


def _known_ids(folder: RunFolder) -> set[str]:
    import pandas as pd

    names = ["images", *(additions.pictures(number).name for number in additions.numbers(folder))]
    tables = (published(folder, name, "images.parquet") / "images.parquet" for name in names)
    return {image_id for table in tables for image_id in pd.read_parquet(table, columns=["image_id"])["image_id"]}


def _say_unusable(rejected: pd.DataFrame, num_passed: int, say: Say) -> None:
    """Say why no new file can be used; ValueError where no file is in the collection already either."""
    first = rejected.iloc[0]
    number = f"none of the {len(rejected)} new files" if len(rejected) > 1 else "the one new file"
    sentence = f"{number} can{'' if len(rejected) > 1 else 'not'} be used; first: {first['path']}: {first['reason']}"
    if not num_passed:
        raise ValueError(sentence)
    say(sentence)


def _say_decoded(node: Node, images: pd.DataFrame, rejected: pd.DataFrame, say: Say) -> None:
    say(f"{node}: {_images(len(images))} of {_domains(images)}, {len(rejected)} rejected")
    for row in rejected.head(MOST_NAMES).itertuples():
        say(f"  rejected: {row.path}: {row.reason}")


# ---------------------------------------------------------------- embedding


def _embed(folder: RunFolder, config: Config, number: int, progress: Progress, say: Say) -> None:
    """Publish what the run's backbone, clusters and deployed model make of an addition's images."""
    from grappa.pipeline.engine.live.embedding import write_vectors

    node, started = additions.vectors(number), datetime.now(UTC)
    artifact = folder.artifact(node)
    again = artifact.home.exists()
    with open_work(artifact, additions.vectors_fingerprint(folder, config, number)) as work:
        if not work.finished:
            device = write_vectors(folder, config, number, work.path, progress)
            _publish(work, started, device=device)
    count = additions.num_images(folder, number)
    say(
        f"{node}: {_images(count)} embedded" + (" again: the model or what it was made of has changed" if again else "")
    )


def _images(number: int) -> str:
    return f"{number} image" if number == 1 else f"{number} images"


def _domains(images: pd.DataFrame) -> str:
    number = images["domain"].nunique()
    return "1 domain" if number == 1 else f"{number} domains"


def _say_drift(folder: RunFolder, number: int, say: Say) -> None:
    found = json.loads((folder.artifact(additions.vectors(number)).home / "drift.json").read_bytes())
    share = found["num_far"] / found["num_images"]
    worth = "adapting again with them is worth it (`grappa init` on the grown folder, `grappa run`)"
    advice = worth if found["worth_adapting"] else "adapting again is not needed for them"
    say(
        f"drift: {found['num_far']} of {_images(found['num_images'])} ({share:.1%}, 95 % interval {found['low']:.1%} "
        f"to {found['high']:.1%}) lie farther from the train images than 99 % of these from each other: {advice}"
    )


# ---------------------------------------------------------------- removing, and the index


def _named_images(folder: RunFolder, names: Sequence[str], removed: frozenset[str]) -> tuple[set[str], int]:
    """Return the ids of the named images, and how many images are left without them."""
    from grappa.pipeline.open_run import open_run

    there = set(open_run(folder.root).images(live=True).index)
    files = _ids_by_file(folder)
    asked: set[str] = set()
    unknown = []
    for name in names:
        found = {name} if name in there or name in removed else files.get(str(Path(name).absolute()), files.get(name))
        known = (found or set()) & there or (found or set()) & removed
        unknown += [] if known else [name]
        asked |= known
    if unknown:
        more = f" (and {len(unknown) - 1} more)" if unknown[1:] else ""
        advice = "so nothing was removed; give ids as `grappa search` prints them, or files"
        raise ValueError(f"there is no image {unknown[0]!r}{more} in {folder.root}, {advice}")
    return asked, len(there - asked)


def _ids_by_file(folder: RunFolder) -> dict[str, set[str]]:
    """Return the ids of all images, removed or not, by their files and by their paths."""
    from grappa.pipeline.engine.live.collection import read_pictures
    from grappa.pipeline.open_run import open_run

    files: dict[str, set[str]] = {}
    added = (read_pictures(folder, number) for number in additions.numbers(folder))
    for table in (open_run(folder.root).images(), *added):
        for column in ("file", "path"):
            for name, image_id in zip(table[column], table.index, strict=True):
                files.setdefault(str(name), set()).add(image_id)
    return files


def _publish_removed(folder: RunFolder, ids: list[str]) -> None:
    started = datetime.now(UTC)
    with open_work(folder.artifact(REMOVED), additions.removed_fingerprint(ids)) as work:
        if not work.finished:
            (work.path / REMOVED_FILE).write_text(json.dumps({"image_ids": ids}, indent=2) + "\n")
            _publish(work, started)


def _index(folder: RunFolder, config: Config, say: Say) -> None:
    """Publish the index of the collection as it is now, where anything was added or removed and it is not fresh."""
    found = additions.read_additions(folder, config, verify=True)
    if not found.indexed or found.index.kind == "fresh":
        return
    from grappa.pipeline.engine.live.indexing import write_index

    started = datetime.now(UTC)
    with open_work(folder.artifact(INDEX), additions.index_fingerprint(folder, found.ready)) as work:
        notes = write_index(folder, config, found, work.path)
        _publish(work, started, **notes)
    exact = "exact" if notes["kind"] == "flat" else f"recall@10 {notes['recall_at_10']:.3f}"
    say(f"{INDEX}: {notes['num_images']} images can be found, {notes['kind']} ({exact})")
