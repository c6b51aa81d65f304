"""Files that hold many images each, tars and Parquet files, here or behind a URL: listed once, then read by image.

A row of such an image has the path ``shard::member``; ``split_shard`` parts it. Its ``offset`` is the byte at which it
begins in a tar, or its row in a Parquet file.
"""

from __future__ import annotations

import os
import re
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Lock
from typing import IO

import pyarrow as pa

from grappa.images.files import ImagesChangedError, UnansweredError, changed, check_size, file_error
from grappa.images.paths import ImageTableError, image_file, tell, unescape_path
from grappa.images.sources import urls
from grappa.images.sources.columns import TEXT, constant
from grappa.images.sources.parquet_shards import ParquetImages, holds_images, list_parquet, open_parquet
from grappa.images.sources.tar_shards import HEADER, SEPARATOR, check_header, list_tar, short

_SHARD = re.compile(rf"(.+?\.(?:tar|parquet)){SEPARATOR}(.*)", re.DOTALL | re.IGNORECASE)
_NUM_THREADS = 8  # that list shards; those behind URLs mostly wait
_OPEN_FILES = 4  # Parquet files that have windows of their images in memory (``parquet_shards``)


def split_shard(path: str) -> tuple[str, str] | None:
    """Return the shard and what lies in it for the path of such an image, None for another path."""
    found = _SHARD.fullmatch(path)
    return (found[1], found[2]) if found else None


def is_tar(name: str) -> bool:
    """Tell whether a shard is a tar."""
    return name.lower().endswith(".tar")


def with_images(root: str, names: Sequence[str]) -> list[str]:
    """Return those of some shards that hold images: tars, and Parquet files with a column of images."""

    def holds(name: str) -> bool:
        if is_tar(name):
            return True
        with _reading(os.path.join(root, name)) as opened:
            return holds_images(open_parquet(opened, name).schema_arrow)

    with ThreadPoolExecutor(_NUM_THREADS, "look") as pool:
        return [name for name, kept in zip(names, pool.map(holds, names), strict=True) if kept]


def list_shards(root: str, names: Sequence[str]) -> list[tuple[pa.Table, Counter[str]]]:
    """List the images of shards below a folder or a URL: for each its rows and what was passed over in it.

    The columns are those of ``list_tar`` and ``list_parquet``, and ``version``.

    Raises:
        ImageTableError: one of them cannot be read, is cut off or broken, or breaks a rule.
    """
    with ThreadPoolExecutor(_NUM_THREADS, "list") as pool:
        return list(pool.map(lambda name: _listed(root, name), names))


def _listed(root: str, name: str) -> tuple[pa.Table, Counter[str]]:
    place = os.path.join(root, name)
    with _reading(place) as opened:
        if not is_tar(name):
            return list_parquet(open_parquet(opened, name), name), Counter()
        rows, passed = list_tar(opened, name)
        version = urls.look_at(place).version if urls.is_url(place) else ""
    return rows.append_column("version", constant(version, len(rows), TEXT)), passed


@contextmanager
def _reading(place: str) -> Iterator[IO[bytes]]:
    """Open a shard to list it. What goes wrong in opening and in reading it is an ImageTableError."""
    try:
        with urls.open_url(place) if urls.is_url(place) else open(place, "rb") as opened:
            yield opened
    except ImageTableError:
        raise
    except urls.NotThereError as error:
        raise ImageTableError(f"no such folder or table: {tell(place)}") from error
    except urls.NoAnswerError as error:
        raise ImageTableError(f"cannot read {tell(place)}: {error}") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        raise ImageTableError(f"cannot read {tell(place)}: {reason or error}") from error


class OpenShards:
    """The shards of some rows, opened when they are needed. Threads may share it."""

    def __init__(self) -> None:
        self._parquets: OrderedDict[str, ParquetImages] = OrderedDict()
        self._same: set[tuple[str, str]] = set()  # tars behind URLs that were found to be the listed ones
        self._lock = Lock()

    def read(self, root: str, path: str, size: int, offset: int, version: str, *, max_pixels: int) -> bytes:
        """Return the bytes of an image that lies in a shard.

        Args:
            root, path: escaped, as in a listing. size: its listed bytes; ``UNKNOWN`` in a Parquet file.
            offset, version: those of ``PLACE_COLUMNS``.

        Raises:
            RejectedFileError, ImagesChangedError: as ``grappa.images.originals.open_rows`` says.
        """
        parts = split_shard(path)
        assert parts is not None, f"{path} has an offset, so that it lies in a shard"
        place = image_file(root, parts[0])
        try:
            if not is_tar(parts[0]):
                data = self._parquet(place, path, version).read(offset)
                check_size(len(data), max_pixels)
                return data
            check_size(size, max_pixels)
            return self._from_tar(place, path, unescape_path(parts[1]), size, offset, version)
        except urls.NotThereError as error:
            raise changed(path, None, "its file has gone") from error
        except urls.NoAnswerError as error:
            raise UnansweredError(str(error)) from error
        except MemoryError:
            raise
        except (OSError, pa.ArrowException) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise file_error(error, path, None) from error
            raise _unreadable(path, error) from error

    def _from_tar(self, place: str, path: str, member: str, size: int, offset: int, version: str) -> bytes:
        start, stop = offset - HEADER, offset + size
        if urls.is_url(place):
            self._check_version(place, path, version)
            found = urls.read_object(place, start, stop)
        else:
            with open(place, "rb") as opened:
                opened.seek(start)
                found = opened.read(stop - start)
        check_header(found[:HEADER], path, member, size)
        if len(found) < stop - start:
            raise short(path, size)
        return found[HEADER:]

    def _check_version(self, place: str, path: str, version: str) -> None:
        if (place, version) not in self._same:
            if urls.look_at(place).version != version:
                raise changed(path, None, "its tar is another one")
            self._same.add((place, version))

    def _parquet(self, place: str, path: str, version: str) -> ParquetImages:
        with self._lock:
            found = self._parquets.get(place)
            if found is None:
                found = _open_images(place, path)
                self._parquets[place] = found
                while len(self._parquets) > _OPEN_FILES:
                    self._parquets.popitem(last=False)
            self._parquets.move_to_end(place)
        if found.version != version:
            raise changed(path, None, "its file is another one")
        return found


def _open_images(place: str, path: str) -> ParquetImages:
    opened = urls.open_url(place) if urls.is_url(place) else open(place, "rb")  # noqa: SIM115 - open as long as it is read
    try:
        return ParquetImages(open_parquet(opened, place), place)
    except ImageTableError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: str, error: Exception) -> ImagesChangedError:
    """Return the error of an image whose file holds what cannot be read."""
    return changed(path, None, f"its file cannot be read ({_line(error)}): get it whole, or leave it out")


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
