"""What the backbone sees in front: values of patches, and boxes around what stands out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from grappa.backbone.frozen import build_backbone
from grappa.backbone.spec import BackboneSpec
from grappa.images.pixels import PixelCache, write_index, write_shard
from grappa.images.transforms import normalize, whole_batch
from grappa.objects.boxes import Gate, object_view, refusals
from grappa.objects.foreground import _largest_part, boxes_of, foreground, grid_of, seeing_finely
from tests.helpers.rounding import assert_same_sums
from tests.helpers.tiny import HALF, OPTIONS, tiny_backbone


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


def test_of_equal_parts_the_one_that_ends_first_counts() -> None:
    values = grids((slice(1, 7), slice(1, 2)), (slice(2, 4), slice(4, 7)))
    assert boxes_of(values, np.array([[8, 8]]))[0].tolist() == [[4, 2, 7, 4]]


def places(mask: np.ndarray) -> set[tuple[int, int]]:
    return {(row, column) for row, column in np.argwhere(mask).tolist()}


def strongest_by_hand(above: np.ndarray) -> set[tuple[int, int]]:
    """Follow each part from patch to patch."""
    left = places(above > 0)
    parts: list[set[tuple[int, int]]] = []
    while left:
        part, reached = set(), {left.pop()}
        while reached:
            part |= reached
            near = {(row + y, column + x) for row, column in reached for y, x in ((0, 1), (1, 0), (0, -1), (-1, 0))}
            reached = near & left
            left -= reached
        parts.append(part)
    return max(parts, key=lambda part: (sum(above[place] for place in part), [-at for at in max(part)]), default=set())


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10_000))
def test_the_strongest_part_is_that_of_a_plain_search(seed: int) -> None:
    above = np.random.default_rng(seed).integers(-2, 3, size=(4, 7, 6)).astype(np.float64)
    for image, found in zip(above, _largest_part(above), strict=True):
        assert places(found) == strongest_by_hand(image)


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


def test_values_tell_what_differs_from_the_border_whatever_else_is_in_the_batch() -> None:
    backbone = seeing_finely(tiny_backbone())
    assert grid_of(backbone) == (16, 16) and backbone.spec.image_size == 128
    images = 0.1 * torch.randn(3, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    images[:, 0, 40:88, 24:80] += 4
    values = foreground(backbone, images)
    assert (values.shape, values.dtype) == ((3, 256), torch.float32)
    assert values.min() >= -1e-6 and values.max() <= 2
    torch.testing.assert_close(foreground(backbone, images[2:]), values[2:])
    inside = torch.zeros(16, 16, dtype=torch.bool)
    inside[5:11, 3:10] = True
    grid = values.reshape(3, 16, 16)
    assert (grid[:, inside].mean(1) > 1.5 * grid[:, ~inside].mean(1)).all()


def test_a_large_batch_is_seen_in_parts_with_the_same_values(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny_backbone()
    images = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    whole, seen = foreground(backbone, images), []
    hook = backbone.model.blocks[0].register_forward_hook(lambda block, given, out: seen.append(len(out)))  # type: ignore[index]
    monkeypatch.setattr("grappa.objects.foreground.PART", 2 * 16 * 4 * 32 * 4)
    parts = foreground(backbone, images)
    hook.remove()
    assert seen == [2, 2, 1]
    assert_same_sums(parts, whole, terms=17 * 32)


def test_values_follow_the_formula() -> None:
    backbone = tiny_backbone()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    seen: list[torch.Tensor] = []
    hook = backbone.model.blocks[0].register_forward_hook(lambda block, given, out: seen.append(out))  # type: ignore[index]
    values = foreground(backbone, images).numpy()
    hook.remove()
    for image in range(2):
        tokens = seen[0][image, 1:].double().numpy()
        tokens /= np.linalg.norm(tokens, axis=1, keepdims=True)
        edge = [place for place in range(16) if place // 4 in (0, 3) or place % 4 in (0, 3)]
        mean = tokens[edge].mean(axis=0)
        np.testing.assert_allclose(values[image], 1 - tokens @ mean / np.linalg.norm(mean), atol=1e-6)


def test_a_backbone_of_many_patches_stays_as_it_is() -> None:
    backbone = build_backbone(BackboneSpec("vit_tiny_patch16_224", 136, 1.0, HALF, HALF, OPTIONS))
    assert seeing_finely(backbone) is backbone and grid_of(backbone) == (17, 17)


def test_tiny_huge_panoramic_and_plain_images_have_a_box_or_none_and_always_a_view(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    shapes = [(1, 1), (1, 300), (300, 2), (900, 1400)]
    images = [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]
    images.append(np.full((40, 40, 3), 128, np.uint8))
    write_index(tmp_path, write_shard(tmp_path, 0, images))
    backbone, cache = tiny_backbone(), PixelCache.open(tmp_path)
    batch = whole_batch(cache, range(5), image_size=32)
    assert (batch.shape, batch.dtype) == ((5, 3, 32, 32), torch.uint8)
    assert (batch[4] == 128).all()
    np.testing.assert_array_equal(
        batch[3].permute(1, 2, 0).numpy(),
        np.asarray(Image.fromarray(images[3]).resize((32, 32), Image.Resampling.BICUBIC)),
    )
    sizes = np.array([image.shape[:2] for image in images])
    boxes, confidences = boxes_of(foreground(backbone, normalize(batch, HALF, HALF)).reshape(5, 4, 4).numpy(), sizes)
    assert not set(refusals(boxes, confidences, sizes, Gate())) - {"", "no box"}
    for image, box in zip(images, boxes, strict=True):
        if not np.isnan(box[0]):
            view = object_view(image, box, shorter_side=40)
            assert 1 <= min(view.shape[:2]) <= 40 and max(view.shape[:2]) <= 54


def test_no_images_have_no_boxes() -> None:
    boxes, confidences = boxes_of(np.empty((0, 4, 4), np.float32), np.empty((0, 2), np.int64))
    assert (boxes.shape, confidences.shape) == ((0, 4), (0,))
