"""The pictures of a report: inside of its page as data URIs, or as files beside it. Both their sides are bounded."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

from grappa.pipeline.opening import published_pixels
from grappa.pipeline.pages.explore.thumbnails import jpeg
from grappa.pipeline.pages.report import figures
from grappa.pipeline.store.artifacts import RunFolder

FIGURES, THUMBNAILS = "figures", "images"
MAX_SIDE = 256
PIXELS_PER_INCH = 96


@dataclass(frozen=True)
class Shown:
    """A picture of ``row`` of the image table; ``right``: whether it has the query's class, None where not known.

    ``new``: it is not among the nearest images of the model before.
    """

    row: int
    domain: str
    label: str
    path: str
    similarity: float | None = None
    right: bool | None = None
    new: bool = False

    @classmethod
    def of(cls, table: pd.DataFrame, row: int, **more: Any) -> Shown:
        """Return the picture of a row of a table with the columns domain, label and path."""
        line = table.iloc[row]
        label = "" if pd.isna(line["label"]) else str(line["label"]).removeprefix(f"{line['domain']}/")
        return cls(row, str(line["domain"]), label, str(line["path"]), **more)


@dataclass(frozen=True)
class Drawing:
    """The address of a figure, and its width in pixels."""

    source: str
    width: int


class Pictures:
    """Gives each picture its address in the page. ``folder``: where files are written; None: all is in the page."""

    def __init__(self, run: RunFolder, folder: Path | None) -> None:
        self._run, self._folder, self._known = run, folder, dict[int, str]()
        self._pixels = published_pixels(run)
        for name in (FIGURES, THUMBNAILS) if folder else ():
            (folder / name).mkdir()  # type: ignore[operator]

    def check(self, rows: Iterable[int]) -> None:
        """Compare the files that hold the pixels of some rows with their manifest; ValueError for a damaged one."""
        published_pixels(self._run, list(rows))

    def image(self, row: int) -> str:
        """Return the address of the JPEG of an image, of at most ``MAX_SIDE`` pixels a side."""
        if row not in self._known:
            image = Image.fromarray(np.array(self._pixels.image(row)))
            image.thumbnail((MAX_SIDE, MAX_SIDE))
            self._known[row] = self._address(f"{THUMBNAILS}/{row:07d}.jpg", jpeg(image), "image/jpeg")
        return self._known[row]

    def figure(self, name: str, figure: Figure) -> Drawing:
        """Return the address of a figure as SVG."""
        buffer = io.BytesIO()
        figures.save(figure, buffer)
        source = self._address(f"{FIGURES}/{name}.svg", buffer.getvalue(), "image/svg+xml")
        return Drawing(source, round(figure.get_figwidth() * PIXELS_PER_INCH))

    def _address(self, file: str, data: bytes, kind: str) -> str:
        if self._folder is None:
            return f"data:{kind};base64,{base64.b64encode(data).decode()}"
        (self._folder / file).write_bytes(data)
        return file
