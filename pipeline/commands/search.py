"""`grappa search`: search the index of a run with an image file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from grappa.pipeline.config.schema import Images
from grappa.pipeline.engine.status import read_config
from grappa.pipeline.engine.verdict_file import chosen_model
from grappa.pipeline.store.artifacts import (
    RUN_FILE,
    RunFolder,
    check_same_origin,
    published,
    quoted,
    readable_manifest,
)

if TYPE_CHECKING:
    from PIL import Image

    from grappa.backbone.own_module import Maker
    from grappa.model import GrappaModel


def load_run_model(run: str | Path, module: Maker | None = None) -> GrappaModel:
    """Return the adapted model of a run as a torch module (``grappa.model.GrappaModel``), in evaluation mode.

    module: the function that makes the backbone, if it is not timm's; None: the one that the run's configuration names.
    """
    from grappa.model import load_model

    folder = RunFolder.open(Path(run))
    return load_model(published(folder, "model"), module or read_config(folder).backbone.module)


def search(run: Path, image: Path, k: int) -> list[dict[str, Any]]:
    """Return the ``k`` most similar images of the index, nearest first.

    An image is a dict of image_id, path (relative to its image root), domain and similarity (cosine, -1 to 1).
    """
    import pandas as pd
    import torch

    from grappa.search.index import SearchIndex

    folder = RunFolder.open(run)
    model = load_run_model(run)
    source = model_in_index(folder)
    check_same_origin(folder, "index", "images", f"heads/{source}", f"embeddings/{source}", "verdict", "model")
    index = SearchIndex.load(published(folder, "index"))
    images = pd.read_parquet(published(folder, "images", "images.parquet") / "images.parquet").set_index("image_id")
    with torch.inference_mode():
        query = model(model.preprocess(open_image(image, max_pixels(run))).unsqueeze(0))
    ids, similarities = index.search(query.numpy(), k)
    found = images.loc[list(ids[0]), ["path", "domain"]]
    rows = zip(ids[0], found["path"], found["domain"], similarities[0], strict=True)
    return [{"image_id": i, "path": p, "domain": d, "similarity": float(s)} for i, p, d, s in rows]


def model_in_index(folder: RunFolder) -> str:
    """Return the model whose embeddings the index holds, such as ``fused``; ValueError where another is deployed."""
    model, index = (deployed_by(folder, name) for name in ("model", "index"))
    if model != index:
        raise ValueError(
            f"the model in {folder.root} is {model}, the index is of {index}; run `grappa run {quoted(folder.root)}`"
        )
    return index


def deployed_by(folder: RunFolder, name: str) -> str:
    """Return the model that an artifact was made of: the one that its inputs name, or the choice of the verdict."""
    published(folder, name)
    manifest = readable_manifest(folder, name)
    assert manifest is not None, f"{name} is published"
    inputs = manifest.fingerprint["inputs"]
    if "verdict" in inputs:
        return chosen_model(folder)
    final = (each.removeprefix("heads/") for each in inputs if each.startswith("heads/"))
    return next(final, "zero_shot")


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
