"""Listed images: what `grappa init` says of them, and what other commands say where they change meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

Say = Callable[[str], None]
MOST_NAMES = 12  # domains that are named in a line
MEANINGS = {
    "domain/class": "DOMAIN/CLASS/image",
    "class": "CLASS/image, one domain",
    "flat": "images of one domain",
    "split/domain/class": "train and test (val is tested too), then DOMAIN/CLASS/image",
    "split/class": "train and test (val is tested too), then CLASS/image, one domain",
    "split/flat": "train and test (val is tested too), then images of one domain",
    "domain/split/class": "DOMAIN, then train and test (val is tested too), then CLASS/image",
}


def say_images(listing: pd.DataFrame, former: pd.DataFrame | None, say: Say) -> None:
    """Say how many images each domain has, how folders were read, what is missing, what was added and removed."""
    sizes = listing["domain"].value_counts().sort_index()
    counts = [f"{domain} {number}" for domain, number in sizes.items()]
    more = [f"and {len(counts) - MOST_NAMES} more"] if len(counts) > MOST_NAMES else []
    domains = f"{len(sizes)} domain{'s' if len(sizes) > 1 else ''}"
    say(f"{len(listing)} images of {domains}, {_said_splits(listing)}: {', '.join(counts[:MOST_NAMES] + more)}")
    for folder, layout in listing.attrs["layouts"].items():
        classes = _num_classes(listing, folder)
        number = f", {classes} class{'es' if classes > 1 else ''}" if classes else ""
        say(f"{folder} is read as {MEANINGS[layout]}{number} (--layout {layout}); else give --layout or --domain")
    if former is not None:
        say(f"{_num_others(listing, former)} images added, {_num_others(former, listing)} removed")
    if listing.attrs["passed_over"]:
        say(f"passed over: {', '.join(listing.attrs['passed_over'])}")
    for warning in _warnings(listing):
        say(f"warning: {warning}")


def _said_splits(listing: pd.DataFrame) -> str:
    """Say how many images are learned from and tested: all but the test images are learned from."""
    unsaid, tested = int(listing["split"].isna().sum()), int((listing["split"] == "test").sum())
    if unsaid == len(listing):
        return "no split"
    without = f" ({unsaid} without a split)" if unsaid else ""
    return f"{len(listing) - tested} train{without} and {tested} test"


@contextmanager
def changed_means_again() -> Iterator[None]:
    """Give the advice of a command that lists its images itself where one of them is not what was listed."""
    from grappa.images.files import ImagesChangedError

    try:
        yield
    except ImagesChangedError as error:
        raise ImagesChangedError(error.finding, "give the same command again, which lists the images anew") from error


def _num_others(listing: pd.DataFrame, known: pd.DataFrame) -> int:
    """Count the different (domain, path) of a listing that another listing does not have."""
    import numpy as np

    return len(np.setdiff1d(_marks(listing), _marks(known)))


def _marks(listing: pd.DataFrame) -> NDArray[np.int64]:
    """Return a number for each (domain, path), (n,), hardly ever the same for two."""
    import numpy as np

    rows = zip(*(chain.from_iterable(_blocks(listing[name])) for name in ("domain", "path")), strict=True)
    return np.fromiter(map(hash, rows), np.int64, len(listing))


def _blocks(texts: pd.Series) -> Iterator[list[str]]:
    """Yield texts as lists, some thousands at a time."""
    import pyarrow as pa

    from grappa.images.sources.columns import blocks

    found = pa.array(texts)
    return blocks(found if isinstance(found, pa.ChunkedArray) else pa.chunked_array([found]))


def _num_classes(listing: pd.DataFrame, folder: str) -> int:
    """Count the classes of a source folder, each in its domain."""
    root = listing.attrs["roots"].index(folder)
    found = listing.loc[listing["root"] == root, ["domain", "label"]].dropna()
    return len(found.drop_duplicates())


def _warnings(listing: pd.DataFrame) -> Iterator[str]:
    if listing.attrs["missing"]:
        yield listing.attrs["missing"]
    sizes = listing["domain"].value_counts().sort_index()
    lone = sizes.index[sizes == 1]
    if len(lone) == 1:
        yield f"domain {lone[0]} has one image only: a query there has nothing to find"
    elif len(lone):
        yield f"{len(lone)} domains have one image only, such as {lone[0]}: a query there has nothing to find"
    yield from _learned_splits(listing)


def _learned_splits(listing: pd.DataFrame) -> Iterator[str]:
    """Warn of images that are learned from although their folder or their domain has the name of a tested split."""
    from grappa.images.folders import is_split, split_of

    learned = listing["split"] != "test"
    given = {root for root, folder in enumerate(listing.attrs["roots"]) if folder[-1:] != "/"}  # else of absolute paths
    paths = listing["path"][learned & listing["root"].isin(given)]
    names = set(listing["domain"][learned].unique())
    for block in _blocks(paths):
        names.update(name for path in block for name in path.split("/", 2)[:-1][:2])
    tested = sorted(name for name in names if is_split(name) and split_of(name) == "test")
    if tested:
        yield (
            f"images of {tested[0]} are learned from; if it is a split, say so by --layout split/class, "
            "split/domain/class or domain/split/class, or by a table with the column split"
        )


def say_lone_classes(listing: pd.DataFrame, say: Say) -> None:
    """Warn of classes with one train image: an adaptor set that is trained on labels learns little from them."""
    learned = listing[listing["label"].notna() & (listing["split"] != "test")]
    sizes = learned.groupby(["domain", "label"]).size()
    lone = sizes.index[sizes == 1]
    if len(lone):
        first = "/".join(lone[0])
        say(
            f"warning: {len(lone)} of {len(sizes)} classes have one train image, such as {first}: little to learn there"
        )
