"""Stage ``object_features``: the frozen backbone's L2-normalised class tokens of the object views, (N, D) float32."""

from __future__ import annotations

from grappa.pipeline.engine.context import StageContext
from grappa.pipeline.opening import open_backbone, open_objects
from grappa.pipeline.stages.features import extract


def run(context: StageContext) -> str:
    precision, cache = context.config.features.precision, open_objects(context)
    num_rows, width = extract(context, open_backbone(context), None, "features.npy", precision, cache=cache)
    return f"{num_rows} features of object views, of {width} dimensions"
