"""Drawing functions of all demo domains: colors, poses, clutter, lighting and noise on one canvas.

A canvas is drawn at twice the size of the image and reduced at the end, so that edges are smooth.
"""

from __future__ import annotations

import colorsys
import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from grappa.core.randomness import key

IMAGE_SIZE = 64
CANVAS_SIZE = 2 * IMAGE_SIZE
HUE_SPREAD = 0.06  # standard deviation around the typical hue of a class, as a share of the circle of hues

Color = tuple[int, int, int]


def hsv_color(hue: float, saturation: float, value: float) -> Color:
    """Return an RGB color in 0..255; ``hue`` wraps around, ``saturation`` and ``value`` are clipped to [0, 1]."""
    red, green, blue = colorsys.hsv_to_rgb(hue % 1.0, min(max(saturation, 0.0), 1.0), min(max(value, 0.0), 1.0))
    return round(255 * red), round(255 * green), round(255 * blue)


def random_color(rng: np.random.Generator, *, low: float = 0.0, high: float = 1.0) -> Color:
    """Return a color of any hue with value (the largest channel) in [low, high]."""
    return hsv_color(rng.uniform(), rng.uniform(0.1, 0.9), rng.uniform(low, high))


def loose_hue(label: str, rng: np.random.Generator) -> float:
    """Return a hue near the typical hue of a class; for one image in six it is any hue.

    As with flowers and goods, the hue is a hint, which alone separates few classes (24 of them share the circle).
    """
    typical = key("hue", label) / 2**64
    return float(rng.uniform() if rng.uniform() < 1 / 6 else typical + rng.normal(0, HUE_SPREAD))


def ink_and_paper(label: str, rng: np.random.Generator) -> tuple[Color, Color]:
    """Return a dark ink and a light paper in the loose hue of the class, for written signs."""
    ink = hsv_color(rng.uniform(), rng.uniform(0.0, 0.6), rng.uniform(0.0, 0.4))
    return ink, hsv_color(loose_hue(label, rng), rng.uniform(0.1, 0.45), rng.uniform(0.75, 1.0))


def two_colors(label: str, rng: np.random.Generator) -> tuple[Color, Color]:
    """Return a dark and a light color (for one image in five in reverse); the light one has the class's loose hue."""
    dark = random_color(rng, low=0.0, high=0.45)
    red, green, blue = hsv_color(loose_hue(label, rng), rng.uniform(0.1, 0.8), rng.uniform(0.75, 1.0))
    light = (max(red, 115), max(green, 115), max(blue, 115))  # a saturated blue looks dark at any value
    return (dark, light) if rng.uniform() < 0.8 else (light, dark)


def blend(first: Color, second: Color, share: float) -> Color:
    """Return ``first`` with ``share`` (0..1) of ``second`` mixed in."""
    red, green, blue = (round((1 - share) * a + share * b) for a, b in zip(first, second, strict=True))
    return red, green, blue


def posed(mask: Image.Image, *, angle: float, scale: float, shear: float, shift: tuple[float, float]) -> Image.Image:
    """Return a mask of the canvas's size: rotated by ``angle`` (degrees), scaled and sheared about its center, shifted.

    ``shift`` is (x, y) in pixels.
    """
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    forward = scale * np.array([[cos, -sin], [sin, cos]]) @ np.array([[1.0, shear], [0.0, 1.0]])
    inverse = np.linalg.inv(forward)
    center = CANVAS_SIZE / 2
    offset = np.array([mask.width / 2, mask.height / 2]) - inverse @ (np.array(shift) + center)
    data = (*inverse[0], offset[0], *inverse[1], offset[1])
    return mask.transform((CANVAS_SIZE, CANVAS_SIZE), Image.Transform.AFFINE, data, Image.Resampling.BILINEAR)


def add_strokes(image: Image.Image, rng: np.random.Generator, *, color: Color, max_strokes: int) -> None:
    """Draw up to ``max_strokes`` thin lines of ``color`` into the image: clutter for written signs."""
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(0, max_strokes + 1)):
        x0, y0, x1, y1 = rng.uniform(-0.1, 1.1, size=4) * CANVAS_SIZE
        draw.line((x0, y0, x1, y1), fill=color, width=int(rng.integers(1, 5)))


def regular_polygon(num_corners: int, *, inner: float = 1.0) -> NDArray[np.float64]:
    """Return the corners (M, 2) of a unit polygon that points up; ``inner`` < 1 adds inner corners, as a star has."""
    num_points = num_corners if inner == 1.0 else 2 * num_corners
    angles = 2 * np.pi * np.arange(num_points) / num_points - np.pi / 2
    radii = np.where(np.arange(num_points) % 2 == 0, 1.0, inner) if inner != 1.0 else np.ones(num_points)
    return np.asarray(radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1))


def finish(image: Image.Image, rng: np.random.Generator, *, noise: float = 0.05) -> NDArray[np.uint8]:
    """Return (64, 64, 3) uint8: the canvas after reduction, with light from one side, sometimes blur, and sensor noise.

    ``noise`` is the largest standard deviation, as a share of the full range.
    """
    small = image.reduce(2)
    if rng.uniform() < 0.25:
        small = small.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.9)))
    pixels = np.asarray(small, dtype=np.float32) / 255.0
    pixels = pixels * _lighting(rng)[:, :, None]
    pixels = pixels + rng.uniform(0.01, noise) * rng.standard_normal(pixels.shape, dtype=np.float32)
    return np.asarray(np.round(np.clip(pixels, 0.0, 1.0) * 255), dtype=np.uint8)


def _lighting(rng: np.random.Generator) -> NDArray[np.float32]:
    """Return (64, 64) float32: a brightness around 1, which falls in a random direction."""
    axis = np.linspace(-1.0, 1.0, IMAGE_SIZE, dtype=np.float32)
    angle, strength = rng.uniform(0, 2 * np.pi), rng.uniform(0.0, 0.35)
    plane = np.cos(angle) * axis[None, :] + np.sin(angle) * axis[:, None]
    return np.asarray(rng.uniform(0.8, 1.1) * (1.0 + strength * plane), dtype=np.float32)
