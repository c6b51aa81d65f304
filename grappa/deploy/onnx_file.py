"""A deployed model as an ONNX file, with its preprocessing as JSON beside it; compared with torch before it is kept.

The packages of the extra ``onnx`` are needed: onnx, onnxscript, onnxruntime.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from grappa.core.extras import is_installed, missing_sentence
from grappa.core.printing import sentence
from grappa.deploy.onnx_model import FILE, INPUT, OUTPUT, PREPROCESSING_FILE, session
from grappa.deploy.static import static_form
from grappa.model import GrappaModel
from grappa.model_folder import weights_digest

TOLERANCE = 1e-4  # between ONNX Runtime and torch, of a coordinate of a unit vector
HALF_COSINE = 0.99  # between a file of half precision and the model in float32
_EXTERNAL = 2**30  # bytes of weights from which on they lie beside the graph: a protobuf holds 2 GiB
_BATCHES = (1, 3)


class OnnxError(ValueError):
    """A model that cannot be written as ONNX, or whose file does not give its embeddings."""


def write_onnx(
    model: GrappaModel,
    folder: Path,
    *,
    half: bool = False,
    notes: Mapping[str, Any] | None = None,
    made_of: Mapping[str, str] | None = None,
) -> str:
    """Write ``model.onnx`` and ``preprocessing.json`` into an existing folder; return how well the file agrees.

    The input ``images`` is (batch, 3, S, S) float32, normalised as ``preprocessing.json`` says, for any batch; the
    output ``embeddings`` is (batch, D) float32, L2-normalised.

    Args:
        half: weights and products in float16; the head, the input and the output stay float32.
        notes: what is kept in the file's metadata, as JSON.
        made_of: the sha256 of the model's files, kept beside the preprocessing with that of the ONNX file.

    Raises:
        OnnxError: torch cannot express the model in ONNX, or ONNX Runtime gives other embeddings.
        ModuleNotFoundError: a package of the extra ``onnx`` is missing.
    """
    program = _exported(static_form(model).half() if half else static_form(model))
    if notes:
        program.model.metadata_props["grappa"] = json.dumps(notes)
    program.save(folder / FILE, external_data=_num_bytes(model) > _EXTERNAL)
    written = {path.name: weights_digest(path) for path in sorted(folder.glob(f"{FILE}*"))}
    origin = {"file": {"sha256": written, "half": half, "made_of": dict(made_of or {})}}
    (folder / PREPROCESSING_FILE).write_text(json.dumps(preprocessing(model) | origin, indent=2) + "\n")
    return _compared(model, folder / FILE, half=half)


def preprocessing(model: GrappaModel) -> dict[str, Any]:
    """Return how an image becomes the input, for a program in any language."""
    spec = model.spec
    share = "each side" if spec.crop_mode == "squash" else "the shorter side"
    steps = [
        "decode to RGB, 8 bits a channel, turned upright by EXIF, transparency on white",
        f"if the shorter side is longer than {model.cache_size} pixels, resize it to that: bicubic with antialiasing",
        f"take the middle: {spec.crop_fraction:g} of {share}, resized to {spec.image_size} x {spec.image_size} pixels, "
        f"{spec.interpolation} with antialiasing; of that size already, it is cut at whole pixels, left of a middle",
        "divide by 255, subtract mean, divide by std, by channel; channels first",
    ]
    values = {"cache_size": model.cache_size, **spec.framing, "mean": list(spec.mean), "std": list(spec.std)}
    shapes = {"shape": ["batch", 3, spec.image_size, spec.image_size], "embedding_dim": model.embedding_dim}
    return {"input": INPUT, "output": OUTPUT, **shapes, **values, "steps": steps}


def run(opened: Any, images: Tensor) -> NDArray[np.float32]:
    """Return the embeddings (B, D) of normalised images (B, 3, S, S) by a session."""
    found: NDArray[np.float32] = opened.run([OUTPUT], {INPUT: images.numpy()})[0]
    return found


def _exported(model: GrappaModel) -> Any:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if not is_installed(package):
            raise ModuleNotFoundError(str(missing_sentence(package)), name=package)
    try:
        with _silent(), torch.no_grad():
            return torch.onnx.export(
                model,
                (drawn_images(model, 2),),
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                input_names=[INPUT],
                output_names=[OUTPUT],
                verbose=False,
            )
    except Exception as error:  # the exporter raises many kinds; all mean that it cannot
        reason = sentence(error.__cause__ or error, limit=200)
        raise OnnxError(
            f"torch cannot write {model.spec.name} as ONNX ({type(error).__name__}: {reason}); export it with "
            "--format safetensors"
        ) from error


def drawn_images(model: GrappaModel, number: int) -> Tensor:
    """Return random input, (number, 3, S, S) float32: the same in every call."""
    side = model.spec.image_size
    return torch.randn(number, 3, side, side, generator=torch.Generator().manual_seed(0))


def _compared(model: GrappaModel, file: Path, *, half: bool) -> str:
    """Return how well a file agrees with the model, in words; OnnxError where it does not."""
    opened, largest, least = session(file), 0.0, 1.0
    for number in _BATCHES:
        images = drawn_images(model, number)
        with torch.inference_mode():
            wanted = model(images).numpy()
        found = run(opened, images)
        largest = max(largest, float(np.abs(found - wanted).max()))
        least = min(least, float((found * wanted).sum(axis=1).min()))
    agrees = least >= HALF_COSINE if half else largest <= TOLERANCE
    if not agrees:
        expected = f"a cosine of {HALF_COSINE} or more" if half else f"at most {TOLERANCE:g}"
        raise OnnxError(
            f"ONNX Runtime gives other embeddings than torch: they differ by {largest:.1e}, cosine {least:.4f}; "
            f"expected {expected}; export it {'without --half' if half else 'with --format safetensors'}"
        )
    return f"cosine to float32 at least {least:.5f}" if half else f"differs from torch by {largest:.0e} at most"


def _num_bytes(model: GrappaModel) -> int:
    return sum(each.nbytes for each in (*model.parameters(), *model.buffers()))


@contextmanager
def _silent() -> Iterator[None]:
    """Let the exporter keep its remarks on its own code for itself."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [each.level for each in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for each in loggers:
            each.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for each, level in zip(loggers, levels, strict=True):
                each.setLevel(level)
