"""The object views and background views that a training stage learns from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.context import StageContext
from pipeline.inputs import open_pixels, read_images

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

    from grappa.backgrounds import Backgrounds
    from grappa.pixels import PixelCache


def open_objects(context: StageContext) -> PixelCache:
    """Return the pixel cache of the object views; an image without an accepted box is there as it is."""
    from grappa.pixels import PixelCache

    return PixelCache.open(context.input("objects") / "pixels")


def accepted_boxes(table: pd.DataFrame) -> NDArray[np.float64]:
    """Return the boxes of an objects table, (N, 4) pixels of the originals; NaN where none is accepted."""
    import numpy as np

    from grappa.image_table import BOX_COLUMNS

    return table[list(BOX_COLUMNS)].where(table["accepted"], np.nan).to_numpy(dtype=np.float64)


def open_backgrounds(context: StageContext) -> Backgrounds:
    """Return the background views: of the images whose box is accepted."""
    import numpy as np
    import pandas as pd

    from grappa.backgrounds import Backgrounds

    boxes = accepted_boxes(pd.read_parquet(context.input("objects") / "objects.parquet"))
    sizes = read_images(context.input("images"))[["height", "width"]].to_numpy(dtype=np.int64)
    return Backgrounds(open_pixels(context), boxes, sizes)
