"""Grounding DINO through transformers: a tiny one with random weights, loaded as a user's would be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from grappa.objects import grounding
from grappa.objects.grounding import DetectorError, detect, load_detector
from tests.helpers.tiny_detector import needs_transformers, write_detector


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_detector(tmp_path_factory.mktemp("detector"))


def _images() -> list[np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)
    sizes = [(40, 60), (90, 30), (64, 64), (20, 200), (1, 1)]
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


@needs_transformers
def test_the_box_is_the_surest_of_the_detectors_own_post_processing(folder: Path) -> None:
    detector = load_detector(str(folder), "an object. bird.")
    for image in _images()[:4]:
        found = detect(detector, image)
        inputs = detector.processor(images=image, text="an object. bird.", return_tensors="pt")
        with torch.inference_mode():
            outputs = detector.model(**inputs)
        (wanted,) = detector.processor.post_process_grounded_object_detection(
            outputs, inputs.input_ids, threshold=0.0, text_threshold=0.0, target_sizes=[image.shape[:2]]
        )
        best = int(wanted["scores"].argmax())
        height, width = image.shape[:2]
        box = np.clip(wanted["boxes"][best].numpy() / [width, height, width, height], 0, 1)
        np.testing.assert_allclose(found[:4], box, atol=1e-5)
        assert found[4] == pytest.approx(float(wanted["scores"][best]), abs=1e-6)


@needs_transformers
def test_boxes_are_repeatable_inside_the_image_and_may_not_exist(folder: Path) -> None:
    detector = load_detector(str(folder), "Bird.")
    assert detector.prompt == "bird."
    first = [detect(detector, image) for image in _images()]
    again = [detect(load_detector(str(folder), "bird."), image) for image in _images()]
    np.testing.assert_array_equal(first, again)
    assert all(np.isnan(box).all() or (box.min() >= 0 and box.max() <= 1) for box in first)
    with torch.no_grad():
        for name, parameter in detector.model.named_parameters():
            if "bbox_embed" in name:
                parameter.zero_()
                if name.endswith("layers.2.bias"):
                    parameter[:2] = 100.0  # the middle of every box goes to a corner, its sides to nearly nothing
                    parameter[2:] = -100.0
    assert np.isnan(detect(detector, _images()[0])).all()


@needs_transformers
def test_weights_that_are_absent_pickled_or_another_models_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DetectorError, match="cannot be loaded .* set objects.model to a folder"):
        load_detector("someone/no-such-detector", "bird.")
    copy = tmp_path / "pickled"
    copy.mkdir()
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (copy / file.name).write_bytes(file.read_bytes())
    (copy / "pytorch_model.bin").write_bytes(b"a pickle that nobody opens")
    with pytest.raises(DetectorError, match="model.safetensors"):
        load_detector(str(copy), "bird.")
    (copy / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(DetectorError, match="is a bert model and no Grounding DINO"):
        load_detector(str(copy), "bird.")


def test_a_prompt_without_a_full_stop_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(DetectorError, match="objects.prompt is 'bird'; give phrases that end in a full stop"):
        load_detector("anything", "bird")


def test_a_missing_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> Any:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(grounding.importlib, "import_module", fail)
    monkeypatch.setattr(grounding, "import_timm", lambda: None)
    with pytest.raises(DetectorError, match=r"needs the package transformers; install it by `pip install 'grappa-retr"):
        load_detector("anything", "bird.")
