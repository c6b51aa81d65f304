"""Stage ``index``: the searchable index over the fused embeddings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.context import StageContext
from pipeline.inputs import read_images, test_rows, train_rows

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray


def run(context: StageContext) -> str:
    import numpy as np

    from grappa.index import SearchIndex

    settings, images = context.config.index, read_images(context.input("images"))
    rows = _rows(images, settings.rows)
    embeddings = np.load(context.input("embeddings", "fused") / "embeddings.npy", mmap_mode="r", allow_pickle=False)
    ids = images["image_id"].iloc[rows].tolist()
    SearchIndex.build(np.asarray(embeddings[rows]), ids, ivf_above=settings.ivf_above).save(context.path)
    return f"{len(rows)} images can be found"


def _rows(images: pd.DataFrame, which: str) -> NDArray[np.int64]:
    import numpy as np

    if which == "train":
        return train_rows(images)
    return test_rows(images)[0] if which == "test" else np.arange(len(images))
