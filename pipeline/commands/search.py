"""`grappa search`: search the index of a run with an image file."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grappa.pipeline.config.schema import Images
from grappa.pipeline.engine.live.additions import INDEX, read_additions
from grappa.pipeline.engine.status import read_config
from grappa.pipeline.engine.verdict_file import made_of
from grappa.pipeline.graph.models import final_node
from grappa.pipeline.graph.node import Node
from grappa.pipeline.store.artifacts import (
    RUN_FILE,
    RunFolder,
    check_same_origin,
    published,
    quoted,
    readable_manifest,
)

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray
    from PIL import Image

    from grappa.backbone.own_module import Maker
    from grappa.model import GrappaModel
    from grappa.search.index import SearchIndex


def load_run_model(run: str | Path, module: Maker | None = None) -> GrappaModel:
    """Return the adapted model of a run as a torch module (``grappa.model.GrappaModel``), in evaluation mode.

    module: the function that makes the backbone, if it is not timm's; None: the one that the run's configuration names.
    """
    from grappa.model import load_model

    folder = RunFolder.open(Path(run))
    return load_model(published(folder, "model"), module or read_config(folder).backbone.module)


def search(run: Path, image: Path, k: int) -> list[dict[str, Any]]:
    """Return the ``k`` most similar images of the collection as it is now, nearest first; the image itself, the same
    bytes, is left out.

    Images that were added are among them once the deployed model has embedded them, removed ones never are. An image
    is a dict of image_id, file (the absolute path), path (relative to its image root), domain and similarity (cosine,
    -1 to 1). The image file is looked at first: what is heavy is loaded for an image that can be searched.
    """
    folder = RunFolder.open(run)
    data = image.read_bytes()
    picture = decoded(data, max_pixels(run), str(image))
    check_deployed(folder)
    images = _images(folder)
    index = _index_now(folder)
    same = set(images.index[images["sha256"] == hashlib.sha256(data).hexdigest()]) & set(index.ids)
    more = min(k + len(same), max(len(index), k))  # k that is larger than the index is the index's own error
    found = zip(*(each[0] for each in index.search(_embedded(load_run_model(run), picture), more)), strict=True)
    nearest = [(image_id, similarity) for image_id, similarity in found if image_id not in same][:k]
    rows = images.loc[[image_id for image_id, _ in nearest]]
    files = _files(folder, rows)
    return [
        {"image_id": i, "file": file, "path": path, "domain": domain, "similarity": float(similarity)}
        for (i, similarity), file, path, domain in zip(nearest, files, rows["path"], rows["domain"], strict=True)
    ]


def _embedded(model: GrappaModel, picture: Image.Image) -> NDArray[np.float32]:
    from grappa.deploy.encoding import forward

    return forward(model, [model.preprocess(picture)])


def _index_now(folder: RunFolder) -> SearchIndex:
    """Return the index with the additions; where it is not up to date that of the run, without the removed images."""
    from grappa.search.index import SearchIndex

    found = read_additions(folder, read_config(folder))
    if found.indexed and found.index.kind == "fresh":
        return SearchIndex.load(published(folder, INDEX))
    return SearchIndex.load(published(folder, "index")).without(found.removed)


def check_deployed(folder: RunFolder) -> str:
    """Return the model that a run's model and index were made of, such as ``fused``.

    ValueError where the index is missing, where they were made of different models, or where what they are made of was
    made again in between.
    """
    model, index = (made_of(folder, name) for name in ("model", "index"))
    if model != index:
        raise ValueError(
            f"the model in {folder.root} is {model}, the index is of {index}; run `grappa run {quoted(folder.root)}`"
        )
    check_same_origin(folder, "index", "images", f"heads/{index}", f"embeddings/{index}", "verdict", "model")
    return index


def indexed_model(folder: RunFolder) -> tuple[str, Node]:
    """Return the deployed model and the node of the embeddings that the index holds; errors of ``check_deployed``."""
    model = check_deployed(folder)
    return model, final_node(read_config(folder), model)


def _images(folder: RunFolder) -> pd.DataFrame:
    """Return the images of the collection as it is now: root (a number), path, domain, sha256, and the file of those
    that were added, by image_id."""
    import pandas as pd

    from grappa.pipeline.engine.live.collection import live_images

    file = published(folder, "images", "images.parquet") / "images.parquet"
    images = pd.read_parquet(file, columns=["image_id", "root", "path", "domain", "sha256"]).set_index("image_id")
    return live_images(folder, read_config(folder), images.assign(file=None))


def _files(folder: RunFolder, rows: pd.DataFrame) -> list[str]:
    """Return the files of images, the absolute paths that open."""
    from grappa.images.paths import image_file

    check_same_origin(folder, "images", "sources")
    sources = readable_manifest(folder, "sources")
    assert sources is not None, "the images were listed before they were decoded"
    roots = sources.provenance["roots"]
    known = zip(rows["file"], rows["root"], rows["path"], strict=True)
    return [image_file(roots[root], path) if file is None else file for file, root, path in known]


def max_pixels(run_or_model: Path) -> int:
    """Return the largest size of an image, in pixels: the run's setting, for an exported model the default."""
    if (run_or_model / RUN_FILE).exists():
        return read_config(RunFolder.open(run_or_model)).images.max_pixels
    return Images().max_pixels


def open_image(path: Path, largest: int) -> Image.Image:
    """Return an image file as a PIL image, RGB and upright; ValueError when it cannot be decoded.

    largest: pixels; an image with more is refused as a decompression bomb.
    """
    return decoded(path.read_bytes(), largest, str(path))


def decoded(data: bytes, largest: int, name: str) -> Image.Image:
    """Return the bytes of an image file as ``open_image`` does; ``name`` begins the sentence of the ValueError."""
    from PIL import Image

    from grappa.images.decoding import ImageDecodeError, decode_image

    try:
        return Image.fromarray(decode_image(data, max_pixels=largest))
    except ImageDecodeError as error:
        raise ValueError(f"{name} cannot be searched with: {error}") from error
