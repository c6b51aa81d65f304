"""Domain `digits`: two-digit numbers written by hand (scikit-learn's bundled 8x8 digits, side by side).

A class is a number such as "47". The demo and the pretraining share neither numbers nor handwritten samples.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits

from grappa.pipeline.demo import drawing

NUMBERS = tuple(f"{number:02d}" for number in range(100))
DEMO_CLASSES = NUMBERS[1:96:4]
PRETRAINING_CLASSES = tuple(number for number in NUMBERS if number not in DEMO_CLASSES)

_DIGIT_SIZE = 52  # pixels of the canvas
_OVERLAP = 14  # the 8x8 samples have empty margins


def draw(label: str, identity: np.random.Generator, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Return (64, 64, 3) uint8: ``identity`` picks the handwriting of ``label``, ``rng`` pose, colors and clutter."""
    ink, paper = drawing.ink_and_paper(label, rng)
    image = Image.new("RGB", (drawing.CANVAS_SIZE, drawing.CANVAS_SIZE), paper)
    drawing.add_strokes(image, rng, color=drawing.blend(paper, ink, rng.uniform(0.15, 0.6)), max_strokes=3)
    mask = drawing.posed(
        _number_mask(label, identity),
        angle=rng.normal(0, 6),
        scale=rng.uniform(1.05, 1.3),
        shear=rng.normal(0, 0.12),
        shift=(rng.normal(0, 3), rng.normal(0, 5)),
    )
    image.paste(ink, mask=mask)
    return drawing.finish(image, rng, noise=0.05)


def samples(digit: int, label: str) -> NDArray[np.uint8]:
    """Return the handwritten samples (M, 8, 8) uint8 of ``digit`` that the class ``label`` may use.

    Even samples belong to the numbers of the demo, odd samples to those of the pretraining.
    """
    return _samples_by_digit()[digit][(0 if label in DEMO_CLASSES else 1) :: 2]


def _number_mask(label: str, identity: np.random.Generator) -> Image.Image:
    mask = np.zeros((_DIGIT_SIZE, 2 * _DIGIT_SIZE - _OVERLAP), dtype=np.uint8)
    for place, character in enumerate(label):
        choices = samples(int(character), label)
        sample = Image.fromarray(choices[identity.integers(len(choices))])
        large = np.asarray(sample.resize((_DIGIT_SIZE, _DIGIT_SIZE), Image.Resampling.BICUBIC))
        left = place * (_DIGIT_SIZE - _OVERLAP)
        mask[:, left : left + _DIGIT_SIZE] = np.maximum(mask[:, left : left + _DIGIT_SIZE], large)
    return Image.fromarray(mask)


@lru_cache(maxsize=1)
def _samples_by_digit() -> tuple[NDArray[np.uint8], ...]:
    bundled = load_digits()
    images = np.clip(bundled.images * 17.0, 0, 255).astype(np.uint8)  # 0..16 -> 0..255
    return tuple(images[bundled.target == digit] for digit in range(10))
