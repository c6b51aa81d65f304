"""Names of backbones are judged as timm does, without timm and torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from grappa.backbone.naming import catalog
from grappa.backbone.naming.catalog import find_weights, list_backbones, name_problem
from grappa.backbone.weights import import_timm


def test_every_name_that_timm_has_passes_but_for_those_that_are_refused() -> None:
    timm = import_timm()
    problems = {name: name_problem(name) for name in [*timm.list_models(), *timm.list_pretrained()]}
    assert not [name for name, problem in problems.items() if problem and "can be no backbone: " not in problem]


def test_a_refused_architecture_is_a_sentence_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "REFUSED", {"resnet50": "it is too old", "swin_tiny_patch4_window7_224": "its blocks"})
    assert name_problem("resnet50.a1_in1k").startswith("'resnet50.a1_in1k' can be no backbone: it is too old; ")
    assert "its blocks" in name_problem("swin_tiny_patch4_window7_224")
    assert not name_problem("swin_small_patch4_window7_224")
    found = {each.name: each.refused for each in list_backbones("resnet50.*")}
    assert found and set(found.values()) == {"it is too old"}


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("vit_tyni_patch16_224", "timm has no model called 'vit_tyni_patch16_224'; did you mean vit_tiny_patch16_224?"),
        ("dino_vits16", "timm has no model called 'dino_vits16'; see `grappa backbones dino`"),
        ("facebook/dinov2-small", "timm has no model called 'facebook/dinov2-small'; see `grappa backbones dinov2`"),
        ("convnextt_tiny", "timm has no model called 'convnextt_tiny'; did you mean convnext_tiny?"),
        ("vit_tiny_patch16_224_in21k", "timm no longer has a model called 'vit_tiny_patch16_224_in21k'; set it to "),
        ("vit_small_patch16_224.dinno", "timm has no weights called 'vit_small_patch16_224.dinno'; there are"),
    ],
)
def test_other_names_are_one_sentence(name: str, problem: str) -> None:
    assert name_problem(name).startswith(problem)


def test_images_with_a_border_are_refused_by_name() -> None:
    assert "framed by border; known are center and squash" in name_problem("deepseek_vit_412m.deepseek_v4_1_flash")
    assert all(each.refused for each in list_backbones("deepseek_vit"))


def test_patterns_are_parts_of_names_or_have_wildcards() -> None:
    assert {each.name for each in list_backbones("dinov2")} == {each.name for each in list_backbones("*DINOv2*")}
    assert [each.name for each in list_backbones("vit_small_patch16_224.d?no")] == ["vit_small_patch16_224.dino"]
    (entry,) = list_backbones("vit_small_patch16_224.dino")
    assert (entry.family, entry.width, entry.image_size) == ("vision_transformer", 384, (224, 224))
    assert list_backbones("vit_small_patch99") == []


def test_weights_in_the_caches_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "none"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    names = ("vit_small_patch16_224.dino", "vit_base_patch16_clip_quickgelu_224.openai", "gcvit_tiny.in1k")
    assert [find_weights(name) for name in names] == [None, None, None]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    files = [
        tmp_path / "models--timm--vit_small_patch16_224.dino/snapshots/abc/model.safetensors",
        tmp_path / "models--timm--vit_base_patch16_clip_224.openai/snapshots/abc/pytorch_model.bin",
        tmp_path / "torch/hub/checkpoints/gcvit_tiny_224_nvidia-ac783954.pth",
    ]
    for file in files:
        file.parent.mkdir(parents=True)
        file.touch()
    assert [find_weights(name) for name in names] == files
    assert [each.weights for each in list_backbones("vit_small_patch16_224.dino")] == files[:1]
    (files[0].parent / "model.safetensors").rename(files[0].parent / "README.md")
    assert find_weights(names[0]) is None and find_weights("vit_small_patch16_224") is None


def test_nothing_slow_is_loaded() -> None:
    code = (
        "import sys; from grappa.backbone.naming.catalog import list_backbones, name_problem; "
        "assert not name_problem('vit_tiny_patch16_224') and len(list_backbones()) > 1000; "
        "assert not {'torch', 'timm', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
