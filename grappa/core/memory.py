"""How many bytes steps take at their peak, above what is held before they start.

Counted are the arrays that a step holds; blocks of work are bounded and counted as they are. What embedding and
training take depends on model and batch alone, as they read memory-mapped files; that of all other steps here grows
with the images. Decoding is not stated: its blocks are the shards of the pixel cache.
"""

# N images, D width, K neighbors, k clusters

from __future__ import annotations

from dataclasses import dataclass

FLOAT, INTEGER, DOUBLE, HALF = 4, 8, 8, 2
TEMPERATURE_SAMPLE = 2048
SEARCH_ROWS, SEARCH_COLUMNS = 1024, 16384
SCORE_BLOCK = 2**22
COLUMNS = 12  # of a table of metrics
PIXEL_COPIES = 4  # of a batch, in float32: the next ones, normalised, in patches
BLOCK_COPIES, PASSING_COPIES = 15, 12  # of a token's vector: kept of a block for its gradient; at once without
WORK = 64 * 2**20  # bounded blocks of products and what is made of them
BATCH_WORK, SEARCH_WORK = WORK // 4, WORK // 2  # what is bounded lower: beside a batch; in k-means and neighbours


@dataclass(frozen=True)
class VitShape:
    """What of a vision transformer its need depends on; ``adapted``: the width of all adaptors of a block together."""

    image_size: int
    tokens: int
    width: int
    heads: int
    blocks: int
    adapted: int = 0


def embedding(vit: VitShape, batch_size: int, precision: str) -> int:
    """A batch's pixels, and what one block holds of it at once."""
    kept = vit.tokens * (PASSING_COPIES * vit.width + 2 * vit.heads * vit.tokens + 4 * vit.adapted)
    return batch_size * (_pixels(vit) + kept * _bytes(precision)) + BATCH_WORK


def training(vit: VitShape, batch_size: int, precision: str, num_classes: int = 0) -> int:
    """A batch's pixels, what every block keeps of it for gradients, and the proxies with their moments.

    On explicit attention (see ``Backbone.on``), whose weights are kept too; ``num_classes``: of all targets.
    """
    kept = vit.tokens * (BLOCK_COPIES * vit.width + vit.heads * vit.tokens + 4 * vit.adapted)
    trained = 4 * FLOAT * vit.width * (2 * vit.blocks * vit.adapted + num_classes)
    return trained + batch_size * (_pixels(vit) + vit.blocks * kept * _bytes(precision)) + BATCH_WORK


def _pixels(vit: VitShape) -> int:
    return PIXEL_COPIES * 3 * vit.image_size**2 * FLOAT


def _bytes(precision: str) -> int:
    return HALF if precision == "bfloat16" else FLOAT


def clustering(num_images: int, width: int, num_clusters: int) -> int:
    """The images in the order of their ids, or all in their file; labels and centroids before and after."""
    points = num_images * width * FLOAT
    labels = num_images * (4 * INTEGER + 3 * FLOAT)
    centroids = 5 * num_clusters * width * FLOAT
    candidates = min(2048, num_clusters // 2) ** 2 * (FLOAT + 1)
    return points + labels + centroids + candidates + SEARCH_WORK


def neighbors(num_images: int, num_candidates: int, width: int, num_neighbors: int) -> int:
    """All images, the candidates as given and in bfloat16, the result, and a block of products with its mask."""
    vectors = num_images * width * FLOAT + num_candidates * width * (FLOAT + HALF)
    found = num_images * num_neighbors * (INTEGER + FLOAT)
    rows, columns = min(SEARCH_ROWS, num_images), min(SEARCH_COLUMNS, num_candidates)
    return vectors + found + columns * rows * (FLOAT + 1) + SEARCH_WORK


def evaluation(num_images: int, width: int, num_models: int) -> int:
    """One model's embeddings in their file, as given and in order, every model's two tables, a block of rankings."""
    embeddings = 3 * num_images * width * FLOAT
    tables = 2 * 2 * num_models * num_images * COLUMNS * INTEGER
    return embeddings + tables + min(SCORE_BLOCK, 256 * num_images) * (4 * INTEGER + 3 * FLOAT) + WORK


def head(num_images: int, num_train: int, width: int, num_centroids: int) -> int:
    """All embeddings before and after, the train images as given and clustered, the temperature's sample."""
    sample = 5 * min(TEMPERATURE_SAMPLE, num_train) * num_centroids * DOUBLE
    images = (2 * num_images + num_train) * width * FLOAT
    return images + clustering(num_train, width, num_centroids) + sample + WORK


def index(num_images: int, width: int) -> int:
    """The embeddings in their file, as given and in the index."""
    return 3 * num_images * width * FLOAT + num_images * 16 * INTEGER
