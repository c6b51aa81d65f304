"""An exported ONNX file that embeds images by ONNX Runtime; torch is not imported.

Shapes: D width of an embedding, S side of the model's input.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grappa.core.arrays import Pixels
from grappa.images.decoding import shrink
from grappa.images.framing import eval_crop
from grappa.model_folder import ModelRecord, weights_digest

FILE, PREPROCESSING_FILE = "model.onnx", "preprocessing.json"
INPUT, OUTPUT = "images", "embeddings"


def session(file: Path) -> Any:
    """Return an inference session of ONNX Runtime on the CPU; its threads sleep while they wait."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def embed_image(opened: Any, record: ModelRecord, image: Pixels) -> NDArray[np.float32]:
    """Return the embedding (1, D) of an image (H, W, 3) uint8, by a session of the file that ``record``'s model became.

    The input has the bits that ``grappa.model.GrappaModel.preprocess`` gives; the embedding is within 1e-4 of torch's.
    """
    spec = record.backbone
    crop = eval_crop(shrink(image, record.cache_size), **spec.framing)
    pixels = crop.astype(np.float32).transpose(2, 0, 1)[None] / np.float32(255)
    mean, std = (np.array(each, np.float32).reshape(1, 3, 1, 1) for each in (spec.mean, spec.std))
    found: NDArray[np.float32] = opened.run([OUTPUT], {INPUT: (pixels - mean) / std})[0]
    return found


def model_digests(files: Mapping[str, Any]) -> dict[str, str]:
    """Return the sha256 of the files of a model, from the outputs in its manifest."""
    return {name: files[name]["sha256"] for name in ("model.json", "weights.safetensors")}


def misfit(folder: Path, made_of: Mapping[str, str], digest: Callable[[Path], str] = weights_digest) -> str:
    """Return why the ONNX file in a folder cannot stand for a model in float32; "" where it can.

    made_of: the model's ``model_digests``. digest: gives the sha256 of a file.
    """
    try:
        notes = json.loads((folder / PREPROCESSING_FILE).read_bytes())["file"]
        if notes["half"]:
            return "it has numbers of 16 bits"
        if notes["made_of"] != made_of:
            return "it was made of another model"
        changed = [name for name, known in notes["sha256"].items() if digest(folder / name) != known]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"its {PREPROCESSING_FILE} does not say what it was made of"
    return f"{changed[0]} is not the file that was exported" if changed else ""
