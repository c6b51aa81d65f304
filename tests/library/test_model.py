"""The deployed model: a folder of two files, equal to the pipeline's embeddings, opened without anything else."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import grappa
from grappa.backbone.features import extract_features
from grappa.backbone.frozen import embed
from grappa.method.fusion import Fusion
from grappa.method.head import fit_neighborhood_head
from grappa.model import ModelError, save_model
from tests.helpers.tiny import tiny_backbone, tiny_cache, tiny_set


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    sets = {f"k0000{i}": tiny_set(i) for i in range(3)}
    path = tmp_path / "model"
    path.mkdir()
    save_model(path, tiny_backbone(), sets, _fusion(), cache_size=40)
    return path


def _fusion() -> Fusion:
    fusion = Fusion([tiny_set(i) for i in range(3)], temperature=0.5)
    fusion.start(query_std=0.3, key_std=0.3, generator=torch.Generator().manual_seed(9))
    return fusion


def test_the_loaded_model_gives_the_trained_models_embeddings(folder: Path) -> None:
    images = torch.randn(4, 3, 32, 32)
    model = grappa.load_model(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["model.json", "weights.safetensors"]
    with torch.no_grad():
        torch.testing.assert_close(model(images), embed(tiny_backbone(), images, _fusion()), rtol=1e-4, atol=1e-5)
    assert model(images).shape == (4, model.embedding_dim)
    torch.testing.assert_close(model(images).norm(dim=1), torch.ones(4))


def test_a_head_is_the_last_step(folder: Path) -> None:
    images, names = torch.randn(4, 3, 32, 32), np.arange(40, dtype=np.uint64)
    train = F.normalize(torch.randn(40, 32), dim=1).numpy()
    head = fit_neighborhood_head(train, names)
    plain = grappa.load_model(folder)
    sets = {f"k0000{i}": tiny_set(i) for i in range(3)}
    save_model(folder, tiny_backbone(), sets, _fusion(), cache_size=40, head=head)
    model = grappa.load_model(folder)
    torch.testing.assert_close(model(images), head(plain(images)), rtol=1e-5, atol=1e-6)
    assert model.head.form() == head.form()


def test_a_student_is_the_backbone_with_one_set_and_no_fusion(folder: Path) -> None:
    images, student = torch.randn(4, 3, 32, 32), tiny_set(5)
    save_model(folder, tiny_backbone(), {"student": student}, None, cache_size=40)
    model = grappa.load_model(folder)
    with torch.no_grad():
        torch.testing.assert_close(model(images), embed(tiny_backbone(), images, student))
    assert sum(each.numel() for each in model.adaptation.parameters()) == sum(e.numel() for e in student.parameters())
    with pytest.raises(ValueError, match="found 2 adaptor sets and no fusion"):
        save_model(folder, tiny_backbone(), {"a": student, "b": student}, None, cache_size=40)


def test_a_model_sees_images_as_the_backbone_asks_for(tmp_path: Path) -> None:
    backbone, cache = tiny_backbone(), tiny_cache(tmp_path / "pixels", 5)  # of 40 x 48 pixels
    backbone.spec = replace(backbone.spec, crop_mode="squash", interpolation="bilinear")
    save_model(tmp_path, backbone, {}, None, cache_size=40)
    model = grappa.load_model(tmp_path)
    assert model.backbone.spec == backbone.spec
    photo = Image.fromarray(np.array(cache.image(0)))
    squashed = np.asarray(photo.resize((32, 32), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(model.crop(np.asarray(photo)).permute(1, 2, 0).numpy(), squashed)
    out = np.empty((5, 32), np.float32)
    extract_features(backbone, cache, out)
    np.testing.assert_allclose(model(model.preprocess(photo)[None])[0].numpy(), out[0], rtol=1e-5, atol=1e-6)
    record = json.loads((tmp_path / "model.json").read_text())
    assert record["backbone"]["crop_mode"] == "squash"


def test_preprocessing_an_image_gives_the_pipelines_embedding(folder: Path, tmp_path: Path) -> None:
    cache, model = tiny_cache(tmp_path / "pixels", 5), grappa.load_model(folder)
    out = np.empty((5, 32), np.float32)
    extract_features(model.backbone, cache, out, adaptation=model.adaptation, batch_size=2)
    inputs = torch.stack([model.preprocess(Image.fromarray(np.array(cache.image(row)))) for row in range(5)])
    torch.testing.assert_close(model(inputs), torch.from_numpy(out), rtol=1e-5, atol=1e-6)


def test_extraction_resumes_at_a_row(tmp_path: Path) -> None:
    cache, backbone = tiny_cache(tmp_path / "pixels", 7), tiny_backbone()
    whole, rest, told = np.empty((7, 32), np.float32), np.zeros((7, 32), np.float32), []
    extract_features(backbone, cache, whole, batch_size=2)
    extract_features(backbone, cache, rest, batch_size=2, start=4, progress=told.append)
    np.testing.assert_array_equal(rest[4:], whole[4:])
    assert not rest[:4].any()
    assert told == [2, 1]


def test_damaged_model_folders_are_refused_in_one_sentence(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has no model.json"):
        grappa.load_model(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"model.json has no model.json"):
        grappa.load_model(folder / "model.json")
    record = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps({**record, "format": 4}))
    with pytest.raises(ModelError, match="has format 4, this version reads 3;"):
        grappa.load_model(folder)
    (folder / "model.json").write_text(json.dumps({**record, "sets": ["k00009"]}))
    with pytest.raises(ModelError, match="disagree"):
        grappa.load_model(folder)
    (folder / "model.json").write_text("{")
    with pytest.raises(ModelError, match="is not JSON"):
        grappa.load_model(folder)
    (folder / "model.json").write_text(json.dumps(record))
    weights = folder / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match="is damaged"):
        grappa.load_model(folder)
    weights.unlink()
    with pytest.raises(ModelError, match=r"has no weights.safetensors"):
        grappa.load_model(folder)


def test_the_adaptation_follows_the_backbone_to_its_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[torch.device] = []
    real = torch.nn.Module.to

    def spy(module: torch.nn.Module, device: torch.device) -> torch.nn.Module:
        moved.append(device)
        return real(module, device)

    monkeypatch.setattr(torch.nn.Module, "to", spy)
    cache, out = tiny_cache(tmp_path / "pixels", 2), np.empty((2, 32), np.float32)
    extract_features(tiny_backbone(), cache, out, adaptation=tiny_set(0))
    assert len(moved) == 2, "the backbone and what adapts it"


@pytest.mark.gpu
def test_a_gpu_gives_the_same_embeddings(tmp_path: Path) -> None:
    cache, on_cpu, on_gpu = (
        tiny_cache(tmp_path / "pixels", 6),
        np.empty((6, 32), np.float32),
        np.empty((6, 32), np.float32),
    )
    extract_features(tiny_backbone(), cache, on_cpu, adaptation=_fusion().folded())
    extract_features(tiny_backbone(), cache, on_gpu, adaptation=_fusion().folded(), device=torch.device("cuda"))
    np.testing.assert_allclose(on_gpu, on_cpu, atol=1e-3)
