"""Boxes, the gate, the two views and the random control, on arrays."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from grappa.core.randomness import id_numbers, key
from grappa.objects.boxes import (
    Gate,
    acceptance,
    background_view,
    check_box,
    object_view,
    random_boxes,
    refusals,
    scaled_box,
    view_window,
)

NONE = [math.nan] * 4
SIZE = (100, 200)


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_the_gate_names_the_first_reason() -> None:
    boxes = np.array([[0, 0, 100, 50], NONE, [0, 0, 100, 50], [0, 0, 5, 5], [0, 0, 200, 99]])
    confidences = np.array([0.5, math.nan, 0.1, 0.9, 0.9])
    found = refusals(boxes, confidences, np.array([SIZE] * 5), Gate(0.2, 0.02, 0.9))
    assert found.tolist() == ["", "no box", "low confidence", "too small", "too large"]


@pytest.mark.parametrize(
    ("box", "sentence"),
    [
        ([0, 0, math.nan, 5], "holds what is no number"),
        ([0, 0, math.inf, 5], "holds what is no number"),
        ([7, 0, 7, 5], "is empty; give x0 < x1"),
        ([7, 9, 8, 5], "is empty"),
        ([-1, 0, 5, 5], "is not inside the image of 200 x 100 pixels"),
        ([0, 0, 201, 5], "is not inside"),
        ([0, 90, 20, 101], "is not inside"),
    ],
)
def test_a_box_that_is_none_is_refused_in_a_sentence(box: list[float], sentence: str) -> None:
    image = picture(*SIZE)
    for use in (
        lambda: check_box(box, SIZE),
        lambda: scaled_box(box, SIZE, (10, 20)),
        lambda: object_view(image, box),
        lambda: background_view(image, box),
        lambda: refusals(np.array([[0, 0, 1, 1], box]), np.ones(2), np.array([SIZE] * 2), Gate()),
    ):
        with pytest.raises(ValueError, match=sentence):
            use()


@pytest.mark.parametrize("confidence", [-0.1, 1.5, math.nan])
def test_a_confidence_that_is_none_is_refused(confidence: float) -> None:
    with pytest.raises(ValueError, match="expected a number from 0"):
        refusals(np.array([[0.0, 0, 1, 1]]), np.array([confidence]), np.array([SIZE]), Gate())


def test_a_box_in_the_original_becomes_the_same_part_of_the_cached_image() -> None:
    assert scaled_box([50, 25, 200, 100], (100, 200), (40, 80)) == (20, 10, 80, 40)
    assert scaled_box([0, 0, 3, 7], (7, 3), (5, 2)) == (0, 0, 2, 5)


def test_the_view_is_the_enlarged_box_moved_into_the_image() -> None:
    image = picture(*SIZE)
    assert view_window((50, 40, 70, 60), SIZE, enlargement=1.5, max_aspect=1) == (45, 35, 75, 65)
    np.testing.assert_array_equal(object_view(image, [50, 40, 70, 60], enlargement=1.5), image[35:65, 45:75])
    assert view_window((0, 0, 20, 20), SIZE, enlargement=1.5, max_aspect=1) == (0, 0, 30, 30)
    assert view_window((180, 80, 200, 100), SIZE, enlargement=1.5, max_aspect=1) == (170, 70, 200, 100)


def test_a_strip_grows_to_the_aspect_limit_and_is_padded_with_the_mean() -> None:
    image = picture(*SIZE)
    view = object_view(image, [0, 45, 200, 55], enlargement=1, max_aspect=4 / 3)
    assert view.shape == (150, 200, 3)
    np.testing.assert_array_equal(view[25:125], image)
    mean = image.reshape(-1, 3).mean(0).round().astype(np.uint8)
    assert (view[:25] == mean).all() and (view[125:] == mean).all()


def test_a_box_of_nearly_the_whole_image_adds_no_border() -> None:
    image = picture(*SIZE)
    np.testing.assert_array_equal(object_view(image, [3, 2, 199, 99], enlargement=4, max_aspect=9), image)


def test_a_panorama_is_shrunk_before_the_color_is_put_around_it() -> None:
    image = picture(10, 4000)
    view = object_view(image, [0, 0, 4000, 10], max_aspect=4 / 3, shorter_side=30)
    assert view.shape == (30, 40, 3)
    part = np.asarray(Image.fromarray(image).resize((40, 1), Image.Resampling.BICUBIC))
    mean = image.reshape(-1, 3).mean(0).round().astype(np.uint8)
    assert (view[14:15] == part).all() or (view[15:16] == part).all()
    assert (view == mean).all(axis=(1, 2)).sum() == 29


def test_the_view_at_its_shorter_side_is_the_view_shrunk() -> None:
    image = picture(*SIZE)
    whole = object_view(image, [20, 10, 100, 90])
    assert whole.shape == (88, 88, 3)
    wanted = np.asarray(Image.fromarray(whole).resize((32, 32), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(object_view(image, [20, 10, 100, 90], shorter_side=32), wanted)
    np.testing.assert_array_equal(object_view(image, [20, 10, 100, 90], shorter_side=99), whole)


@settings(deadline=None)
@given(
    st.integers(1, 60),
    st.integers(1, 60),
    st.lists(st.floats(0, 1), min_size=4, max_size=4),
    st.floats(1, 4),
    st.floats(1, 3),
)
def test_any_box_gives_a_view_that_holds_it_within_the_limits(
    height: int, width: int, places: list[float], enlargement: float, max_aspect: float
) -> None:
    (x0, x1), (y0, y1) = sorted(places[:2]), sorted(places[2:])
    box = (x0 * width, y0 * height, x1 * width, y1 * height)
    if not (box[0] < box[2] and box[1] < box[3]):
        return
    left, top, right, bottom = view_window(box, (height, width), enlargement=enlargement, max_aspect=max_aspect)
    assert left <= box[0] + 1 and top <= box[1] + 1 and right >= box[2] - 1 and bottom >= box[3] - 1
    longer, shorter = max(right - left, bottom - top), min(right - left, bottom - top)
    assert shorter >= 1 and longer <= max_aspect * (shorter + 1) + 1
    assert object_view(picture(height, width), box).size > 0


def test_the_background_view_hides_every_pixel_that_the_box_touches() -> None:
    image = picture(*SIZE)
    before = image.copy()
    view = background_view(image, [10.5, 20, 30, 40.2])
    hidden = np.zeros(SIZE, bool)
    hidden[20:41, 10:30] = True
    np.testing.assert_array_equal(view[~hidden], image[~hidden])
    assert (view[hidden] == image.reshape(-1, 3).mean(0).round().astype(np.uint8)).all()
    np.testing.assert_array_equal(image, before)


def test_random_boxes_have_the_sizes_of_the_found_ones_anywhere_and_belong_to_the_image() -> None:
    rng = np.random.default_rng(0)
    number = 400
    sizes = np.stack([rng.integers(50, 200, number), rng.integers(50, 200, number)], axis=1)
    corner = rng.uniform(0, 0.5, (number, 2))
    extent = np.tile(sizes[:, ::-1], 2)
    boxes = np.concatenate([corner, corner + rng.uniform(0.1, 0.5, (number, 2))], axis=1) * extent
    boxes[::7] = np.nan
    ids = id_numbers([f"image {i}" for i in range(number)])
    drawn, rows = random_boxes(boxes, sizes, ids, key(0, "objects"))
    assert np.isnan(drawn[:, 0]).tolist() == np.isnan(boxes[rows, 0]).tolist()
    assert not set(refusals(drawn, np.ones(number), sizes, Gate())) - {"", "no box"}
    shares, wanted = drawn / extent, (boxes / extent)[rows]
    np.testing.assert_allclose((shares[:, 2:] - shares[:, :2]), wanted[:, 2:] - wanted[:, :2])
    assert 0.1 < np.nanmean(np.isnan(drawn)) < 0.2
    middle = np.nanmean((shares[:, :2] + shares[:, 2:]) / 2, axis=0)
    np.testing.assert_allclose(middle, 0.5, atol=0.05)
    other, _ = random_boxes(boxes, sizes, ids, key(1, "objects"))
    assert not np.array_equal(other, drawn, equal_nan=True)


def test_acceptance_counts_each_domain_and_reason() -> None:
    domains = np.array(["b", "a", "a", "a"], dtype=object)
    table = acceptance(domains, np.array(["", "", "too small", ""])).set_index(["domain", "outcome"])
    assert table.loc[("a", "accepted"), "num_images"] == 2
    assert table.loc[("a", "too small"), "share"] == pytest.approx(1 / 3)
    assert table.loc[("b", "no box"), "num_images"] == 0
    assert list(table.reset_index()["domain"].unique()) == ["a", "b"]
