"""An exported ONNX file without torch: its input has the bits of ``GrappaModel.preprocess``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from grappa.deploy.onnx_model import FILE, PREPROCESSING_FILE, embed_image, misfit
from grappa.model import load_model, save_model
from grappa.model_folder import read_record, weights_digest
from tests.helpers.tiny import tiny_backbone, tiny_set


class Echo:
    """A session whose output is its input."""

    def run(self, names: list[str], given: dict[str, Any]) -> list[Any]:
        return [given["images"]]


def test_the_input_has_the_bits_of_torch(tmp_path: Path) -> None:
    save_model(tmp_path, tiny_backbone(), {"student": tiny_set(1)}, None, cache_size=40)
    model, record = load_model(tmp_path), read_record(tmp_path)
    for height, width in ((50, 61), (33, 90), (32, 32)):
        image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        np.testing.assert_array_equal(embed_image(Echo(), record, image), model.preprocess(image)[None].numpy())


def test_a_file_that_cannot_stand_for_the_model_is_told(tmp_path: Path) -> None:
    made_of = {"model.json": "a", "weights.safetensors": "b"}
    (tmp_path / FILE).write_bytes(b"graph")
    assert "does not say what it was made of" in misfit(tmp_path, made_of)
    origin = {"sha256": {FILE: weights_digest(tmp_path / FILE)}, "half": False, "made_of": made_of}

    def note(**changes: object) -> None:
        (tmp_path / PREPROCESSING_FILE).write_text(json.dumps({"file": origin | changes}))

    note()
    assert misfit(tmp_path, made_of) == ""
    assert misfit(tmp_path, made_of | {"model.json": "c"}) == "it was made of another model"
    note(half=True)
    assert misfit(tmp_path, made_of) == "it has numbers of 16 bits"
    note()
    (tmp_path / FILE).write_bytes(b"other")
    assert misfit(tmp_path, made_of) == "model.onnx is not the file that was exported"
