"""Stage ``object_features``: the frozen backbone's L2-normalised class tokens of the object views, (N, D) float32."""

from __future__ import annotations

from pipeline.context import StageContext
from pipeline.features import extract
from pipeline.inputs import open_backbone
from pipeline.perception import open_objects


def run(context: StageContext) -> str:
    precision, cache = context.config.features.precision, open_objects(context)
    num_rows, width = extract(context, open_backbone(context), None, "features.npy", precision, cache=cache)
    return f"{num_rows} features of object views, of {width} dimensions"
