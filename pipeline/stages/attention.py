"""Stage ``attention``: the granularity attention of every image, (N, L, G) float32, for inspection.

L blocks, and G pseudo-granularities in the order of their numbers; the values of an image and a block sum to 1 over G.
Where the sets adapt outputs, queries and keys, a block attends twice and counts as two blocks. No other stage reads
this artifact; ``grappa.pipeline.open_run`` opens it.
"""

from __future__ import annotations

import math

import numpy as np

from grappa.method.fusion import class_token_attention
from grappa.metrics.attention import entropy
from grappa.pipeline.engine.context import StageContext
from grappa.pipeline.opening import open_backbone, open_fused_sets, open_fusion
from grappa.pipeline.stages.features import extract

FILE = "attention.npy"


def run(context: StageContext) -> str:
    backbone, sets = open_backbone(context), open_fused_sets(context)
    fusion = open_fusion(context, str(context.instance), sets)
    num_images, num_blocks, num_sets = extract(
        context,
        backbone,
        fusion.folded(),
        FILE,
        context.config.embeddings.precision,
        read=class_token_attention,
        row_shape=(len(fusion.layers) + len(fusion.in_context), len(sets)),
    )
    if not context.leads:
        return ""
    what = f"attention of {num_images} images over {num_sets} granularities in {num_blocks} blocks"
    return f"{what}, entropy {_mean_entropy(context):.3f} of {math.log(num_sets):.3f}"


def _mean_entropy(context: StageContext) -> float:
    attention = np.load(context.path / FILE, mmap_mode="r", allow_pickle=False)
    blocks = range(attention.shape[1])
    return float(np.mean([entropy(attention[:, block]).mean() for block in blocks]))
