"""A sheet of images with their boxes, to look at: some images of each domain, accepted and refused boxes apart."""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from grappa.core.printing import printable
from grappa.images.pixels import ImageRows
from grappa.objects.boxes import NO_BOX

_TILE, _TITLE, _GAP = 144, 18, 4
_GREEN, _RED, _INK, _PAPER = (0, 200, 0), (230, 0, 0), (0, 0, 0), (255, 255, 255)


def contact_sheet(
    table: pd.DataFrame, cache: ImageRows, *, num_accepted: int = 7, num_refused: int = 3, max_domains: int = 24
) -> Image.Image:
    """Draw a row of images for each domain, its accepted boxes in green, then its refused ones in red.

    Args:
        table: row i is row i of the cache: domain, height and width (of the original whose pixels the boxes are in),
            box_x0 .. box_y1 (NaN: none), confidence, reason ("": accepted).
            The first rows of the first ``max_domains`` domains (by name) are drawn.
    """
    domains = sorted(table["domain"].unique())[:max_domains]
    width = (num_accepted + num_refused) * (_TILE + _GAP)
    sheet = Image.new("RGB", (width, len(domains) * (_TILE + 2 * _TITLE + _GAP)), _PAPER)
    for line, domain in enumerate(domains):
        top = line * (_TILE + 2 * _TITLE + _GAP)
        own = table[table["domain"] == domain]
        accepted = own["reason"] == ""
        title = f"{printable(domain)}: {int(accepted.sum())} of {len(own)} accepted"
        ImageDraw.Draw(sheet).text((_GAP, top + 2), title, fill=_INK)
        for place, row in enumerate(own.index[accepted][:num_accepted]):
            sheet.paste(_tile(table.loc[row], cache.image(row)), (place * (_TILE + _GAP), top + _TITLE))
        for place, row in enumerate(own.index[~accepted][:num_refused], start=num_accepted):
            sheet.paste(_tile(table.loc[row], cache.image(row)), (place * (_TILE + _GAP), top + _TITLE))
    return sheet


def _tile(row: pd.Series, pixels: NDArray[np.uint8]) -> Image.Image:
    """Return an image with its box, and below it the confidence and the reason of a refusal."""
    tile = Image.new("RGB", (_TILE, _TILE + _TITLE), _PAPER)
    scale = _TILE / max(pixels.shape[:2])
    size = (max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale)))
    tile.paste(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC), (0, 0))
    draw, color = ImageDraw.Draw(tile), _RED if row["reason"] else _GREEN
    if row["reason"] != NO_BOX:
        x_scale, y_scale = size[0] / row["width"], size[1] / row["height"]
        box = [row["box_x0"] * x_scale, row["box_y0"] * y_scale, row["box_x1"] * x_scale, row["box_y1"] * y_scale]
        draw.rectangle([box[0], box[1], max(box[0], box[2] - 1), max(box[1], box[3] - 1)], outline=color, width=2)
    confidence = "" if np.isnan(row["confidence"]) else f"{row['confidence']:.2f} "
    draw.text((2, _TILE + 2), f"{confidence}{row['reason']}", fill=color)
    return tile
