"""How many bytes a batch takes at its peak, above what is held before it starts, and the sizes all needs are made of.

The need of a step that grows with the images stands beside that step (``memory_needed`` in ``grappa.search.kmeans``,
``grappa.search.two_levels``, ``grappa.search.neighbors``, ``grappa.search.index``, ``grappa.method.head`` and
``grappa.metrics.retrieval``). Such a sum counts the arrays that the step holds at once, and ``WORK`` for its blocks of
work, whose size is bounded. Embedding and training read memory-mapped files: their need depends on the model and the
batch only, and without a pixel cache on the originals that are decoded at once. Decoding states no need: its blocks are
the shards of the pixel cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

FLOAT, INTEGER, DOUBLE, HALF = 4, 8, 8, 2  # bytes of a float32, an int64, a float64, a bfloat16
WORK = 64 * 2**20  # bytes of a step's blocks of products, and of what is computed from them
BATCH_WORK = WORK // 4  # the same beside a batch
PIXEL_COPIES = 4  # float32 copies of a batch's pixels: the batches read ahead, normalised pixels, patches
KEPT_COPIES = 15  # vectors of width D that a block keeps of each token until its gradient is computed
DECODED_BYTES = 12  # of a pixel while an original is decoded: its samples, as RGB, as an array, and shrunk
PASSING_COPIES = 12  # vectors of width D that a block holds of each token at once where no gradient is asked for


class Shape(Protocol):
    """The sizes of a model that its need depends on.

    width: of an embedding. passing: numbers that it holds of an image at once where no gradient is asked for, in a
    precision. kept: the same where one is. trained: numbers of its adaptors.
    """

    @property
    def image_size(self) -> int: ...

    @property
    def width(self) -> int: ...

    def passing(self, precision: str) -> int: ...

    def kept(self, precision: str) -> int: ...

    @property
    def trained(self) -> int: ...


@dataclass(frozen=True)
class MeasuredShape:
    """The sizes of a model as a pass of one image has shown them, equal in any precision: see ``Shape``.

    passed: ``passing``. held: ``kept``.
    """

    image_size: int
    width: int
    passed: int
    held: int
    trained: int

    def passing(self, precision: str) -> int:
        return self.passed

    def kept(self, precision: str) -> int:
        return self.held


@dataclass(frozen=True)
class VitShape:
    """The sizes of a vision transformer that its need depends on.

    heads: attention heads a block. adapted: the width of all adaptors of a block together. Attention is that of a CPU
    (``Backbone.on``): explicit products hold its weights too.
    """

    image_size: int
    tokens: int
    width: int
    heads: int
    blocks: int
    adapted: int = 0

    def passing(self, precision: str) -> int:
        """What one block holds of an image at once."""
        weights = 2 * self._weights(precision)
        return self.tokens * (PASSING_COPIES * self.width + weights + 4 * self.adapted)

    def kept(self, precision: str) -> int:
        """What every block keeps of an image for gradients."""
        of_token = KEPT_COPIES * self.width + self._weights(precision) + 4 * self.adapted
        return self.blocks * self.tokens * of_token

    def _weights(self, precision: str) -> int:
        return 0 if precision == "float32" else self.heads * self.tokens

    @property
    def trained(self) -> int:
        """The numbers of all adaptors."""
        return self.width * 2 * self.blocks * self.adapted


def embedding(shape: Shape, batch_size: int, precision: str) -> int:
    """Return the bytes of embedding a batch: its pixels, and what is held of it at once."""
    return batch_size * (_pixels(shape) + shape.passing(precision) * _bytes(precision)) + BATCH_WORK


def training(shape: Shape, batch_size: int, precision: str, num_classes: int = 0) -> int:
    """Return the bytes of a training step: the batch's pixels, what is kept of it for gradients, and the trained
    tensors with their gradients and moments.

    num_classes: proxies of all targets together, of several processes those that each of them holds.
    """
    trained = 4 * FLOAT * (shape.trained + shape.width * num_classes)
    return trained + batch_size * (_pixels(shape) + shape.kept(precision) * _bytes(precision)) + BATCH_WORK


def originals(largest: int, num_workers: int) -> int:
    """Return the bytes of the originals that threads decode at once, without a pixel cache.

    largest: pixels of the largest original.
    """
    return num_workers * DECODED_BYTES * largest


def _pixels(shape: Shape) -> int:
    return PIXEL_COPIES * 3 * shape.image_size**2 * FLOAT


def _bytes(precision: str) -> int:
    return HALF if precision == "bfloat16" else FLOAT
