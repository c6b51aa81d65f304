"""`grappa search` and `grappa export`: search the index of a run with an image file; copy the run's model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grappa.pipeline.config.schema import Images
from grappa.pipeline.engine.live.additions import INDEX, Additions, read_additions
from grappa.pipeline.engine.status import read_config
from grappa.pipeline.engine.verdict_file import made_of
from grappa.pipeline.store.artifacts import (
    RUN_FILE,
    RunFolder,
    check_same_origin,
    published,
    quoted,
)
from grappa.pipeline.store.storage import new_folder, refuse_existing

if TYPE_CHECKING:
    from PIL import Image

    from grappa.backbone.own_module import Maker
    from grappa.model import GrappaModel
    from grappa.search.index import SearchIndex

FILES = ("model.json", "weights.safetensors")


def load_run_model(run: str | Path, module: Maker | None = None) -> GrappaModel:
    """Return the adapted model of a run as a torch module (``grappa.model.GrappaModel``), in evaluation mode.

    module: the function that makes the backbone, if it is not timm's; None: the one that the run's configuration names.
    """
    from grappa.model import load_model

    folder = RunFolder.open(Path(run))
    return load_model(published(folder, "model"), module or read_config(folder).backbone.module)


def search(run: Path, image: Path, k: int) -> list[dict[str, Any]]:
    """Return the ``k`` most similar images of the collection as it is now, nearest first.

    Images that were added are among them once the deployed model has embedded them, removed ones never are. An image
    is a dict of image_id, path (relative to its image root), domain and similarity (cosine, -1 to 1).
    """
    import pandas as pd
    import torch

    from grappa.pipeline.engine.live.collection import live_images

    folder = RunFolder.open(run)
    model = load_run_model(run)
    check_deployed(folder)
    config = read_config(folder)
    index = _index_now(folder, read_additions(folder, config))
    images = pd.read_parquet(published(folder, "images", "images.parquet") / "images.parquet").set_index("image_id")
    images = live_images(folder, config, images)
    with torch.inference_mode():
        query = model(model.preprocess(open_image(image, max_pixels(run))).unsqueeze(0))
    ids, similarities = index.search(query.numpy(), k)
    found = images.loc[list(ids[0]), ["path", "domain"]]
    rows = zip(ids[0], found["path"], found["domain"], similarities[0], strict=True)
    return [{"image_id": i, "path": p, "domain": d, "similarity": float(s)} for i, p, d, s in rows]


def _index_now(folder: RunFolder, found: Additions) -> SearchIndex:
    """Return the index with the additions; where it is not up to date that of the run, without the removed images."""
    from grappa.search.index import SearchIndex

    if found.indexed and found.index.kind == "fresh":
        return SearchIndex.load(published(folder, INDEX))
    return SearchIndex.load(published(folder, "index")).without(found.removed)


def check_deployed(folder: RunFolder) -> str:
    """Return the model that a run's model and index were made of, such as ``fused``.

    ValueError where they were made of different models, or where what they are made of was made again in between.
    """
    model, index = (made_of(folder, name) for name in ("model", "index"))
    if model != index:
        raise ValueError(
            f"the model in {folder.root} is {model}, the index is of {index}; run `grappa run {quoted(folder.root)}`"
        )
    check_same_origin(folder, "index", "images", f"heads/{index}", f"embeddings/{index}", "verdict", "model")
    return index


def max_pixels(run_or_model: Path) -> int:
    """Return the largest size of an image, in pixels: the run's setting, for an exported model the default."""
    if (run_or_model / RUN_FILE).exists():
        return read_config(RunFolder.open(run_or_model)).images.max_pixels
    return Images().max_pixels


def open_image(path: Path, largest: int) -> Image.Image:
    """Return an image file as a PIL image, RGB and upright; ValueError when it cannot be decoded.

    largest: pixels; an image with more is refused as a decompression bomb.
    """
    from PIL import Image

    from grappa.images.decoding import ImageDecodeError, decode_image

    try:
        return Image.fromarray(decode_image(path.read_bytes(), max_pixels=largest))
    except ImageDecodeError as error:
        raise ValueError(f"{path} cannot be searched with: {error}") from error


def export(run: Path, folder: Path) -> str:
    """Copy the model of a run into the new folder ``folder``, whole or not at all; return the result in a sentence."""
    refuse_existing(folder)
    source = published(RunFolder.open(run), "model")
    with new_folder(folder) as draft:
        for name in FILES:
            shutil.copyfile(source / name, draft / name)
    return f"wrote {' and '.join(FILES)} to {folder}; open them with grappa.load_model({str(folder)!r})"
