"""Names of backbones are judged as timm does, without timm and torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

from grappa.backbone.catalog import name_problem
from grappa.backbone.weights import import_timm


def test_every_name_that_timm_has_is_known_and_vits_pass() -> None:
    timm = import_timm()
    unknown = [name for name in timm.list_models() if "no model called" in name_problem(name)]
    assert not unknown
    suitable = [
        name
        for name in timm.list_pretrained()
        if timm.model_entrypoint(name.partition(".")[0]).__module__
        in ("timm.models.vision_transformer", "timm.models.deit", "timm.models.vision_transformer_hybrid")
    ]
    assert len(suitable) > 100
    assert not [name for name in suitable if name_problem(name)]


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


def test_nothing_slow_is_loaded() -> None:
    code = (
        "import sys; from grappa.backbone.catalog import name_problem; "
        "assert not name_problem('vit_tiny_patch16_224'); "
        "assert not {'torch', 'timm'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
