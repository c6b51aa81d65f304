"""Attention propagation: who is whose partner."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

from grappa.images.transforms import Augmentation
from grappa.method.fusion_training import PropagationLoss, train_fusion
from grappa.training.batches import Runtime, Views
from grappa.training.loop import Optimization
from tests.helpers.tiny import tiny_backbone, tiny_cache, tiny_set

ROWS, NUM_EPOCHS = np.arange(2, 16), 24


def test_a_partner_is_any_of_the_neighbors_and_another_one_from_epoch_to_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    views = Views(tiny_cache(tmp_path / "pixels", 16), np.arange(100, 116, dtype=np.uint64), 32, Augmentation())
    neighbors = np.stack([np.roll(ROWS, -shift) for shift in (1, 2, 3)], axis=1)
    drawn, draw = list[np.ndarray](), Views.draw

    def recorded(self: Views, number: int, rows: np.ndarray) -> torch.Tensor:
        drawn.append(rows)
        return draw(self, number, rows)

    monkeypatch.setattr(Views, "draw", recorded)
    train_fusion(
        tiny_backbone(),
        [tiny_set(number) for number in range(2)],
        views,
        ROWS,
        neighbors,
        level="token",
        attention_temperature=1.0,
        propagation=PropagationLoss(),
        initial_std=0.02,
        optimization=Optimization(NUM_EPOCHS, 7, 1e-3, 0.0, 0.0),
        seed=0,
        run=Runtime(torch.device("cpu"), "float32"),
    )
    shifts = defaultdict[int, list[int]](list)
    for own, partners in zip(drawn[::2], drawn[1::2], strict=True):
        for row, partner in zip(own, partners, strict=True):
            shifts[int(row)].append(neighbors[int(row) - 2].tolist().index(partner))
    assert set(shifts) == set(ROWS.tolist()) and all(len(found) == NUM_EPOCHS for found in shifts.values())
    assert all(len(set(found)) > 1 for found in shifts.values()), "an image keeps one partner"
    counts = np.bincount(np.concatenate(list(shifts.values())), minlength=3) / (NUM_EPOCHS * len(ROWS))
    np.testing.assert_allclose(counts, 1 / 3, atol=0.1)
