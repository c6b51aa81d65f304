"""`grappa search`: search the index of a run with an image file."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grappa.images.paths import tell
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
from grappa.pipeline.store.digests import known_digest

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray
    from PIL import Image

    from grappa.backbone.own_module import Maker
    from grappa.model import GrappaModel
    from grappa.search.index import SearchIndex

ONNX_FOLDER = "onnx"  # in a run folder: an export of its model, which `grappa search` then takes


def load_run_model(run: str | Path, module: Maker | None = None) -> GrappaModel:
    """Return the adapted model of a run as a torch module (``grappa.model.GrappaModel``), in evaluation mode.

    module: the function that makes the backbone, if it is not timm's; None: the one that the run's configuration names.
    """
    from grappa.model import load_model

    folder = RunFolder.open(Path(run))
    return load_model(published(folder, "model"), module or read_config(folder).backbone.module)


def search(run: Path, image: Path | str, k: int) -> list[dict[str, Any]]:
    """Return the ``k`` most similar images of the collection as it is now, nearest first, or all where there are
    fewer; the image itself, the same bytes, is left out.

    Images that were added are among them once the deployed model has embedded them, removed ones never are. An image
    is a dict of image_id, file (the absolute path), path (relative to its image root), domain and similarity (cosine,
    -1 to 1). ``image`` is a file, a URL, or ``shard::member``. It is looked at first: what is heavy is loaded for an
    image that can be searched, and torch only where ``onnx_file`` has nothing that embeds as well.
    """
    folder = RunFolder.open(run)
    largest = max_pixels(run)
    if os.path.isdir(image):
        how = f"`grappa embed {quoted(run)} --images {quoted(Path(image))} --out OUT`"
        raise ValueError(f"{tell(image)} is a folder, and one image is searched with; {how} embeds all images of it")
    data = _bytes_of(image, largest)
    picture = decoded(data, largest, tell(image))
    check_deployed(folder)
    images, index = _images(folder), index_now(folder)
    same = _ids_of(images, hashlib.sha256(data).hexdigest()) & set(index.ids)
    more = min(k + len(same), len(index))
    found = zip(*(each[0] for each in index.search(_embedded(folder, picture), more)), strict=True)
    nearest = [(image_id, similarity) for image_id, similarity in found if image_id not in same][:k]
    rows = _rows_of(images, [image_id for image_id, _ in nearest])
    files = _files(folder, rows)
    return [
        {"image_id": i, "file": file, "path": row["path"], "domain": row["domain"], "similarity": float(similarity)}
        for (i, similarity), file, row in zip(nearest, files, rows, strict=True)
    ]


def _bytes_of(image: Path | str, largest: int) -> bytes:
    """Return the bytes of the image that is searched with; a file of its own needs nothing heavy."""
    if os.path.lexists(image):
        return Path(image).read_bytes()
    from grappa.images.originals import read_image

    return read_image(image, max_pixels=largest)


def _embedded(folder: RunFolder, picture: Image.Image) -> NDArray[np.float32]:
    """Return the embedding (1, D) of an image, by ONNX Runtime where the run holds the model as ONNX."""
    model = published(folder, "model")
    if (file := onnx_file(folder)[0]) is not None:
        import numpy as np

        from grappa.deploy.onnx_model import embed_image, session
        from grappa.model_folder import read_record

        return embed_image(session(file), read_record(model), np.asarray(picture))
    from grappa.deploy.encoding import forward

    loaded = load_run_model(folder.root)
    return forward(loaded, [loaded.preprocess(picture)])


def onnx_file(folder: RunFolder) -> tuple[Path | None, str]:
    """Return the ONNX file in ``RUN/onnx`` that embeds as the run's model does, or None; and what is wrong with it.

    `grappa export RUN RUN/onnx --format onnx` writes it. What is wrong is "" where there is no such file.
    """
    from grappa.core.extras import is_installed, missing_sentence

    home, manifest = folder.root / ONNX_FOLDER, readable_manifest(folder, "model")
    if manifest is None or not home.is_dir():
        return None, ""
    if not is_installed("onnxruntime"):
        return None, str(missing_sentence("onnxruntime"))
    from grappa.deploy.onnx_model import FILE, misfit, model_digests

    problem = misfit(home, model_digests(manifest.outputs), known_digest)
    return (None, problem) if problem else (home / FILE, "")


def onnx_notice(run: Path) -> str:
    """Return a sentence where the ONNX file of a run cannot be used; "" where it can, or there is none."""
    folder = RunFolder.open(run)
    problem = onnx_file(folder)[1]
    home = folder.root / ONNX_FOLDER
    return f"{home} is not used ({problem}): remove the folder, or export it again" if problem else ""


def index_now(folder: RunFolder) -> SearchIndex:
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


def _images(folder: RunFolder) -> pa.Table:
    """Return the images of the collection as it is now: image_id, root (a number), path, domain, sha256, and the file
    of those that were added."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = published(folder, "images", "images.parquet") / "images.parquet"
    images = pq.ParquetFile(file).read(columns=["image_id", "root", "path", "domain", "sha256"])
    config = read_config(folder)
    if read_additions(folder, config).indexed:
        from grappa.pipeline.engine.live.collection import live_images

        live = live_images(folder, config, images.to_pandas().set_index("image_id").assign(file=None))
        return pa.Table.from_pandas(live.drop(columns="addition").reset_index(), preserve_index=False)
    return images.append_column("file", pa.nulls(len(images), pa.string()))


def _ids_of(images: pa.Table, digest: str) -> set[str]:
    """Return the ids of the images whose files have this sha256."""
    pairs = zip(images["image_id"].to_pylist(), images["sha256"].to_pylist(), strict=True)
    return {image_id for image_id, found in pairs if found == digest}


def _rows_of(images: pa.Table, ids: list[str]) -> list[dict[str, Any]]:
    """Return the rows of images, in the order of ``ids``."""
    places = {image_id: row for row, image_id in enumerate(images["image_id"].to_pylist())}
    return [images.slice(places[image_id], 1).to_pylist()[0] for image_id in ids]


def _files(folder: RunFolder, rows: list[dict[str, Any]]) -> list[str]:
    """Return the files of images, the absolute paths that open."""
    from grappa.images.paths import image_file

    check_same_origin(folder, "images", "sources")
    sources = readable_manifest(folder, "sources")
    assert sources is not None, "the images were listed before they were decoded"
    roots = sources.provenance["roots"]
    return [image_file(roots[row["root"]], row["path"]) if row["file"] is None else row["file"] for row in rows]


def max_pixels(run_or_model: Path) -> int:
    """Return the largest size of an image, in pixels: the run's setting, for an exported model the default."""
    if (run_or_model / RUN_FILE).exists():
        return read_config(RunFolder.open(run_or_model)).images.max_pixels
    return Images().max_pixels


def decoded(data: bytes, largest: int, name: str) -> Image.Image:
    """Return the bytes of an image file as a PIL image, RGB and upright; ValueError, whose sentence ``name`` begins.

    largest: pixels; an image with more is refused as a decompression bomb.
    """
    from PIL import Image

    from grappa.images.decoding import ImageDecodeError, decode_image

    try:
        return Image.fromarray(decode_image(data, max_pixels=largest))
    except ImageDecodeError as error:
        raise ValueError(f"{name} cannot be searched with: {error}") from error
