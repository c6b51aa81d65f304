"""Reading one listed file: check that it is still the listed one and decode it, or say why it cannot be used."""

from __future__ import annotations

import errno
import hashlib
import math
import os
import stat
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from grappa.core.arrays import Box
from grappa.core.atomic import too_long
from grappa.images.decoding import METADATA_BYTES, ImageDecodeError, decode_image, shrink
from grappa.images.paths import MISSING, image_file

# More bytes than this cannot be one image within max_pixels: 16-bit RGBA, uncompressed, and generous metadata.
_BYTES_A_PIXEL = 8
# Errors of the file system that concern this one file. Others (no memory, too many open files) end the whole pass.
_UNREADABLE_ERRORS = (errno.EACCES, errno.EPERM, errno.EIO, errno.ENAMETOOLONG, errno.ELOOP)
_MISSING_ERRORS = (errno.ENOENT, errno.ENOTDIR)
ERRORS_OF_THE_FILE = (*_UNREADABLE_ERRORS, *_MISSING_ERRORS)


class ImagesChangedError(ValueError):
    """A listed file is no longer what it was when it was listed; the message names it and says what to do.

    finding: the message without what to do. cure: what to do, where a run is made of the images.
    """

    def __init__(self, finding: str, cure: str = "") -> None:
        super().__init__(f"{finding}; {cure}" if cure else finding)
        self.finding = finding


class RejectedFileError(ValueError):
    """The file cannot be used; the message is the plain reason."""


class UnansweredError(RejectedFileError):
    """The bytes did not come, which may be otherwise the next time: a later pass asks again."""


class ListedFile(NamedTuple):
    """What decoding needs of a listing's row; ``box`` is four NaN where there is none."""

    path: str
    root: int
    domain: str
    box: Box
    size: int


@dataclass(frozen=True)
class DecodedFile:
    """A usable file: pixels (h, w, 3) uint8 at cache size; height, width and clipped box of the oriented original.

    ``notes``: what was decided in decoding it, in words.
    """

    pixels: NDArray[np.uint8]
    sha256: str
    height: int
    width: int
    box: Box
    notes: tuple[str, ...] = ()


def decode_file(listed: ListedFile, root: str, *, cache_size: int, max_pixels: int) -> DecodedFile:
    """Read, check, decode and shrink one listed file.

    Raises:
        RejectedFileError: missing when it was listed, unreadable, not decodable, or a box outside the image.
        ImagesChangedError: the file's size is not the listed one, it has gone, or it has come since.
    """
    data = read_file(image_file(root, listed.path), name=listed.path, size=listed.size, max_pixels=max_pixels)
    return decode_bytes(data, listed.box, cache_size=cache_size, max_pixels=max_pixels)


def decode_bytes(data: bytes, box: Box, *, cache_size: int, max_pixels: int) -> DecodedFile:
    """Decode and shrink the bytes of an image, wherever they come from; ``box`` is four NaN where there is none.

    Raises:
        RejectedFileError: not decodable, or a box outside the image.
    """
    notes: list[str] = []
    try:
        image = decode_image(data, max_pixels=max_pixels, notes=notes)
    except ImageDecodeError as error:
        raise RejectedFileError(str(error)) from error
    height, width = image.shape[:2]
    box = _clip(box, height, width)
    digest = hashlib.sha256(data).hexdigest()
    return DecodedFile(shrink(image, cache_size), digest, height, width, box, tuple(notes))


def read_file(file: str, *, name: str, size: int | None, max_pixels: int) -> bytes:
    """Return the bytes of a local file.

    name: the file in sentences. size: the listed bytes, ``MISSING`` where it was not there; None: not compared.

    Raises:
        RejectedFileError: missing when it was listed, unreadable, or more bytes than ``max_pixels`` can need.
        ImagesChangedError: its size is not the listed one, it has gone, or it has come since.
    """
    try:
        expected = _checked_size(name, os.stat(file), size, max_pixels)
        with open(file, "rb") as opened:
            data = opened.read(expected + 1)
    except OSError as error:
        raise file_error(error, name, size) from error
    if len(data) != expected:
        raise changed(name, expected, f"{len(data)} bytes or more could be read")
    return data


def _checked_size(name: str, status: os.stat_result, size: int | None, max_pixels: int) -> int:
    if not stat.S_ISREG(status.st_mode):
        raise RejectedFileError("not a regular file")
    if size is not None and status.st_size != size:
        raise changed(name, size, f"it has {status.st_size} bytes")
    check_size(status.st_size, max_pixels)
    return status.st_size


def check_size(size: int, max_pixels: int) -> None:
    """Raise RejectedFileError where so many bytes cannot be one image of ``max_pixels``."""
    if size > max_pixels * _BYTES_A_PIXEL + METADATA_BYTES:
        raise RejectedFileError(
            f"{size} bytes are more than an image of {max_pixels} pixels (images.max_pixels) can need"
        )


def file_error(error: OSError, name: str, size: int | None) -> Exception:
    """Return what an error of the file system means for an image; ``name`` and ``size`` are those of ``read_file``."""
    if error.errno in _MISSING_ERRORS:
        return RejectedFileError("missing") if size == MISSING else changed(name, size, "it has gone")
    if error.errno == errno.ENAMETOOLONG:
        return RejectedFileError(f"unreadable: {too_long(error.filename)}")
    if error.errno in _UNREADABLE_ERRORS:
        return RejectedFileError(f"unreadable: {error.strerror}")
    return error


def changed(name: str, size: int | None, found: str) -> ImagesChangedError:
    """Return the error of an image that is not what was listed: ``found`` says what it is now."""
    was = {None: "was there", MISSING: "was missing"}.get(size, f"had {size} bytes")
    return ImagesChangedError(
        f"images changed: {name} {was} when it was listed, now {found}", "run `grappa init` again to list it"
    )


def _clip(box: Box, height: int, width: int) -> Box:
    if math.isnan(box[0]):
        return box
    x0, y0, x1, y1 = max(box[0], 0.0), max(box[1], 0.0), min(box[2], float(width)), min(box[3], float(height))
    if not (x0 < x1 and y0 < y1):
        raise RejectedFileError(f"the box {box} lies outside the image of {width} x {height} pixels")
    return x0, y0, x1, y1
