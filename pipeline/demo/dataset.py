"""The demo's image set: four drawn domains, written as PNG files and one table."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from grappa.core.randomness import key
from grappa.pipeline.demo import digits, glyphs, objects, textures

NUM_IMAGES_PER_CLASS = 26
WEIGHTS = Path(__file__).parent / "vit_demo.safetensors"  # of the preset `demo`


@dataclass(frozen=True)
class Domain:
    """One kind of drawn images: its classes for the demo and for the pretraining, and the function that draws one."""

    name: str
    demo_classes: tuple[str, ...]
    pretraining_classes: tuple[str, ...]
    draw: Callable[[str, np.random.Generator, np.random.Generator], NDArray[np.uint8]]


DOMAINS = tuple(
    Domain(module.__name__.rsplit(".", 1)[-1], module.DEMO_CLASSES, module.PRETRAINING_CLASSES, module.draw)
    for module in (digits, glyphs, objects, textures)
)


def draw_image(
    domain: Domain, label: str, number: int, *, purpose: str, seed: int, rendering: int = 0
) -> NDArray[np.uint8]:
    """Return (64, 64, 3) uint8, a rendering of the thing ``number`` of a class, as a function of the arguments only.

    Renderings of one thing (this letter in this typeface) differ in pose, colors, light, clutter and noise. ``purpose``
    ("demo" or "pretraining") is part of the random key: demo and pretraining never share a draw, at any seed.
    """
    thing = key(purpose, seed, domain.name, label, number)
    return domain.draw(label, np.random.default_rng(thing), np.random.default_rng(key(thing, rendering)))


def split_of(domain: Domain, label: str) -> str:
    """Return "train" or "test": every second class of a domain is for testing."""
    return ("train", "test")[domain.demo_classes.index(label) % 2]


def write_demo_images(folder: Path, *, seed: int = 0, num_images_per_class: int = NUM_IMAGES_PER_CLASS) -> Path:
    """Draw the demo's images into ``folder`` and return its table ``demo.csv`` (path, domain, label, split).

    Images are 64 x 64 PNG files ``DOMAIN/LABEL/NUMBER.png``; paths in the table are relative to ``folder``. A file
    depends only on ``seed`` and its name; existing files are overwritten.
    """
    if num_images_per_class < 2:
        raise ValueError(f"num_images_per_class is {num_images_per_class}; a class needs at least 2 images.")
    rows = [_write_image(folder, *place, seed=seed) for place in _places(num_images_per_class)]
    table = folder / "demo.csv"
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("path", "domain", "label", "split"))
        writer.writerows(rows)
    return table


def _places(num_images_per_class: int) -> Iterator[tuple[Domain, str, int]]:
    for domain in DOMAINS:
        for label in domain.demo_classes:
            for number in range(num_images_per_class):
                yield domain, label, number


def _write_image(folder: Path, domain: Domain, label: str, number: int, *, seed: int) -> tuple[str, str, str, str]:
    relative = f"{domain.name}/{label}/{number:03d}.png"
    path = folder / relative
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = draw_image(domain, label, number, purpose="demo", seed=seed)
    Image.fromarray(pixels).save(path, compress_level=1)
    return relative, domain.name, label, split_of(domain, label)
