"""A deployed model as ONNX: it gives torch's embeddings for any batch, and its JSON says how to prepare an image."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from grappa.deploy import onnx_file
from grappa.deploy.onnx_file import OnnxError, preprocessing, write_onnx
from grappa.model import GrappaModel
from tests.helpers.families import images_of
from tests.library.deploy.test_static import deployed

for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package, reason=f"{package} (extra onnx) is not installed")


@pytest.fixture(scope="module", params=["vision_transformer", "swin_transformer"])
def model(request: pytest.FixtureRequest) -> GrappaModel:
    return deployed(request.param)


def _embeddings(folder: Path, images: torch.Tensor) -> np.ndarray[Any, Any]:
    return onnx_file.run(onnx_file.session(folder / "model.onnx"), images)


def test_the_embeddings_are_those_of_torch_for_any_batch(model: GrappaModel, tmp_path: Path) -> None:
    said = write_onnx(model, tmp_path, notes={"commit": "abc"})
    assert "differs from torch by" in said
    images = images_of(model.spec.image_size, 5)
    for number in (1, 2, 5):
        found = _embeddings(tmp_path, images[:number])
        assert found.shape == (number, model.embedding_dim) and found.dtype == np.float32
        np.testing.assert_allclose(found, model(images[:number]).numpy(), rtol=0, atol=1e-4)
    assert b"commit" in (tmp_path / "model.onnx").read_bytes()


def test_half_is_half_as_large_and_takes_and_gives_float32(tmp_path: Path) -> None:
    model = deployed("vision_transformer")
    (tmp_path / "half").mkdir()
    write_onnx(model, tmp_path)
    assert "cosine to float32 at least" in write_onnx(model, tmp_path / "half", half=True)
    images = images_of(model.spec.image_size, 3)
    found = _embeddings(tmp_path / "half", images)
    assert found.dtype == np.float32
    assert (found * model(images).numpy()).sum(axis=1).min() > 0.99
    assert model.dtype is torch.float32  # the model itself stays as it was


def test_the_preprocessing_can_be_done_elsewhere(model: GrappaModel) -> None:
    found = json.loads(json.dumps(preprocessing(model)))
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8))
    width, height = photo.size
    scale = found["cache_size"] / min(width, height)
    small = photo.resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC)
    side = min(small.size) * found["crop_fraction"]
    left, top = (small.width - side) / 2, (small.height - side) / 2
    size = found["image_size"]
    crop = small.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    pixels = (np.asarray(crop, np.float32) / 255 - found["mean"]) / found["std"]
    np.testing.assert_allclose(pixels.transpose(2, 0, 1), model.preprocess(photo).numpy(), atol=1e-5)
    assert found["crop_mode"] == "center" and found["interpolation"] == "bicubic"


def test_a_file_that_embeds_otherwise_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_file, "run", lambda opened, images: -deployed("vision_transformer")(images).numpy())
    with pytest.raises(OnnxError, match="other embeddings than torch"):
        write_onnx(deployed("vision_transformer"), tmp_path)


def test_what_torch_cannot_express_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise RuntimeError("no such\noperator")

    monkeypatch.setattr(torch.onnx, "export", refuse)
    with pytest.raises(OnnxError, match=r"cannot write .* as ONNX \(RuntimeError: no such operator\)"):
        write_onnx(deployed("vision_transformer"), tmp_path)


def test_a_missing_package_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_file, "is_installed", lambda package: package != "onnxscript")
    with pytest.raises(ModuleNotFoundError, match=r"onnxscript is missing; install it by `pip install '.*\[onnx\]'`"):
        write_onnx(deployed("vision_transformer"), tmp_path)
