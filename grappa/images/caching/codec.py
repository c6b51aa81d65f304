"""Images of a pixel cache as JPEG: a fifth of the disk that their pixels take, and not quite the same pixels.

Quality 95, all three channels at full size (4:4:4). Of photographs a value is then 0.7 of 255 levels away on average
(in the worst of 300 images 1.6), and one in a thousand more than 7; noise and hard edges of saturated color differ
more. An image with a side above what JPEG can hold is kept as PNG, without a loss.
"""

from __future__ import annotations

import io
from typing import NamedTuple

import numpy as np
from PIL import Image

from grappa.core.arrays import Pixels
from grappa.images.decoding import ImageDecodeError, decode_image

QUALITY, FULL_COLOR = 95, 0  # Pillow's number of 4:4:4
LARGEST_SIDE = 65_500  # of a JPEG, as libjpeg allows it


class Encoded(NamedTuple):
    """An image file in memory, and the size of its image in pixels."""

    data: bytes
    height: int
    width: int


def encode(image: Pixels) -> Encoded:
    """Return (H, W, 3) uint8 as JPEG, or as PNG where it is too long for JPEG; the same bytes for the same pixels."""
    height, width = image.shape[:2]
    buffer, picture = io.BytesIO(), Image.fromarray(image)
    if max(height, width) <= LARGEST_SIDE:
        picture.save(buffer, "JPEG", quality=QUALITY, subsampling=FULL_COLOR)
    else:
        picture.save(buffer, "PNG")
    return Encoded(buffer.getvalue(), height, width)


def decode(data: bytes, height: int, width: int) -> Pixels:
    """Return the (height, width, 3) uint8 image of what ``encode`` gave; ValueError where the bytes are damaged."""
    try:
        image = decode_image(data, max_pixels=height * width)
    except ImageDecodeError as error:
        raise ValueError(f"damaged bytes ({error})") from error
    if image.shape[:2] != (height, width):
        raise ValueError(f"{image.shape[0]} x {image.shape[1]} pixels, the index says {height} x {width}")
    return np.asarray(image)
