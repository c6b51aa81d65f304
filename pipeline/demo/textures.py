"""Domain `textures`: a class is a family of patterns with fixed parameters.

Images of a class differ in colors, rotation, phase and light. A label such as "bricks-2-0" names the family and the
steps of its two parameters. Demo and pretraining use the same families with different parameters.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from grappa.pipeline.demo import drawing

Field = NDArray[np.float64]  # (128, 128), values in 0..1: where the second color lies

NUM_PERIODS = (3.0, 4.3, 6.2, 9.0)  # first parameter: periods across the image
SHAPES = (0.25, 0.5, 0.75)  # second parameter: its meaning depends on the family


def draw(label: str, identity: np.random.Generator, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Return (64, 64, 3) uint8, the texture ``label``: ``identity`` picks its scale, ``rng`` everything else."""
    family, periods, shape = parameters(label)
    x, y = _coordinates(rng, periods * identity.uniform(0.88, 1.14))
    field = np.clip(FAMILIES[family](x, y, shape, rng), 0.0, 1.0)[:, :, None]
    ink, paper = drawing.two_colors(label, rng)
    share = rng.uniform(0.45, 1.0)  # contrast
    first, second = np.array(paper, dtype=np.float64), np.array(drawing.blend(paper, ink, share), dtype=np.float64)
    return drawing.finish(Image.fromarray(np.round(first + field * (second - first)).astype(np.uint8)), rng, noise=0.12)


def parameters(label: str) -> tuple[str, float, float]:
    """Return (family, periods across the image, shape in 0..1) of a label such as "bricks-2-0"."""
    family, period_step, shape_step = label.split("-")
    return family, NUM_PERIODS[int(period_step)], SHAPES[int(shape_step)]


def _coordinates(rng: np.random.Generator, periods: float) -> tuple[Field, Field]:
    """Return coordinates x, y in periods, rotated by any angle, shifted, and a little stretched."""
    axis = np.linspace(-0.5, 0.5, drawing.CANVAS_SIZE) * periods
    angle, stretch = rng.uniform(0, 2 * np.pi), rng.uniform(0.92, 1.09)
    x = stretch * (np.cos(angle) * axis[None, :] - np.sin(angle) * axis[:, None])
    y = (np.sin(angle) * axis[None, :] + np.cos(angle) * axis[:, None]) / stretch
    return x + rng.uniform(0, 50), y + rng.uniform(0, 50)


def _edge(distance: Field, *, width: float = 0.06) -> Field:
    """Return a soft step that falls from 1 to 0 around ``distance`` 0, over a range of ``width``."""
    return np.clip(0.5 - distance / width, 0.0, 1.0)


def _stripes(x: Field, y: Field, shape: float, rng: np.random.Generator) -> Field:
    return _edge(np.abs(x % 1.0 - 0.5) - 0.5 * shape)


def _waves(x: Field, y: Field, shape: float, rng: np.random.Generator) -> Field:
    return 0.5 + 0.5 * np.sin(2 * np.pi * (x + shape * np.sin(2 * np.pi * y / 2)))


def _checks(x: Field, y: Field, shape: float, rng: np.random.Generator) -> Field:
    return np.asarray((np.floor(x) + np.floor(y * (0.5 + 1.5 * shape))) % 2, dtype=np.float64)


def _dots(x: Field, y: Field, shape: float, rng: np.random.Generator) -> Field:
    shifted = x + 0.5 * (np.floor(y) % 2)
    return _edge(np.hypot(shifted % 1.0 - 0.5, y % 1.0 - 0.5) - (0.12 + 0.4 * shape))


def _bricks(x: Field, y: Field, shape: float, rng: np.random.Generator) -> Field:
    along = (x * (0.3 + shape) + 0.5 * (np.floor(y) % 2)) % 1.0
    return _edge(0.12 - np.minimum(np.abs(along - 0.5) * -1 + 0.5, np.abs(y % 1.0 - 0.5) * -1 + 0.5))


def _scales(x: Field, y: Field, shape: float, rng: np.random.Generator) -> Field:
    shifted = (x + 0.5 * (np.floor(y * 2) % 2)) % 1.0 - 0.5
    return _edge(np.abs(np.hypot(shifted, (y * 2) % 1.0) - 0.5) - 0.05 - 0.2 * shape)


def _zigzags(x: Field, y: Field, shape: float, rng: np.random.Generator) -> Field:
    return _edge(np.abs((x + 2.4 * shape * np.abs(y % 1.0 - 0.5)) % 1.0 - 0.5) - 0.25)


def _plaid(x: Field, y: Field, shape: float, rng: np.random.Generator) -> Field:
    return 0.5 * _edge(np.abs(x % 1.0 - 0.5) - 0.5 * shape) + 0.5 * _edge(np.abs(y % 1.0 - 0.5) - 0.2)


def _cells(x: Field, y: Field, shape: float, rng: np.random.Generator) -> Field:
    """Return the borders between the cells of a jittered grid of points; ``shape`` is the jitter."""
    phase = rng.uniform(1, 9)
    steps = [(dx, dy) for dx in (-1, 0, 1) for dy in (-1, 0, 1)]
    distances = np.stack([_seed_distance(x, y, shape, phase, dx, dy) for dx, dy in steps])
    nearest = np.partition(distances, 1, axis=0)
    return _edge(nearest[1] - nearest[0] - 0.14)


def _seed_distance(x: Field, y: Field, jitter: float, phase: float, dx: int, dy: int) -> Field:
    column, row = np.floor(x) + dx, np.floor(y) + dy
    noise_x = np.sin(column * 127.1 + row * 311.7 + phase) * 4375.85 % 1.0
    noise_y = np.sin(column * 269.5 + row * 183.3 + phase) * 4375.85 % 1.0
    distance = np.hypot(column + 0.5 + jitter * (noise_x - 0.5) - x, row + 0.5 + jitter * (noise_y - 0.5) - y)
    return np.asarray(distance)


def _clouds(x: Field, y: Field, shape: float, rng: np.random.Generator) -> Field:
    """Return a sum of random plane waves at about one period; ``shape`` stretches them along one axis."""
    angles, phases = rng.uniform(0, 2 * np.pi, 12), rng.uniform(0, 2 * np.pi, 12)
    along_x, along_y = np.cos(angles) * (1.2 - shape), np.sin(angles)
    waves = [np.cos(2 * np.pi * (a * x + b * y) + p) for a, b, p in zip(along_x, along_y, phases, strict=True)]
    return np.asarray(0.5 + np.sum(waves, axis=0) / 7.0)


FAMILIES: dict[str, Callable[[Field, Field, float, np.random.Generator], Field]] = {
    "stripes": _stripes,
    "waves": _waves,
    "checks": _checks,
    "dots": _dots,
    "bricks": _bricks,
    "scales": _scales,
    "zigzags": _zigzags,
    "plaid": _plaid,
    "cells": _cells,
    "clouds": _clouds,
}

LABELS = tuple(f"{family}-{p}-{s}" for family in FAMILIES for p in range(len(NUM_PERIODS)) for s in range(len(SHAPES)))
DEMO_CLASSES = LABELS[1::5]
PRETRAINING_CLASSES = tuple(label for label in LABELS if label not in DEMO_CLASSES)
