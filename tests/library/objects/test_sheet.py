"""The sheet of images with their boxes: what is drawn where, whatever the domains are called."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd

from grappa.objects.sheet import contact_sheet
from tests.helpers.tiny import tiny_cache

GREEN, RED = (0, 200, 0), (230, 0, 0)
TILE, TITLE = 144, 18


def _table(domains: list[str], reasons: list[str]) -> pd.DataFrame:
    box = {"box_x0": 24.0, "box_y0": 10.0, "box_x1": 84.0, "box_y1": 70.0}
    table = pd.DataFrame({"domain": domains, "reason": reasons, "confidence": 0.5, "height": 80, "width": 96, **box})
    table.loc[table["reason"] == "no box", [*box, "confidence"]] = math.nan
    return table


def _has(part: np.ndarray, color: tuple[int, int, int]) -> bool:
    return bool((part == color).all(axis=-1).any())


def test_accepted_boxes_are_green_refused_ones_red_and_at_their_place(tmp_path: Path) -> None:
    cache = tiny_cache(tmp_path, 4)  # 40 x 48 pixels of originals of 80 x 96
    table = _table(["b", "a", "a", "a"], ["too small", "", "no box", "too large"])
    sheet = np.asarray(contact_sheet(table, cache, num_accepted=2, num_refused=2))
    first, second = sheet[: TILE + 2 * TITLE], sheet[TILE + 2 * TITLE + 4 :]
    tiles = [first[TITLE : TITLE + TILE, place * (TILE + 4) :][:, :TILE] for place in range(4)]
    assert [_has(tile, GREEN) for tile in tiles] == [True, False, False, False]
    assert [_has(tile, RED) for tile in tiles] == [False, False, False, True], "the one without a box has no frame"
    scale = TILE / 96
    rows, columns = np.nonzero((tiles[0] == GREEN).all(axis=-1))
    found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    np.testing.assert_allclose(found, [24 * scale, 10 * scale, 84 * scale, 70 * scale], atol=1)
    assert _has(second, RED) and not _has(second, GREEN)


def test_any_name_of_a_domain_and_too_many_domains_are_fine(tmp_path: Path) -> None:
    cache = tiny_cache(tmp_path, 30)
    table = _table(["\u9ce5 \u0442\u0435\u0441\u0442 %FF", *(f"d{number}" for number in range(29))], [""] * 30)
    assert contact_sheet(table, cache).height == 24 * (TILE + 2 * TITLE + 4)
