"""Object perception: which boxes are accepted, and the two views of a box: the object, and the background without it.

DVA (arXiv 2506.16273) looks at a critical object beside the whole image. How the paper finds and frames the object is
not known, so all of this is ours: a box is accepted by its confidence and by its share of the image. The accepted box
is enlarged, a narrow one is widened, and it is cut out; where it reaches beyond the image it shows the image's mean
color.

A box is (x0, y0, x1, y1) in pixels, 0 <= x0 < x1 <= width and the same for y; four NaN: there is none. Pixels are
(H, W, 3) uint8, sizes are (height, width). Shapes: N images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from grappa.core.arrays import Box, Floats, Pixels, Rows
from grappa.core.randomness import uniforms

Window = tuple[int, int, int, int]

ACCEPTED = ""
NO_BOX, UNSURE, SMALL, LARGE = "no box", "low confidence", "too small", "too large"


@dataclass(frozen=True)
class Gate:
    """When a box is accepted: by its confidence and its share of the image's area, all from 0 to 1."""

    min_confidence: float = 0.0
    min_area: float = 0.0
    max_area: float = 1.0


def refusals(boxes: Floats, confidences: Floats, sizes: NDArray[np.int64], gate: Gate) -> NDArray[np.str_]:
    """Return the reason why each box is refused, (N,) text: "no box", "low confidence", "too small", "too large", or ""
    for an accepted box.

    Args:
        boxes: (N, 4); confidences: (N,) in 0-1; sizes: (N, 2) of the images whose pixels the boxes are in.

    Raises:
        ValueError: a box is empty, half given or not inside its image, or a confidence is no number in 0-1.
    """
    missing = np.isnan(boxes).all(axis=1)
    for row in np.flatnonzero(~missing & ~_proper(boxes, sizes)):
        check_box(boxes[row].tolist(), sizes[row].tolist())
    if not ((confidences >= 0) & (confidences <= 1))[~missing].all():
        raise ValueError("a box has a confidence outside 0-1: expected a number from 0 (none) to 1")
    shares = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) / sizes.prod(axis=1)
    unsure, small, large = confidences < gate.min_confidence, shares < gate.min_area, shares > gate.max_area
    found: NDArray[np.str_] = np.select([missing, unsure, small, large], [NO_BOX, UNSURE, SMALL, LARGE], ACCEPTED)
    return found


def _proper(boxes: Floats, sizes: NDArray[np.int64]) -> NDArray[np.bool_]:
    height, width = sizes.T
    x0, y0, x1, y1 = boxes.T
    inside: NDArray[np.bool_] = (x0 >= 0) & (x0 < x1) & (x1 <= width) & (y0 >= 0) & (y0 < y1) & (y1 <= height)
    return inside


def check_box(box: ArrayLike, size: ArrayLike) -> Box:
    """Return the box as four floats; ValueError when it is not a number, empty, or not inside an image of ``size``."""
    values, (height, width) = np.asarray(box, dtype=np.float64), np.asarray(size, dtype=np.int64).tolist()
    x0, y0, x1, y1 = values.tolist()
    if not np.isfinite(values).all():
        raise ValueError(f"the box {(x0, y0, x1, y1)} holds what is no number; give x0, y0, x1, y1 in pixels")
    if not (x0 < x1 and y0 < y1):
        raise ValueError(f"the box {(x0, y0, x1, y1)} is empty; give x0 < x1 and y0 < y1")
    if not (x0 >= 0 and x1 <= width and y0 >= 0 and y1 <= height):
        raise ValueError(
            f"the box {(x0, y0, x1, y1)} is not inside the image of {width} x {height} pixels; clip it, or say which "
            "image's pixels it is in"
        )
    return x0, y0, x1, y1


def scaled_box(box: ArrayLike, size: ArrayLike, other_size: ArrayLike) -> Box:
    """Return a box of an image of ``size`` in the pixels of the same image at ``other_size``, such as the cached one.

    Raises:
        ValueError: the box is not inside the image.
    """
    values = np.array(check_box(box, size))
    (height, width), (other_height, other_width) = np.asarray(size).tolist(), np.asarray(other_size).tolist()
    x0, y0, x1, y1 = (values * np.tile([other_width / width, other_height / height], 2)).tolist()
    return x0, y0, min(x1, float(other_width)), min(y1, float(other_height))


def view_window(box: Box, size: tuple[int, int], *, enlargement: float = 1.1, max_aspect: float = 4 / 3) -> Window:
    """Return the part of the image that the object view shows, in whole pixels.

    The box's sides are multiplied by ``enlargement`` around its middle, but to no more than the image's. Then the
    shorter one grows until the longer is at most ``max_aspect`` times it, beyond the image if need be. The window is
    moved into the image as far as it fits, and lies around its middle where it does not.
    """
    available = np.array([size[1], size[0]], dtype=np.float64)
    sides = np.minimum(np.array([box[2] - box[0], box[3] - box[1]]) * enlargement, available)
    sides = np.maximum(np.maximum(sides, sides.max() / max_aspect).round(), 1)
    start = np.array([box[0] + box[2], box[1] + box[3]]) / 2 - sides / 2
    moved = np.where(sides <= available, np.clip(start, 0, np.maximum(available - sides, 0)), (available - sides) / 2)
    x0, y0 = np.floor(moved + 0.5).astype(int).tolist()
    width, height = sides.astype(int).tolist()
    return x0, y0, x0 + width, y0 + height


def object_view(
    image: Pixels,
    box: ArrayLike,
    *,
    enlargement: float = 1.1,
    max_aspect: float = 4 / 3,
    shorter_side: int | None = None,
) -> Pixels:
    """Return the part of an image around a box as ``view_window`` says, beyond the image in the image's mean color.

    ``shorter_side``: a larger view is shrunk to it, before the color is put around it: a panorama's view stays small.

    Raises:
        ValueError: the box is not inside the image.
    """
    size = (image.shape[0], image.shape[1])
    x0, y0, x1, y1 = view_window(check_box(box, size), size, enlargement=enlargement, max_aspect=max_aspect)
    left, top, right, bottom = max(x0, 0), max(y0, 0), min(x1, size[1]), min(y1, size[0])
    scale = min(1.0, (shorter_side or math.inf) / min(x1 - x0, y1 - y0))
    part = _shrunk(image[top:bottom, left:right], scale)
    height, width = _scaled(y1 - y0, scale), _scaled(x1 - x0, scale)
    if part.shape[:2] == (height, width):
        return part
    view = np.full((height, width, 3), _mean_color(image))
    y, x = (
        min(round((top - y0) * scale), height - part.shape[0]),
        min(round((left - x0) * scale), width - part.shape[1]),
    )
    view[y : y + part.shape[0], x : x + part.shape[1]] = part
    return view


def _shrunk(image: Pixels, scale: float) -> Pixels:
    if scale == 1:
        return image
    size = (_scaled(image.shape[1], scale), _scaled(image.shape[0], scale))
    return np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize(size, Image.Resampling.BICUBIC))


def _scaled(side: int, scale: float) -> int:
    return max(1, round(side * scale))


def background_view(image: Pixels, box: ArrayLike) -> Pixels:
    """Return the image with the box, every pixel that it touches, filled with the image's mean color.

    Raises:
        ValueError: the box is not inside the image.
    """
    x0, y0, x1, y1 = check_box(box, image.shape[:2])
    view = image.copy()
    view[int(np.floor(y0)) : int(np.ceil(y1)), int(np.floor(x0)) : int(np.ceil(x1))] = _mean_color(image)
    return view


def random_boxes(boxes: Floats, sizes: NDArray[np.int64], ids: NDArray[np.uint64], key: int) -> tuple[Floats, Rows]:
    """Return random boxes whose sizes are distributed like those of given boxes: a control for a provider of boxes.

    Image i gets a box at a drawn place. Its sides, as shares of the image's sides, are those of the given box of a
    drawn image; if that image has no box, image i gets none. Both draws depend on ``key`` and ``ids[i]``.

    Args:
        boxes: (N, 4) the given boxes. sizes: (N, 2) of the images. ids: (N,) uint64 numbers of the images.

    Returns:
        (N, 4) boxes, and (N,) the row of the drawn image of each.
    """
    draws = uniforms(key, ids, 3)
    rows = np.minimum((draws[:, 0] * len(boxes)).astype(np.int64), len(boxes) - 1)
    extent, found = sizes[:, ::-1].astype(np.float64), boxes / np.tile(sizes[:, ::-1], 2)
    sides = (found[:, 2:] - found[:, :2])[rows] * extent
    corner = (extent - sides) * draws[:, 1:]
    return np.concatenate([corner, np.minimum(corner + sides, extent)], axis=1), rows


def acceptance(domains: NDArray[np.object_], reasons: NDArray[np.str_]) -> pd.DataFrame:
    """Return how many boxes had each outcome, one row a (domain, outcome): domain, outcome, num_images, share (0-1).

    outcome: "accepted" or a reason of ``refusals``; share: of the domain's images.
    """
    outcome = np.where(reasons == ACCEPTED, "accepted", reasons)
    counts = pd.crosstab(pd.Series(domains, name="domain"), pd.Series(outcome, name="outcome"))
    counts = counts.reindex(columns=["accepted", NO_BOX, UNSURE, SMALL, LARGE], fill_value=0)
    found = counts.reset_index().melt(id_vars="domain", value_name="num_images")
    found["share"] = found["num_images"] / found.groupby("domain")["num_images"].transform("sum")
    return found.sort_values("domain", kind="stable", ignore_index=True)


def _mean_color(image: Pixels) -> NDArray[np.uint8]:
    return image.reshape(-1, 3).mean(axis=0).round().astype(np.uint8)
