"""How many bytes a batch takes at its peak, above what is held before it starts, and the sizes all needs are made of.

The need of a step that grows with the images stands beside that step (``memory_needed`` in ``grappa.search.kmeans``,
``grappa.search.neighbors``, ``grappa.search.index``, ``grappa.method.head`` and ``grappa.metrics.retrieval``). Such a
sum counts the arrays that the step holds at once, and ``WORK`` for its blocks of work, whose size is bounded. Embedding
and training read memory-mapped files: their need depends on the model and the batch only. Decoding states no need: its
blocks are the shards of the pixel cache.
"""

from __future__ import annotations

from dataclasses import dataclass

FLOAT, INTEGER, DOUBLE, HALF = 4, 8, 8, 2  # bytes of a float32, an int64, a float64, a bfloat16
WORK = 64 * 2**20  # bytes of a step's blocks of products, and of what is computed from them
BATCH_WORK = WORK // 4  # the same beside a batch
PIXEL_COPIES = 4  # float32 copies of a batch's pixels: the batches read ahead, normalised pixels, patches
KEPT_COPIES = 15  # vectors of width D that a block keeps of each token until its gradient is computed
PASSING_COPIES = 12  # vectors of width D that a block holds of each token at once where no gradient is asked for


@dataclass(frozen=True)
class VitShape:
    """The sizes of a vision transformer that its need depends on.

    heads: attention heads a block. adapted: the width of all adaptors of a block together.
    """

    image_size: int
    tokens: int
    width: int
    heads: int
    blocks: int
    adapted: int = 0


def embedding(vit: VitShape, batch_size: int, precision: str) -> int:
    """Return the bytes of embedding a batch: its pixels, and what one block holds of it at once."""
    kept = vit.tokens * (PASSING_COPIES * vit.width + 2 * vit.heads * vit.tokens + 4 * vit.adapted)
    return batch_size * (_pixels(vit) + kept * _bytes(precision)) + BATCH_WORK


def training(vit: VitShape, batch_size: int, precision: str, num_classes: int = 0) -> int:
    """Return the bytes of a training step: the batch's pixels, what every block keeps of it for gradients, and the
    trained tensors with their gradients and moments.

    Attention is the explicit one (see ``Backbone.on``), which keeps its weights too. num_classes: proxies of all
    targets together.
    """
    kept = vit.tokens * (KEPT_COPIES * vit.width + vit.heads * vit.tokens + 4 * vit.adapted)
    trained = 4 * FLOAT * vit.width * (2 * vit.blocks * vit.adapted + num_classes)
    return trained + batch_size * (_pixels(vit) + vit.blocks * kept * _bytes(precision)) + BATCH_WORK


def _pixels(vit: VitShape) -> int:
    return PIXEL_COPIES * 3 * vit.image_size**2 * FLOAT


def _bytes(precision: str) -> int:
    return HALF if precision == "bfloat16" else FLOAT
