"""The settings of the stages that learn reach the library: every option of it is the section's field of that name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from grappa.images.transforms import Augmentation
from grappa.method.adaptor_training import AdaptorLoss
from grappa.method.fusion_training import PropagationLoss
from grappa.method.student import Transfer
from grappa.pipeline import learning
from grappa.pipeline.config.section import Section
from grappa.pipeline.config.trainings import Adaptors, Augmented, Fusion, Student
from grappa.pipeline.learning import augmentation, open_views, optimization, sizes_of_set
from grappa.pipeline.stages.adaptors import adaptor_loss
from grappa.pipeline.stages.fusion import propagation_loss
from grappa.pipeline.stages.student import transfer
from grappa.training.loop import Optimization
from tests.helpers.tiny import tiny_backbone, tiny_cache

ADAPTORS = Adaptors(
    num_epochs=7, batch_size=9, learning_rate=0.3, weight_decay=0.4, warmup=0.25, min_crop=0.7, flip=0.1,
    brightness=0.11, contrast=0.12, saturation=0.13, grayscale=0.14, temperature=0.15, object_weight=0.16,
    transfer_weight=0.17, softening=0.18, cosine_weight=0.19, transfer_from="all", background_weight=0.21,
)  # fmt: skip
FUSION = Fusion(
    attention_loss="swapped", marginal_weight=0.22, sharpness=0.23, barlow_weight=0.24, barlow_off_diagonal=0.26
)
STUDENT = Student(
    temperature=0.27, softening=0.28, cosine_weight=0.29, bank_size=31, object_share=0.32, whitening_power=0.33
)


@pytest.mark.parametrize(
    ("build", "section", "kind"),
    [
        (optimization, ADAPTORS, Optimization),
        (augmentation, ADAPTORS, Augmentation),
        (adaptor_loss, ADAPTORS, AdaptorLoss),
        (propagation_loss, FUSION, PropagationLoss),
        (transfer, STUDENT, Transfer),
    ],
)
def test_every_option_is_the_settings(build: Callable[[Any], Any], section: Section, kind: type) -> None:
    built = build(section)
    assert type(built) is kind
    for each in fields(kind):
        assert getattr(built, each.name) == getattr(section, each.name) != each.default, each.name


def test_views_are_framed_as_the_backbones_images_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cache = tiny_cache(tmp_path / "pixels", 3)  # of 40 x 48 pixels
    monkeypatch.setattr(learning, "open_pixels", lambda context: cache)
    monkeypatch.setattr(learning, "read_images", lambda folder: pd.DataFrame({"image_id": ["a", "b", "c"]}))
    context: Any = SimpleNamespace(input=lambda stage: tmp_path, num_workers=1)
    spec = replace(tiny_backbone().spec, crop_mode="squash", interpolation="bilinear")
    plain = Augmented(min_crop=1, flip=0, brightness=0, contrast=0, saturation=0, grayscale=0)
    drawn = open_views(context, plain, spec).draw(0, np.array([1]))
    photo = Image.fromarray(np.array(cache.image(1)))
    squashed = np.asarray(photo.resize((32, 32), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(drawn[0].permute(1, 2, 0).numpy(), squashed)


def test_a_set_has_the_sizes_of_its_kind() -> None:
    assert sizes_of_set(Adaptors(bottleneck_dim=8), 384) == (8, 0)
    assert sizes_of_set(Adaptors(kind="in_context"), 384) == (0, 8)
    assert sizes_of_set(Student(kind="in_context", in_context_rank=3), 384) == (0, 3)
