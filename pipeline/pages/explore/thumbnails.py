"""Pictures of the images: small ones from the pixel cache, large ones from the original files, as JPEG."""

from __future__ import annotations

import hashlib
import io
import threading
from collections import OrderedDict
from pathlib import Path

import numpy as np
from PIL import Image

from grappa.images.decoding import ImageDecodeError, decode_image
from grappa.images.pixels import ImageRows

CACHE_BYTES = 64 * 2**20
SMALL_SIDE = 128
LARGE_SIDE = 1280
MAX_FILE_BYTES = 256 * 2**20


class NoPictureError(ValueError):
    """The original file is not there any more, or is another one; the message says it in a sentence."""


class Thumbnails:
    """JPEGs of the decoded images; the ones that were asked for last stay in memory."""

    def __init__(self, pixels: ImageRows, *, cache_bytes: int = CACHE_BYTES) -> None:
        self._pixels, self._limit, self._bytes = pixels, cache_bytes, 0
        self._kept: OrderedDict[tuple[int, bool], bytes] = OrderedDict()
        self._lock = threading.Lock()

    def small(self, row: int) -> bytes:
        """Return the JPEG of an image with a shorter side of at most ``SMALL_SIDE`` pixels."""
        return self._get(row, True)

    def whole(self, row: int) -> bytes:
        """Return the JPEG of an image as it was decoded for training."""
        return self._get(row, False)

    def _get(self, row: int, small: bool) -> bytes:
        with self._lock:
            if (row, small) in self._kept:
                self._kept.move_to_end((row, small))
                return self._kept[row, small]
        try:
            image = Image.fromarray(np.array(self._pixels.image(row)))
        except ValueError as error:  # without a cache: the original is not there any more, or is another one
            raise NoPictureError(str(error)) from error
        if small and min(image.size) > SMALL_SIDE:
            scale = SMALL_SIDE / min(image.size)
            image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BILINEAR)
        data = jpeg(image)
        self._keep((row, small), data)
        return data

    def _keep(self, key: tuple[int, bool], data: bytes) -> None:
        with self._lock:
            self._bytes += len(data) - len(self._kept.pop(key, b""))
            self._kept[key] = data
            while self._bytes > self._limit and len(self._kept) > 1:
                self._bytes -= len(self._kept.popitem(last=False)[1])


def large(file: str, sha256: str, max_pixels: int) -> bytes:
    """Return an original image as a JPEG of at most ``LARGE_SIDE`` pixels a side.

    NoPictureError for a file that is missing, or whose bytes are not those that the run was made from: what is shown
    is an image of the run's table and nothing else.
    """
    data = _read(file)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise NoPictureError(f"{file} is not the file any more from which the run was made")
    try:
        image = Image.fromarray(decode_image(data, max_pixels=max_pixels))
    except ImageDecodeError as error:
        raise NoPictureError(f"{file}: {error}") from error
    image.thumbnail((LARGE_SIDE, LARGE_SIDE))
    return jpeg(image)


def jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=85)
    return buffer.getvalue()


def _read(file: str) -> bytes:
    path = Path(file)
    try:
        if not path.is_file() or path.stat().st_size > MAX_FILE_BYTES:
            raise NoPictureError(f"{file} is not there any more, or is too large to be shown")
        return path.read_bytes()
    except OSError as error:
        raise NoPictureError(f"{file}: {error.strerror}") from error
