"""Domain `glyphs`: printed characters; a class is a character in any typeface.

The demo uses capital Latin letters. The pretraining uses other characters, none of which looks like a capital letter.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from grappa.pipeline.demo import drawing

DEMO_CLASSES = tuple("ABCDEFGHJKLMNPQRSTUVWXYZ")
PRETRAINING_CLASSES = tuple("ΓΔΘΛΞΠΣΦΨΩαβγδεζηθλμξπρστφψωБДЖЗИЛЦЧШЩЪЫЬЭЮЯabdefghilmnqrt&@#%?!§€£¶+=<>")  # noqa: RUF001

FONTS = (
    *(f"DejaVuSans{style}.ttf" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{style}.ttf" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}.ttf" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}.ttf" for style in ("", "Bol", "Italic", "BolIta")),
)

_FONT_SIZE = 84  # pixels of the canvas


def draw(label: str, identity: np.random.Generator, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Return (64, 64, 3) uint8: ``identity`` picks the typeface of ``label``, ``rng`` pose, colors and clutter."""
    ink, paper = drawing.ink_and_paper(label, rng)
    image = Image.new("RGB", (drawing.CANVAS_SIZE, drawing.CANVAS_SIZE), paper)
    drawing.add_strokes(image, rng, color=drawing.blend(paper, ink, rng.uniform(0.15, 0.7)), max_strokes=3)
    mask = drawing.posed(
        _character_mask(label, identity),
        angle=rng.normal(0, 7),
        scale=rng.uniform(0.9, 1.2),
        shear=rng.normal(0, 0.1),
        shift=(rng.normal(0, 4), rng.normal(0, 4)),
    )
    image.paste(ink, mask=mask)
    return drawing.finish(image, rng, noise=0.05)


def _character_mask(label: str, identity: np.random.Generator) -> Image.Image:
    mask = Image.new("L", (drawing.CANVAS_SIZE, drawing.CANVAS_SIZE))
    hollow = identity.uniform() < 0.1
    center = (drawing.CANVAS_SIZE / 2, drawing.CANVAS_SIZE / 2)
    font = _font(FONTS[identity.integers(len(FONTS))])
    draw_on = ImageDraw.Draw(mask)
    if hollow:  # only an outline: the stroke has ink, the inside is empty
        draw_on.text(center, label, fill=0, font=font, anchor="mm", stroke_width=3, stroke_fill=255)
    else:
        draw_on.text(center, label, fill=255, font=font, anchor="mm")
    return mask


@lru_cache(maxsize=len(FONTS))
def _font(name: str) -> ImageFont.FreeTypeFont:
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name
    return ImageFont.truetype(str(path), _FONT_SIZE, layout_engine=ImageFont.Layout.BASIC)
