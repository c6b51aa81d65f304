"""Crops, augmentation and reading ahead: right pixels, pure functions, order kept."""

from __future__ import annotations

import multiprocessing
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from grappa.images.pixels import PixelCache, write_index, write_shard
from grappa.images.transforms import (
    NUM_DRAWS,
    Augmentation,
    eval_batch,
    eval_crop,
    normalize,
    prefetch,
    train_batch,
)

ALL = Augmentation(min_crop=0.4, flip=0.5, brightness=0.4, contrast=0.4, saturation=0.4, grayscale=0.3)
SHAPES = [(40, 52), (60, 40), (40, 40), (24, 90), (41, 47), (90, 33)]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> PixelCache:
    folder = tmp_path_factory.mktemp("cache")
    draws = np.random.default_rng(0)
    images = [np.asarray(blurred(draws, shape)) for shape in SHAPES]
    write_index(folder, write_shard(folder, 0, images))
    return PixelCache.open(folder)


def blurred(draws: np.random.Generator, shape: tuple[int, int]) -> Image.Image:
    small = Image.fromarray(draws.integers(0, 256, (6, 7, 3), dtype=np.uint8))
    return small.resize(shape[::-1], Image.Resampling.BICUBIC)


def uniforms(num: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).random((num, NUM_DRAWS))


def train(cache: PixelCache, rows: list[int], draws: np.ndarray, **changes: Any) -> torch.Tensor:
    return train_batch(cache, rows, draws, **{"image_size": 32, "augmentation": ALL, **changes})


# ---------------------------------------------------------------- evaluation


def test_the_center_crop_is_the_center() -> None:
    image = np.zeros((40, 80, 3), dtype=np.uint8)
    image[10:30, 30:50] = 255
    inside = eval_crop(image, image_size=16, crop_fraction=0.5)
    assert (inside.shape, inside.dtype) == ((16, 16, 3), np.uint8)
    assert inside[1:-1, 1:-1].min() == 255
    whole = eval_crop(image, image_size=40, crop_fraction=1.0)
    np.testing.assert_array_equal(whole, image[:, 20:60])


def test_the_center_crop_resizes_like_a_crop_that_was_cut_out() -> None:
    image = np.asarray(blurred(np.random.default_rng(3), (160, 213)))
    expected = Image.fromarray(image[10:150, 36:176]).resize((64, 64), Image.Resampling.BICUBIC)
    crop = eval_crop(image, image_size=64, crop_fraction=140 / 160)  # its box is 36.5: half a pixel further right
    assert np.abs(crop.astype(int) - np.asarray(expected)).mean() < 2


def test_a_center_crop_of_the_size_asked_for_is_cut_out_at_whole_pixels() -> None:
    image = np.asarray(blurred(np.random.default_rng(3), (160, 213)))
    crop = eval_crop(image, image_size=140, crop_fraction=140 / 160)  # its box begins at 36.5
    np.testing.assert_array_equal(crop, image[10:150, 36:176])
    between = Image.fromarray(image).resize((140, 140), Image.Resampling.BICUBIC, box=(36.5, 10, 176.5, 150))
    assert np.abs(crop.astype(int) - np.asarray(between)).mean() < 4


@pytest.mark.parametrize("num_workers", [1, 3, 8])
def test_eval_batch_is_the_crops_in_order(cache: PixelCache, num_workers: int) -> None:
    rows = [4, 0, 3, 3, 1]
    batch = eval_batch(cache, rows, image_size=24, crop_fraction=0.9, num_workers=num_workers)
    assert (batch.shape, batch.dtype, batch.is_contiguous()) == ((5, 3, 24, 24), torch.uint8, True)
    for row, image in zip(rows, batch, strict=True):
        expected = eval_crop(cache.image(row), image_size=24, crop_fraction=0.9)
        np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), expected)


def test_an_image_below_the_crop_is_enlarged(cache: PixelCache) -> None:
    assert eval_batch(cache, [3], image_size=128, crop_fraction=1.0).shape == (1, 3, 128, 128)


def test_a_squashed_image_is_whole_and_stretched(cache: PixelCache) -> None:
    image = cache.image(0)  # 40 x 52
    how = {"image_size": 32, "crop_mode": "squash"}
    expected = Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(eval_crop(image, crop_fraction=1.0, **how), np.asarray(expected))
    middle = Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC, box=(13, 10, 39, 30))
    np.testing.assert_array_equal(eval_crop(image, crop_fraction=0.5, **how), np.asarray(middle))
    square = cache.image(2)
    np.testing.assert_array_equal(
        eval_crop(square, crop_fraction=0.8, **how), eval_crop(square, image_size=32, crop_fraction=0.8)
    )


def test_the_interpolation_is_the_models(cache: PixelCache) -> None:
    image = cache.image(0)
    found = eval_crop(image, image_size=20, crop_fraction=1.0, interpolation="bilinear")
    expected = Image.fromarray(image).resize((20, 20), Image.Resampling.BILINEAR, box=(6, 0, 46, 40))
    np.testing.assert_array_equal(found, np.asarray(expected))
    batch = eval_batch(cache, [0], image_size=20, crop_fraction=1.0, interpolation="bilinear", crop_mode="center")
    np.testing.assert_array_equal(batch[0].permute(1, 2, 0).numpy(), found)


# ---------------------------------------------------------------- training


def test_a_training_crop_is_framed_as_the_models_images_are(cache: PixelCache) -> None:
    how = {"crop_mode": "squash", "interpolation": "bilinear"}
    plain = train(cache, [0], uniforms(1), augmentation=Augmentation(), **how)
    assert torch.equal(plain, eval_batch(cache, [0], image_size=32, crop_fraction=1.0, **how))
    crop = train(cache, [3], np.zeros((1, NUM_DRAWS)), augmentation=Augmentation(min_crop=0.5), **how)  # 24 x 90
    expected = Image.fromarray(cache.image(3)).resize((32, 32), Image.Resampling.BILINEAR, box=(0, 0, 45, 12))
    np.testing.assert_array_equal(crop[0].permute(1, 2, 0).numpy(), np.asarray(expected))


def test_without_augmentation_a_square_image_is_the_eval_crop(cache: PixelCache) -> None:
    plain = train(cache, [2], uniforms(1), augmentation=Augmentation())
    assert torch.equal(plain, eval_batch(cache, [2], image_size=32, crop_fraction=1.0))


def test_an_image_depends_on_its_own_row_and_uniforms_only(cache: PixelCache) -> None:
    rows, draws = [0, 1, 2, 3, 4, 5, 0, 2], uniforms(8)
    together = train(cache, rows, draws)
    assert torch.equal(together, train(cache, rows, draws))
    assert torch.equal(together, train(cache, rows, draws, num_workers=3))
    assert torch.equal(together.flip(0), train(cache, rows[::-1], draws[::-1]))
    for position, row in enumerate(rows):
        assert torch.equal(together[position], train(cache, [row], draws[position : position + 1])[0])
    assert not torch.equal(together[0], together[6])


def test_the_number_of_torch_threads_changes_nothing(cache: PixelCache) -> None:
    rows, draws, before = [0, 1, 2, 3], uniforms(4), torch.get_num_threads()
    one = train(cache, rows, draws, image_size=200)
    try:
        torch.set_num_threads(3)
        assert torch.equal(one, train(cache, rows, draws, image_size=200))
        assert torch.equal(one[:1], train(cache, rows[:1], draws[:1], image_size=200))
    finally:
        torch.set_num_threads(before)


def test_crops_reach_every_corner_and_stay_inside(cache: PixelCache) -> None:
    height, width = SHAPES[0]
    for left, top in ((0.0, 0.0), (1.0, 1.0), (0.0, 1.0)):
        draws = np.zeros((1, NUM_DRAWS))
        draws[0, 1:3] = left, top
        crop = train(cache, [0], draws, augmentation=Augmentation(min_crop=0.5), image_size=20)
        x, y = int(left * (width - 20)), int(top * (height - 20))
        np.testing.assert_array_equal(crop[0].permute(1, 2, 0), cache.image(0)[y : y + 20, x : x + 20])


def test_flip_mirrors_with_its_probability(cache: PixelCache) -> None:
    draws = np.repeat(uniforms(1), 2, axis=0)
    draws[:, 3] = 0.29, 0.31
    flipped, plain = train(cache, [1, 1], draws, augmentation=Augmentation(flip=0.3))
    assert torch.equal(flipped, plain.flip(-1))
    assert not torch.equal(flipped, plain)


def written_out(crop: np.ndarray, draws: np.ndarray, augmentation: Augmentation) -> np.ndarray:
    """The color changes one after the other in float64, clamped and rounded once."""
    weights = np.array([0.299, 0.587, 0.114])
    strengths = (augmentation.brightness, augmentation.contrast, augmentation.saturation)
    bright, contrast, saturation = (1 + s * (2 * u - 1) for s, u in zip(strengths, draws[4:7], strict=True))
    pixels = crop.astype(np.float64) * bright
    pixels = pixels * contrast + (1 - contrast) * (pixels @ weights).mean()
    pixels = pixels * saturation + (1 - saturation) * (pixels @ weights)[..., None]
    if draws[7] < augmentation.grayscale:
        pixels = np.repeat((pixels @ weights)[..., None], 3, axis=-1)
    return np.clip(np.round(pixels), 0, 255)


def test_color_changes_equal_the_written_out_formula(cache: PixelCache) -> None:
    rows, draws = [0, 1, 2, 3, 4, 5], uniforms(6, seed=4)
    colors = Augmentation(brightness=0.5, contrast=0.6, saturation=0.7, grayscale=0.4)
    crops = train(cache, rows, draws, augmentation=Augmentation())
    changed = train(cache, rows, draws, augmentation=colors)
    assert 0 < (draws[:, 7] < 0.4).sum() < 6
    for position in range(6):
        expected = written_out(crops[position].permute(1, 2, 0).numpy(), draws[position], colors)
        assert np.abs(changed[position].permute(1, 2, 0).numpy() - expected).max() <= 1
        assert (changed[position].permute(1, 2, 0).numpy() == expected).mean() > 0.999


def test_uniforms_of_another_shape_are_refused(cache: PixelCache) -> None:
    with pytest.raises(ValueError, match=rf"shape \(2, {NUM_DRAWS}\): expected \(3, {NUM_DRAWS}\)"):
        train(cache, [0, 1, 2], uniforms(2))


def batch_in_child(cache: PixelCache, reply: Any) -> None:
    torch.set_num_threads(1)
    reply.send(train(cache, [0, 1, 2], uniforms(3), num_workers=2).numpy())


def test_a_forked_child_has_threads_of_its_own(cache: PixelCache) -> None:
    here = train(cache, [0, 1, 2], uniforms(3), num_workers=2)
    receive, send = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=batch_in_child, args=(cache, send), daemon=True)
    child.start()
    assert receive.poll(20)
    np.testing.assert_array_equal(receive.recv(), here.numpy())
    child.join(20)


# ---------------------------------------------------------------- settings, normalization


@pytest.mark.parametrize(
    "changes", [{"min_crop": 0.0}, {"min_crop": 1.1}, {"flip": -0.1}, {"brightness": 1.5}, {"grayscale": 2.0}]
)
def test_augmentation_refuses_values_out_of_range(changes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(changes))} is .*expected"):
        Augmentation(**changes)


def test_normalize_is_the_formula_and_leaves_its_input_alone() -> None:
    batch = torch.arange(2 * 3 * 4 * 4).remainder(256).to(torch.uint8).view(2, 3, 4, 4)
    before = batch.clone()
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    result = normalize(batch, mean, std)
    expected = (batch.double() / 255 - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), expected, atol=1e-6, rtol=0)
    assert torch.equal(batch, before)


# ---------------------------------------------------------------- reading ahead


@pytest.mark.parametrize("num", [0, 1, 2, 7])
def test_prefetch_keeps_the_order(num: int) -> None:
    assert list(prefetch(lambda step: step * step, num)) == [step * step for step in range(num)]
    assert list(prefetch(lambda step: step, num, depth=1)) == list(range(num))


def test_prefetch_works_ahead_but_no_further_than_its_depth() -> None:
    made: list[int] = []
    results = prefetch(lambda step: made.append(step) or step, 10, depth=3)
    assert next(results) == 0
    deadline = time.monotonic() + 10
    while len(made) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert made == [0, 1, 2, 3]
    results.close()


def test_prefetch_raises_where_the_result_would_have_come() -> None:
    def make(step: int) -> int:
        if step == 2:
            raise RuntimeError("step 2")
        return step

    results = prefetch(make, 5)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(RuntimeError, match="step 2"):
        next(results)


def test_closing_prefetch_stops_its_thread() -> None:
    made: list[int] = []
    results = prefetch(lambda step: made.append(step) or step, 1000)
    next(results)
    results.close()
    count = len(made)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]
    time.sleep(0.05)
    assert len(made) == count <= 4


def test_prefetch_refuses_a_depth_below_one() -> None:
    with pytest.raises(ValueError, match="depth is 0"):
        next(prefetch(lambda step: step, 3, depth=0))


def test_transforms_do_not_touch_the_cache(cache: PixelCache, tmp_path: Path) -> None:
    before = [cache.image(row).copy() for row in range(len(cache))]
    train(cache, list(range(len(cache))), uniforms(len(cache)))
    for row, image in enumerate(before):
        np.testing.assert_array_equal(cache.image(row), image)
