"""Whole runs on backbones that are no plain vision transformer: windows of tokens in stages, and convolutions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import grappa
import grappa.model
from grappa.backbone.frozen import build_backbone
from grappa.backbone.spec import BackboneSpec
from tests.helpers.tiny import HALF, draw_images, make_run, run_all, split_of, write_table

BACKBONES = {
    "swin": ("swin_tiny_patch4_window7_224", "{embed_dim: 8, window_size: 4}", {"embed_dim": 8, "window_size": 4}),
    "resnet": ("test_resnet", "{}", {}),
}


@pytest.mark.parametrize("kind", BACKBONES)
def test_a_run_adapts_and_exports_it(kind: str, tmp_path: Path) -> None:
    name, text, options = BACKBONES[kind]
    torch.manual_seed(0)
    backbone = build_backbone(BackboneSpec(name, 32, 1.0, HALF, HALF, options))
    weights = tmp_path / "weights.safetensors"
    save_file(backbone.model.state_dict(), weights)
    images = draw_images(tmp_path / "images", num_images=4)
    table = write_table(images, tmp_path / "table.csv", label=lambda path: path.parent.name, split=split_of)
    changes = {"backbone__name": name, "backbone__options": text, "objects__provider": "backbone"}
    if kind == "swin":
        changes |= {"adaptors__kind": "both", "adaptors__in_context_rank": 2, "fusion__attention_level": "cls"}
    run = make_run(tmp_path / "run", [table], weights, **changes)
    lines = run_all(run)
    assert any("objects" in line for line in lines)
    features = np.load(run.artifact("features").home / "features.npy")
    assert features.shape[1] == backbone.embedding_dim
    model = grappa.load_model(run.root)
    embeddings = model(torch.randn(2, 3, 32, 32))
    assert embeddings.shape == (2, backbone.embedding_dim)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(2))


def test_a_run_adapts_a_module_of_the_users_own(tmp_path: Path) -> None:
    images = draw_images(tmp_path / "images", num_images=3)
    changes = {"backbone__module": "tests.helpers.own_encoder:encoder", "backbone__options": "{}"}
    run = make_run(tmp_path / "run", [images], Path("null"), **changes)
    run_all(run)
    embeddings = grappa.load_model(run.root)(torch.randn(2, 3, 32, 32))
    assert embeddings.shape == (2, 12)
    with pytest.raises(grappa.model.ModelError, match="give that function"):
        grappa.load_model(run.artifact("model").home)
