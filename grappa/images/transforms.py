"""From cached pixels to model input: the evaluation crop, the training augmentation, normalization, reading ahead.

Shapes: B batch, S image size. Crops are resized by PIL (bicubic or bilinear, antialiased) in threads, unless they have
the size already; color changes run over several images at once in torch. No function here draws a random number: the
training augmentation takes uniform numbers as an argument, one line of them for each image.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache as remember
from functools import partial
from itertools import islice
from typing import TypeVar

import numpy as np
import torch
from PIL import Image

from grappa.core.arrays import Box, Floats, Pixels, Rows
from grappa.images.framing import box_of, crop_sides, eval_crop, frame_of, resized_part
from grappa.images.pixels import ImageRows

T = TypeVar("T")

# The columns of train_batch's uniforms.
_SIDE, _LEFT, _TOP, _FLIP, _BRIGHTNESS, _CONTRAST, _SATURATION, _GRAYSCALE = range(8)
NUM_DRAWS = 8
_GRAY_WEIGHTS = (0.299, 0.587, 0.114)  # ITU-R BT.601 luma
_MIRROR = Image.Transpose.FLIP_LEFT_RIGHT
_PART = 8  # images a task: its color changes stay in the processor's cache


@dataclass(frozen=True)
class Augmentation:
    """Strengths of the training augmentation.

    min_crop: the square crop's side is uniform in [min_crop, 1] times the image's shorter side, anywhere in the image.
    flip, grayscale: probabilities. brightness, contrast, saturation: the factor is uniform in [1 - value, 1 + value].
    """

    min_crop: float = 1.0
    flip: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    grayscale: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.min_crop <= 1:
            raise ValueError(f"min_crop is {self.min_crop}: expected a number above 0, at most 1")
        for name in ("flip", "brightness", "contrast", "saturation", "grayscale"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}: expected a number in [0, 1]")


# ---------------------------------------------------------------- evaluation


def eval_batch(
    cache: ImageRows,
    rows: Sequence[int] | Rows,
    *,
    image_size: int,
    crop_fraction: float,
    crop_mode: str = "center",
    interpolation: str = "bicubic",
    num_workers: int = 1,
) -> torch.Tensor:
    """Return ``eval_crop`` of the cache's ``rows`` (B,) as (B, 3, S, S) uint8; ``num_workers`` changes no byte."""
    crop = partial(
        eval_crop,
        image_size=image_size,
        crop_fraction=crop_fraction,
        crop_mode=crop_mode,
        interpolation=interpolation,
    )

    def crops(part: range) -> torch.Tensor:
        return _channels_first([crop(cache.image(rows[i])) for i in part])

    return _in_parts(crops, len(rows), image_size, num_workers)


def whole_batch(cache: ImageRows, rows: Sequence[int] | Rows, *, image_size: int, num_workers: int = 1) -> torch.Tensor:
    """Return the cache's ``rows`` (B,) as (B, 3, S, S) uint8, whole: each side is stretched to S by itself."""

    def squeezed(part: range) -> torch.Tensor:
        images = (cache.image(rows[i]) for i in part)
        return _channels_first([np.asarray(resized_part(one, frame_of(one), image_size)) for one in images])

    return _in_parts(squeezed, len(rows), image_size, num_workers)


# ---------------------------------------------------------------- training


def train_batch(
    cache: ImageRows,
    rows: Sequence[int] | Rows,
    uniforms: Floats,
    *,
    image_size: int,
    augmentation: Augmentation,
    crop_mode: str = "center",
    interpolation: str = "bicubic",
    num_workers: int = 1,
) -> torch.Tensor:
    """Return random crops, flipped and color-changed, of the cache's ``rows`` (B,) as (B, 3, S, S) uint8.

    Image b depends on ``rows[b]`` and ``uniforms[b]`` only: not on the rest of the batch, nor on ``num_workers``.

    Args:
        crop_mode: ``center``: crops are squares; ``squash``: they have the image's aspect, stretched to squares.
        uniforms: (B, NUM_DRAWS) float64 in [0, 1).
    """
    if uniforms.shape != (len(rows), NUM_DRAWS):
        raise ValueError(f"uniforms have shape {uniforms.shape}: expected {(len(rows), NUM_DRAWS)}, one line a row")

    def crops(part: range) -> torch.Tensor:
        plain = [crop(cache.image(rows[i]), uniforms[i]) for i in part]
        return _change_colors(_channels_first(plain), uniforms[part.start : part.stop], augmentation)

    def crop(image: Pixels, draws: Floats) -> Pixels:
        box = _train_box(image, draws, augmentation.min_crop, crop_mode)
        resized = resized_part(image, box, image_size, interpolation)
        return np.asarray(resized.transpose(_MIRROR) if draws[_FLIP] < augmentation.flip else resized)

    return _in_parts(crops, len(rows), image_size, num_workers)


def _train_box(image: Pixels, draws: Floats, min_crop: float, crop_mode: str) -> Box:
    height, width = image.shape[:2]
    across, down = crop_sides(image, crop_mode, min_crop + (1 - min_crop) * draws[_SIDE])
    return box_of((width - across) * draws[_LEFT], (height - down) * draws[_TOP], across, down)


def _change_colors(images: torch.Tensor, uniforms: Floats, augmentation: Augmentation) -> torch.Tensor:
    """Change brightness, contrast (around the image's mean gray), saturation and grayscale, in this order.

    The four changes together are x -> a x + b gray(x) + c, with three numbers for each image, rounded once. The mean
    gray is summed exactly and all other operations are elementwise, so an image's result does not depend on its batch.
    """
    if not (augmentation.brightness or augmentation.contrast or augmentation.saturation or augmentation.grayscale):
        return images
    pixels = images.float()
    brightness = _factor(uniforms[:, _BRIGHTNESS], augmentation.brightness)
    contrast = _factor(uniforms[:, _CONTRAST], augmentation.contrast)
    saturation = _factor(uniforms[:, _SATURATION], augmentation.saturation)
    saturation = np.where(uniforms[:, _GRAYSCALE] < augmentation.grayscale, 0.0, saturation)
    gain = brightness * contrast
    offset = (1 - contrast) * brightness * _mean_gray(pixels)
    a, b, c = (_per_image(values) for values in (gain * saturation, gain * (1 - saturation), offset))
    red, green, blue = (pixels[:, channel : channel + 1] * _GRAY_WEIGHTS[channel] for channel in range(3))
    shift = red.add_(green).add_(blue).mul_(b).add_(c)
    changed = pixels.mul_(a).add_(shift).round_().clamp_(0, 255)
    return changed.to(torch.int16).to(torch.uint8)  # by way of int16: five times faster than at once


def _mean_gray(pixels: torch.Tensor) -> Floats:
    """Return the mean gray of each image (B,), exact in any order of summation.

    A line's sum of integers is below 2^24, which float32 holds exactly; the lines are summed in float64.
    """
    sums = pixels.sum(dim=3).double().sum(dim=2).numpy()
    red, green, blue = (sums[:, channel] * _GRAY_WEIGHTS[channel] for channel in range(3))
    mean: Floats = (red + green + blue) / (pixels.shape[2] * pixels.shape[3])
    return mean


def _factor(draws: Floats, strength: float) -> Floats:
    return 1 + strength * (2 * draws - 1)


def _per_image(values: Floats) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.float32))[:, None, None, None]


# ---------------------------------------------------------------- evaluation and training alike


def normalize(batch: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """Return (batch / 255 - mean) / std of a (B, 3, S, S) uint8 batch as float32, on the batch's device."""
    shape = (1, 3, 1, 1)
    means = torch.tensor(mean, dtype=torch.float32, device=batch.device).view(shape)
    stds = torch.tensor(std, dtype=torch.float32, device=batch.device).view(shape)
    return batch.float().div_(255).sub_(means).div_(stds)


def _channels_first(images: Sequence[Pixels]) -> torch.Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def _in_parts(
    make: Callable[[range], torch.Tensor], num_images: int, image_size: int, num_workers: int
) -> torch.Tensor:
    """Return (B, 3, S, S) uint8, made by ``make(part)`` for a few images at a time in ``num_workers`` threads."""
    out = torch.empty((num_images, 3, image_size, image_size), dtype=torch.uint8)

    def fill(start: int) -> None:
        part = range(start, min(start + _PART, num_images))
        out[part.start : part.stop] = make(part)

    run = map if num_workers == 1 else _pool(num_workers).map
    for _ in run(fill, range(0, num_images, _PART)):
        pass
    return out


@remember
def _pool(num_workers: int) -> ThreadPoolExecutor:
    """Return the threads that resize; they live as long as the process, and a forked child starts others."""
    return ThreadPoolExecutor(num_workers, "resize")


os.register_at_fork(after_in_child=_pool.cache_clear)


def prefetch(make: Callable[[int], T], num: int, *, depth: int = 2) -> Iterator[T]:
    """Yield make(0), ..., make(num - 1) in order, made up to ``depth`` ahead by one thread.

    An exception of ``make`` is raised where its result would have come. Closing the generator ends the thread after its
    present call.
    """
    if depth < 1:
        raise ValueError(f"depth is {depth}: expected at least 1")
    pool = ThreadPoolExecutor(1, "prefetch")
    steps = iter(range(num))
    ahead: deque[Future[T]] = deque(pool.submit(make, step) for step in islice(steps, depth))
    try:
        while ahead:
            result = ahead.popleft().result()
            ahead.extend(pool.submit(make, step) for step in islice(steps, 1))
            yield result
    finally:
        pool.shutdown(cancel_futures=True)
