"""Domain `objects`: a class is a body with three parts of fixed shape, color and place.

Images of a class differ in pose, mirroring, size, light, a shift of all colors, background clutter and an occluder.
There are few bodies, parts and colors, so that a single one of them does not identify a class.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from grappa.core.randomness import key
from grappa.pipeline.demo import drawing

Corners = NDArray[np.float64]  # (M, 2), in body radii

SHAPES: dict[str, Corners] = {
    "disk": drawing.regular_polygon(28),
    "oval": drawing.regular_polygon(28) * (1.0, 0.65),
    "triangle": drawing.regular_polygon(3),
    "square": drawing.regular_polygon(4),
    "bar": np.array([[-1.0, -0.45], [1.0, -0.45], [1.0, 0.45], [-1.0, 0.45]]),
    "hexagon": drawing.regular_polygon(6),
    "star": drawing.regular_polygon(5, inner=0.45),
    "cross": np.array([[-1, -3], [1, -3], [1, -1], [3, -1], [3, 1], [1, 1], [1, 3], [-1, 3], [-1, 1], [-3, 1], [-3, -1],
                       [-1, -1]]) / 3.2,
}  # fmt: skip
HUES = (0.0, 0.09, 0.16, 0.33, 0.5, 0.62, 0.8)
NUM_PARTS = 3

DEMO_CLASSES = tuple(f"object-{number:03d}" for number in range(24))
PRETRAINING_CLASSES = tuple(f"object-{number:03d}" for number in range(24, 224))


@dataclass(frozen=True)
class Part:
    """One shape of an object: place (x, y) and radius in body radii, ``turn`` in degrees, hue and value in 0..1."""

    shape: str
    place: tuple[float, float]
    radius: float
    turn: float
    hue: float
    value: float


def parts(label: str) -> tuple[Part, ...]:
    """Return the parts of an object of class ``label`` in drawing order: the body is first."""
    rng = np.random.default_rng(key("object", label))
    names = list(SHAPES)
    shape, hue = names[rng.integers(len(names))], float(rng.choice(HUES))
    body = Part(shape, (0.0, 0.0), radius=1.0, turn=0.0, hue=hue, value=float(rng.uniform(0.55, 0.9)))
    angles = (rng.permutation(6)[:NUM_PARTS] * 60.0 + rng.uniform(-15, 15, NUM_PARTS)) % 360
    return (body, *(_part(rng, names, math.radians(angle)) for angle in angles))


def _part(rng: np.random.Generator, names: list[str], angle: float) -> Part:
    distance = float(rng.choice((0.45, 0.95)))
    place = (distance * math.cos(angle), distance * math.sin(angle))
    shape, turn = names[rng.integers(len(names))], float(rng.choice((0.0, 45.0, 90.0)))
    hue, value = float(rng.choice(HUES)), float(rng.uniform(0.4, 1.0))
    return Part(shape, place, radius=float(rng.uniform(0.25, 0.5)), turn=turn, hue=hue, value=value)


def draw(label: str, identity: np.random.Generator, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Return (64, 64, 3) uint8: ``identity`` decides whether an occluder is drawn, ``rng`` pose, light and clutter."""
    image = Image.new("RGB", (drawing.CANVAS_SIZE, drawing.CANVAS_SIZE), _dull_color(rng))
    canvas = ImageDraw.Draw(image)
    for _ in range(rng.integers(2, 7)):
        _draw_clutter(canvas, rng, radius=rng.uniform(6, 22))
    _draw_object(canvas, parts(label), rng)
    if identity.uniform() < 0.5:
        _draw_clutter(canvas, rng, radius=rng.uniform(8, 18))
    return drawing.finish(image, rng, noise=0.06)


def _draw_object(canvas: ImageDraw.ImageDraw, pieces: tuple[Part, ...], rng: np.random.Generator) -> None:
    radius = rng.uniform(28, 42)
    center = drawing.CANVAS_SIZE / 2 + rng.normal(0, 6, size=2)
    pose = _rotation(rng.normal(0, 30)) * radius
    pose[:, 0] *= rng.uniform(0.8, 1.0)  # the object is seen a little from the side
    hue_shift, saturation, light = rng.normal(0, 0.05), rng.uniform(0.45, 0.95), rng.uniform(0.75, 1.1)
    for piece in pieces:
        outline = SHAPES[piece.shape] * piece.radius @ _rotation(piece.turn).T + piece.place
        fill = drawing.hsv_color(piece.hue + hue_shift, saturation, piece.value * light)
        _draw_polygon(canvas, outline @ pose.T + center, fill)


def _draw_clutter(canvas: ImageDraw.ImageDraw, rng: np.random.Generator, *, radius: float) -> None:
    outline = list(SHAPES.values())[rng.integers(len(SHAPES))] @ _rotation(rng.uniform(0, 360)).T
    _draw_polygon(canvas, outline * radius + rng.uniform(0, drawing.CANVAS_SIZE, size=2), _dull_color(rng))


def _draw_polygon(canvas: ImageDraw.ImageDraw, corners: Corners, fill: drawing.Color) -> None:
    canvas.polygon([(float(x), float(y)) for x, y in corners], fill=fill, outline=drawing.blend(fill, (0, 0, 0), 0.5))


def _dull_color(rng: np.random.Generator) -> drawing.Color:
    return drawing.hsv_color(rng.uniform(), rng.uniform(0.0, 0.45), rng.uniform(0.1, 1.0))


def _rotation(degrees: float) -> NDArray[np.float64]:
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return np.array([[cos, -sin], [sin, cos]])
