"""What the backbone sees in front: values of patches, and boxes around what stands out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import HALF, OPTIONS, tiny_backbone, tiny_cache

from grappa.backbone import BackboneError, BackboneSpec, build_backbone
from grappa.foreground import boxes_of, foreground, grid_of, mean_tokens
from grappa.objects import Gate, refusals
from grappa.transforms import normalize, whole_batch


def grids(*places: tuple[slice, slice], rows: int = 8, columns: int = 8) -> np.ndarray:
    values = np.zeros((1, rows, columns), np.float32)
    for place in places:
        values[0][place] = 1
    return values


def test_the_box_is_around_the_largest_connected_part_in_pixels() -> None:
    values = grids((slice(2, 5), slice(3, 7)), (slice(7, 8), slice(0, 1)))
    boxes, confidences = boxes_of(values, np.array([[80, 160]]))
    assert boxes.tolist() == [[60, 20, 140, 50]]
    assert confidences.tolist() == [1.0]


def test_parts_that_touch_at_a_corner_only_are_two() -> None:
    values = grids((slice(1, 3), slice(1, 3)), (slice(3, 6), slice(3, 6)))
    assert boxes_of(values, np.array([[8, 8]]))[0].tolist() == [[3, 3, 6, 6]]


def test_a_winding_part_is_followed_to_its_end() -> None:
    values = grids(
        (slice(0, 1), slice(0, 8)), (slice(0, 8), slice(7, 8)), (slice(7, 8), slice(2, 8)), (slice(4, 8), slice(2, 3))
    )
    assert boxes_of(values, np.array([[8, 8]]))[0].tolist() == [[0, 0, 8, 8]]


def test_an_image_of_equal_values_has_no_box() -> None:
    boxes, confidences = boxes_of(np.full((2, 4, 4), 3, np.float32), np.array([[9, 9]] * 2))
    assert np.isnan(boxes).all() and np.isnan(confidences).all()


def test_confidence_falls_where_front_and_back_mix() -> None:
    noise = np.random.default_rng(0).normal(size=(1, 8, 8)).astype(np.float32)
    size = np.array([[8, 8]])
    clear, mixed = (boxes_of(grids((slice(2, 6), slice(2, 6))) + much * noise, size)[1][0] for much in (0.1, 1))
    assert 0.9 < clear <= 1 and 0.5 < mixed < 0.8


@settings(deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 4000), st.integers(1, 4000))
def test_any_values_give_a_box_inside_the_image_that_does_not_depend_on_its_company(
    seed: int, height: int, width: int
) -> None:
    values = np.random.default_rng(seed).normal(size=(3, 5, 7)).astype(np.float32)
    sizes = np.array([[height, width]] * 3)
    boxes, confidences = boxes_of(values, sizes)
    assert not set(refusals(boxes, confidences, sizes, Gate())) - {""}
    alone = boxes_of(values[1:2], sizes[1:2])
    assert alone[0].tolist() == boxes[1:2].tolist() and alone[1].tolist() == confidences[1:2].tolist()


def test_values_are_deterministic_and_the_border_lies_low() -> None:
    backbone = tiny_backbone()
    images = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    values = foreground(backbone, images)
    assert grid_of(backbone) == (4, 4)
    assert (values.shape, values.dtype) == ((5, 16), torch.float32)
    torch.testing.assert_close(foreground(backbone, images[2:3]), values[2:3])
    torch.testing.assert_close(values.mean(1), torch.zeros(5), atol=1e-5, rtol=0)
    grid = values.reshape(5, 4, 4)
    assert (grid[:, 1:3, 1:3].mean((1, 2)) > values.mean(1)).all()


def test_the_mean_token_of_each_place_is_taken_away(tmp_path: Path) -> None:
    backbone, cache = tiny_backbone(), tiny_cache(tmp_path, 6)
    rows = np.array([0, 2, 3])
    means = mean_tokens(backbone, cache, rows)
    assert (means.shape, means.dtype) == ((16, 32), torch.float32)
    one = mean_tokens(backbone, cache, rows[:1])
    torch.testing.assert_close(mean_tokens(backbone, cache, np.array([0, 0])), one)
    assert not torch.allclose(means, one, atol=1e-3)
    spec = backbone.spec
    batch = normalize(whole_batch(cache, rows, image_size=spec.image_size), spec.mean, spec.std)
    plain, less = foreground(backbone, batch), foreground(backbone, batch, means=means)
    assert not torch.allclose(plain, less, atol=1e-3)
    torch.testing.assert_close(foreground(backbone, batch[:1], means=one), torch.zeros(1, 16), atol=1e-4, rtol=0)


def test_a_backbone_of_few_patches_is_refused() -> None:
    backbone = build_backbone(BackboneSpec("vit_tiny_patch16_224", 24, 1.0, HALF, HALF, OPTIONS))
    with pytest.raises(BackboneError, match="sees an image as 3 x 3 patches, too few to find an object; set a larger"):
        grid_of(backbone)
