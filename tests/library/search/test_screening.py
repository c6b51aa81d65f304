"""No product that matters is missed, however the rounding to bfloat16 falls out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from grappa.search import screening
from grappa.search.screening import Screen, half_step, reaching


@pytest.fixture(autouse=True)
def look_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screening, "MAX_SHARE", 1)


def rounded_down(width: int = 63) -> torch.Tensor:
    """A vector about 1 long, each number of which loses almost half a bfloat16 step: errors add up, none cancels."""
    return torch.full((1, width), 0.125 * (1 + 0.98 * 2**-8))


def test_the_error_bound_holds_in_the_worst_case_and_is_needed_there() -> None:
    vector = rounded_down()
    products, error = Screen(vector, 1).products(vector)
    away = float(vector[0].double() @ vector[0].double()) - float(products)
    step = float(half_step(products.float())[0, 0])
    assert step + 0.003 < away <= error + step


def test_a_larger_product_is_found_where_rounding_hides_it() -> None:
    vector = rounded_down()
    true = float(vector[0].double() @ vector[0].double())
    found = Screen(vector, 1).larger(vector, torch.tensor([true - 1e-4]))
    assert found is not None and [part.tolist() for part in found] == [[0], [0]]


@pytest.mark.parametrize("seed", range(5))
def test_all_larger_and_all_largest_products_are_found(seed: int) -> None:
    random = np.random.default_rng(seed)
    both = random.normal(size=(500, 40)) + 2.0 * random.normal(size=40)
    units = torch.from_numpy(both / np.linalg.norm(both, axis=1, keepdims=True)).float()
    points, columns = units[:200], units[200:]
    exact = points.double() @ columns.double().T
    floors = exact.float().quantile(0.99, dim=1)
    screen = Screen(columns, 200)
    larger, largest = screen.larger(points, floors), screen.largest(points, floors)
    assert larger is not None and largest is not None
    wanted = set(zip(*torch.nonzero(exact > floors[:, None]).T.tolist(), strict=True))
    assert wanted <= set(zip(*(part.tolist() for part in larger), strict=True))
    best = set(enumerate(exact.argmax(1).tolist()))
    assert best <= set(zip(*(part.tolist() for part in largest), strict=True))
    assert len(largest[0]) < len(larger[0]) < 0.2 * exact.numel()


def test_a_floor_that_is_no_bfloat16_number_is_rounded_down() -> None:
    products = torch.tensor([[0.5, 0.50390625, 0.25]]).bfloat16()
    found = reaching(products, torch.tensor([0.502]))
    assert found is not None and found[1].tolist() == [0, 1]


def test_a_row_is_returned_whole_when_its_floor_is_not_positive() -> None:
    products = torch.tensor([[-0.5, -0.25, 0.5], [0.75, 0.5, -1.0]]).bfloat16()
    found = reaching(products, torch.tensor([-0.3, 0.6]))
    assert found is not None
    assert found[0].tolist() == [0, 0, 0, 1] and found[1].tolist() == [0, 1, 2, 0]


def test_too_many_close_products_are_left_to_a_plain_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screening, "MAX_SHARE", 64)
    assert reaching(torch.ones(4, 100).bfloat16(), torch.full((4,), 0.5)) is None
