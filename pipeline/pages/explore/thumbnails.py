"""Pictures of the images: small ones from the pixel cache, large ones from the originals, as JPEG."""

from __future__ import annotations

import io
import threading
from collections import OrderedDict

import numpy as np
from PIL import Image

from grappa.images.caching.uncached import Originals
from grappa.images.pixels import ImageRows

CACHE_BYTES = 64 * 2**20
SMALL_SIDE = 128
LARGE_SIDE = 1280


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


def large(originals: Originals, row: int) -> bytes:
    """Return an original image as a JPEG of at most ``LARGE_SIDE`` pixels a side, wherever it lies.

    NoPictureError for one that is missing, or whose bytes are not those that the run was made from: what is shown is an
    image of the run's table and nothing else.
    """
    try:
        image = Image.fromarray(originals.full(row))
    except ValueError as error:
        raise NoPictureError(str(error)) from error
    image.thumbnail((LARGE_SIDE, LARGE_SIDE))
    return jpeg(image)


def jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=85)
    return buffer.getvalue()
