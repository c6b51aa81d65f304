"""Names for the arrays that many modules take, and the part of a dict of tensors below a prefix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")
Rows = NDArray[np.int64]  # row numbers of the image table or of a cache, (n,)
Floats = NDArray[np.float64]
Pixels = NDArray[np.uint8]  # an image, (H, W, 3)
Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels


def below(tensors: Mapping[str, T], prefix: str) -> dict[str, T]:
    """Return the entries whose names begin with ``prefix``, under the rest of their names."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
