"""The part of an image that a model sees, cut out and resized by PIL: bicubic or bilinear, antialiased.

No torch is imported here: an exported model is used without it.

Shapes: S image size.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from grappa.core.arrays import Box, Pixels

_RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def eval_crop(
    image: Pixels,
    *,
    image_size: int,
    crop_fraction: float,
    crop_mode: str = "center",
    interpolation: str = "bicubic",
) -> Pixels:
    """Return the part of an image that a model sees: (H, W, 3) uint8 -> (S, S, 3) uint8.

    It is the middle: ``center``: a square of ``crop_fraction`` of the shorter side; ``squash``: that share of either
    side, both stretched to S. Where this has S pixels a side already, it is cut out at whole pixels: at the left of a
    middle between two.
    """
    height, width = image.shape[:2]
    across, down = crop_sides(image, crop_mode, crop_fraction)
    if across == down == image_size:
        left, top = (width - image_size) // 2, (height - image_size) // 2
        return image[top : top + image_size, left : left + image_size]
    box = box_of((width - across) / 2, (height - down) / 2, across, down)
    return np.asarray(resized_part(image, box, image_size, interpolation))


def crop_sides(image: Pixels, crop_mode: str, share: float) -> tuple[float, float]:
    """Return width and height of a crop: a share of the shorter side, or, ``squash``, of each side."""
    height, width = image.shape[:2]
    if crop_mode == "squash":
        return width * share, height * share
    return min(height, width) * share, min(height, width) * share


def box_of(left: float, top: float, across: float, down: float) -> Box:
    """Return the box of a corner, a width and a height."""
    return left, top, left + across, top + down


def frame_of(image: Pixels) -> Box:
    """Return the box of a whole image."""
    return 0.0, 0.0, float(image.shape[1]), float(image.shape[0])


def resized_part(image: Pixels, box: Box, size: int, interpolation: str = "bicubic") -> Image.Image:
    """Resize the part of the image inside ``box`` (pixels, not rounded), cutting rounding errors at the border."""
    height, width = image.shape[:2]
    inside = (max(box[0], 0.0), max(box[1], 0.0), min(box[2], float(width)), min(box[3], float(height)))
    return Image.fromarray(image).resize((size, size), _RESAMPLING[interpolation], box=inside)
