"""Background views: the images of a pixel cache with their objects painted over."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from grappa.images.pixels import ImageRows
from grappa.objects.boxes import background_view, scaled_box


@dataclass(frozen=True)
class Backgrounds:
    """The background views of a cache's images, made at every access.

    ``boxes``: (N, 4) float64 in pixels of the originals. ``sizes``: (N, 2) height and width of the originals. An image
    whose box holds NaN has no background view and is shown as it is.
    """

    cache: ImageRows
    boxes: NDArray[np.float64]
    sizes: NDArray[np.int64]

    @property
    def known(self) -> NDArray[np.bool_]:
        """Which rows have a background view, (N,)."""
        return np.asarray(np.isfinite(self.boxes).all(axis=1))

    def __len__(self) -> int:
        return len(self.cache)

    def content(self, row: int) -> NDArray[np.uint8]:
        """Return the pixels of the view."""
        return self.image(row)

    def image(self, row: int) -> NDArray[np.uint8]:
        """Return the view of a row, (H, W, 3) uint8."""
        pixels = self.cache.image(row)
        if not np.isfinite(self.boxes[row]).all():
            return pixels
        return background_view(pixels, scaled_box(self.boxes[row], self.sizes[row], pixels.shape[:2]))
