"""Stage ``neighbors``: for every image its nearest train images in the frozen feature space, itself excluded."""

from __future__ import annotations

from pipeline.context import StageContext
from pipeline.inputs import read_images, settle_device, train_rows


def run(context: StageContext) -> str:
    import numpy as np

    from grappa.neighbors import nearest_neighbors

    features = np.load(context.input("features") / "features.npy", allow_pickle=False)
    rows = train_rows(read_images(context.input("images")))
    number = min(context.config.neighbors.num_neighbors, len(rows) - 1)
    with context.task("searching", len(features)) as advance:
        neighbors, similarities = nearest_neighbors(
            features,
            features[rows],
            num_neighbors=number,
            query_ids=np.arange(len(features)),
            candidate_ids=rows,
            device=str(settle_device(context)),
            progress=advance,
        )
    np.save(context.path / "neighbors.npy", neighbors, allow_pickle=False)
    np.save(context.path / "similarities.npy", similarities, allow_pickle=False)
    return f"{number} neighbours of {len(features)} images, mean similarity {similarities.mean():.3f}"
