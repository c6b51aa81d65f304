"""Images behind URLs, by fsspec: bounded in time and in tries, and every failure said in one sentence.

A URL is anything with ``://`` that is not ``file://``. Where credentials, endpoints or proxies are needed, they are
fsspec's own: its configuration files, its environment variables, and what each of its packages (s3fs, gcsfs,
huggingface_hub ...) reads.
"""

from __future__ import annotations

import errno
import io
import os
import re
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import cache
from pathlib import Path
from threading import Lock
from typing import IO, Any, NamedTuple, TypeVar

from grappa.core.extras import is_installed, missing_sentence
from grappa.core.home import expanded
from grappa.images.paths import UNKNOWN, ImageTableError, bare, tell

TIMEOUT = 60.0  # seconds that one answer may take
TRIES = 3
PATIENCE = 32  # failures of one host in a row, after which it is not asked for ``_REST`` seconds
BLOCK_BYTES = 8 * 2**20  # of a file that is read from its beginning to its end
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
# What tells whether an object is still the same, by the names that fsspec's packages have for it; the first one counts.
_VERSIONS = ("ETag", "etag", "e_tag", "blob_id", "md5Hash", "Content-MD5", "Last-Modified", "LastModified", "created")
_GONE = (404, 410)  # answers that say that there is no such object
_REST = 60.0
_PAUSE = 0.5  # seconds before the second try; twice as many before the third

Result = TypeVar("Result")


class NotThereError(Exception):
    """There is no such object."""


class NoAnswerError(Exception):
    """The object did not come, and may come another time; the message is the reason."""


class Remote(NamedTuple):
    """An object: its path below the folder that was listed, its bytes (``UNKNOWN``: not told) and its version ("")."""

    path: str
    size: int
    version: str


def is_url(text: str | Path) -> bool:
    """Tell whether a text names something that only fsspec opens."""
    return isinstance(text, str) and _URL.match(text) is not None and not text.lower().startswith("file://")


def as_source(text: str | Path) -> str | Path:
    """Return a source as it is opened: a URL as text (also one of which a path has eaten a slash), else a path.

    The home folder is put in place of ``~``. ValueError for an empty text: a path would be the working folder.
    """
    found = os.fspath(text)
    if not found:
        raise ValueError("an empty name of images; give a folder, a table, a tar or a URL")
    eaten = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/(?!/)", found)
    if eaten and not os.path.exists(found):
        found = f"{eaten[1]}://{found[eaten.end() :]}"
    if found.lower().startswith("file://"):
        return Path("/" + found[len("file://") :].lstrip("/"))
    return found.rstrip("/") if is_url(found) else Path(expanded(text))


def find_urls(folder: str) -> Iterator[Remote]:
    """Yield the objects below a folder; ImageTableError where it cannot be listed."""
    system, path = _opened(folder)
    found = _or_sentence(folder, lambda: system.find(path, detail=True))
    prefix = path.rstrip("/")
    for name, info in found.items():
        yield Remote(name[len(prefix) :].lstrip("/"), _size(info), _version(info))


def look_at(url: str) -> Remote:
    """Return size and version of one object.

    Raises:
        NotThereError, NoAnswerError.
    """
    system, path = _opened(url)
    info = _tried(url, lambda: system.info(path))
    return Remote("", _size(info), _version(info))


def read_url(url: str) -> bytes:
    """Return a table's bytes; ImageTableError where they cannot be had."""
    system, path = _opened(url)
    data: bytes = _or_sentence(url, lambda: system.cat_file(path))
    return data


def read_object(url: str, start: int | None = None, stop: int | None = None) -> bytes:
    """Return an object's bytes, or those from ``start`` up to ``stop`` (fewer where it ends before).

    Raises:
        NotThereError, NoAnswerError: also where a part was asked for and something else came.
    """
    system, path = _opened(url)
    data: bytes = _tried(url, lambda: system.cat_file(path, start=start, end=stop))
    if start is not None and stop is not None and len(data) > stop - start:
        raise NoAnswerError("the server gives no part of a file: fetch the file, and give its path")
    return data


def open_url(url: str) -> IO[bytes]:
    """Open an object for reading forwards, a block at a time.

    Raises:
        NotThereError, NoAnswerError.
    """
    system, path = _opened(url)
    opened: IO[bytes] = _tried(url, lambda: system.open(path, "rb", block_size=BLOCK_BYTES, cache_type="readahead"))
    return _Steady(url, opened)  # type: ignore[return-value]


class _Steady(io.RawIOBase):
    """An open object whose every read is tried again where that may help; NoAnswerError where nothing comes."""

    def __init__(self, url: str, file: IO[bytes]) -> None:
        self._url, self._file = url, file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def read(self, size: int | None = -1) -> bytes:
        place, number = self._file.tell(), -1 if size is None else size

        def ask() -> bytes:
            self._file.seek(place)
            return self._file.read(number)

        return _tried(self._url, ask)

    def close(self) -> None:
        self._file.close()
        super().close()


# ---------------------------------------------------------------- file systems


def _opened(url: str) -> tuple[Any, str]:
    """Return the file system of a URL, and the URL as this file system names it."""
    protocol = url.partition("://")[0].lower()
    system = _system(protocol)
    try:
        return system, system._strip_protocol(url)
    except Exception as error:  # each package of fsspec has errors of its own
        raise _unreadable(protocol, error) from error


@cache
def _system(protocol: str) -> Any:
    if not is_installed("fsspec"):
        raise ImageTableError(f"{protocol}:// cannot be read: {missing_sentence('fsspec')}")
    import fsspec

    try:
        return fsspec.filesystem(protocol, use_listings_cache=False, **_limits(protocol))
    except ImportError as error:
        package = missing_sentence(error.name) or str(error)
        raise ImageTableError(f"{protocol}:// cannot be read: {package}") from error
    except Exception as error:  # each package of fsspec has errors of its own
        raise _unreadable(protocol, error) from error


def _unreadable(protocol: str, error: Exception) -> ImageTableError:
    why = f"{protocol}:// cannot be read: {_line(error)}"
    return ImageTableError(f"{why}; expected s3, gs, hf, https or another of fsspec's that needs only a URL")


def _limits(protocol: str) -> dict[str, Any]:
    """Return the arguments by which a file system gives up after ``TIMEOUT``."""
    if protocol in ("http", "https"):
        import aiohttp

        return {"client_kwargs": {"timeout": aiohttp.ClientTimeout(total=TIMEOUT)}}
    if protocol in ("s3", "s3a"):
        return {"config_kwargs": {"connect_timeout": TIMEOUT, "read_timeout": TIMEOUT, "retries": {"max_attempts": 1}}}
    return {}


def _size(info: dict[str, Any]) -> int:
    return UNKNOWN if info.get("size") is None else int(info["size"])


def _version(info: dict[str, Any]) -> str:
    found = next((info[name] for name in _VERSIONS if info.get(name)), "")
    return str(found.timestamp() if isinstance(found, datetime) else found).strip('"')


# ---------------------------------------------------------------- tries


class _Hosts:
    """Counts the failures of each host in a row, so that one that is gone costs no further waiting."""

    def __init__(self) -> None:
        self._failures: dict[str, int] = {}
        self._last: dict[str, float] = {}
        self._lock = Lock()

    def gone(self, host: str) -> bool:
        rested = time.monotonic() - self._last.get(host, 0.0) >= _REST
        return self._failures.get(host, 0) >= PATIENCE and not rested

    def count(self, host: str, *, failed: bool) -> None:
        with self._lock:
            self._failures[host] = self._failures.get(host, 0) + 1 if failed else 0
            self._last[host] = time.monotonic()


_hosts = _Hosts()


def _tried(url: str, call: Callable[[], Result]) -> Result:
    """Return what a call gives; it is tried ``TRIES`` times where another try may help."""
    host = "/".join(bare(url).split("/", 3)[:3])
    if _hosts.gone(host):
        raise NoAnswerError(f"{host} was not asked any more after {PATIENCE} failures in a row")
    reason = ""
    for attempt in range(TRIES):
        if attempt:
            time.sleep(_PAUSE * 2 ** (attempt - 1))
        try:
            result = call()
        except Exception as found:  # each package of fsspec has errors of its own
            error = _cause(found)
            if isinstance(error, FileNotFoundError) or getattr(error, "status", None) in _GONE:
                _hosts.count(host, failed=False)
                raise NotThereError("missing") from found
            reason = _reason(error)
            if _is_final(error):
                _hosts.count(host, failed=not _has_answered(error))
                raise NoAnswerError(reason) from error
        else:
            _hosts.count(host, failed=False)
            return result
    _hosts.count(host, failed=True)
    raise NoAnswerError(f"{reason} ({TRIES} tries)")


def _or_sentence(url: str, call: Callable[[], Result]) -> Result:
    try:
        return _tried(url, call)
    except NotThereError as error:
        raise ImageTableError(f"no such folder or table: {tell(url)}") from error
    except NoAnswerError as error:
        raise ImageTableError(f"cannot read {tell(url)}: {error}") from error


def _cause(error: Exception) -> Exception:
    """Return what went wrong: fsspec says "not found" of all that happens while it asks a server about a file."""
    cause = error.__cause__
    return cause if isinstance(error, FileNotFoundError) and isinstance(cause, Exception) else error


def _has_answered(error: Exception) -> bool:
    """Tell whether the host is there: it refused, in its own words."""
    return isinstance(getattr(error, "status", None), int) or isinstance(error, PermissionError)


def _is_final(error: Exception) -> bool:
    """Tell whether another try gives the same: what is not allowed, or asked in a wrong way."""
    status = getattr(error, "status", None)
    refused = isinstance(status, int) and 400 <= status < 500 and status not in (408, 425, 429)
    return refused or isinstance(error, PermissionError | ValueError) or "Credentials" in type(error).__name__


def _reason(error: Exception) -> str:
    """Return in words why an object did not come."""
    status = getattr(error, "status", None)
    if isinstance(error, TimeoutError) or "Timeout" in type(error).__name__:
        return f"no whole answer within {TIMEOUT:.0f} s"
    if status in (401, 403) or isinstance(error, PermissionError) or "Credentials" in type(error).__name__:
        words = f"{status} {getattr(error, 'message', '')}".strip() if isinstance(status, int) else _line(error)
        return f"not allowed ({words}): give credentials as fsspec's package for it reads them"
    if isinstance(status, int):
        return f"the server answered {status}"
    if type(error).__name__ in ("ClientPayloadError", "IncompleteRead", "IncompleteReadError"):
        return "the answer ended before it was whole"
    if isinstance(error, OSError) and error.errno == errno.ECONNREFUSED:
        return "the connection was refused"
    return _line(error)


def _line(error: Exception) -> str:
    text = (str(error).strip().splitlines() or [type(error).__name__])[0][:400]
    return re.sub(r"[A-Za-z][A-Za-z0-9+.-]+://\S+", lambda found: bare(found[0]), text)[:200]
