"""The student: one set that embeds as its teacher does, whatever the labels and the interruptions."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from grappa.backbone.frozen import embed
from grappa.images.transforms import Augmentation, eval_batch, normalize
from grappa.method import losses
from grappa.method.adaptors import AdaptorSet
from grappa.method.fusion import Fusion
from grappa.method.student import Compared, Transfer, new_student, train_student
from grappa.metrics.whitening import fit_whitening
from grappa.training.batches import Runtime, Views
from grappa.training.loop import FitResult, Optimization
from tests.helpers.tiny import tiny_backbone, tiny_cache, tiny_set

HALF = (0.5, 0.5, 0.5)
CPU = torch.device("cpu")
ROWS = np.arange(2, 16)


@pytest.fixture
def views(tmp_path: Path) -> Views:
    augmentation = Augmentation(min_crop=0.8, flip=0.5)
    return Views(tiny_cache(tmp_path / "pixels", 16), np.arange(100, 116, dtype=np.uint64), 32, augmentation)


def _teacher() -> Fusion:
    fusion = Fusion([tiny_set(i) for i in range(2)])
    fusion.start(query_std=0.3, key_std=0.3, generator=torch.Generator().manual_seed(9))
    return fusion.requires_grad_(False)


def _train(
    views: Views, run: Runtime, *, num_epochs: int = 20, whitening_power: float = 0.5
) -> tuple[AdaptorSet, FitResult]:
    backbone = tiny_backbone()
    return train_student(
        backbone,
        _teacher().folded(),
        views,
        ROWS,
        start=new_student(backbone, 4, seed=0),
        transfer=Transfer(bank_size=8, whitening_power=whitening_power),
        optimization=Optimization(num_epochs, 7, 0.01, 0.0, 0.1),
        seed=0,
        run=run,
    )


def _embeddings(views: Views, student: AdaptorSet) -> tuple[Tensor, Tensor]:
    backbone = tiny_backbone()
    images = normalize(eval_batch(views.cache, np.arange(16), image_size=32, crop_fraction=1.0), HALF, HALF)
    with torch.no_grad():
        mine, wanted = (embed(backbone, images, each) for each in (student, _teacher()))
    return mine, wanted


def _similarity(views: Views, student: AdaptorSet) -> float:
    mine, wanted = _embeddings(views, student)
    return float((mine * wanted).sum(1).mean())


def test_a_new_student_is_the_backbone_and_a_trained_one_is_near_its_teacher(views: Views) -> None:
    untrained = new_student(tiny_backbone(), 4, seed=0)
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(
            embed(tiny_backbone(), images, untrained), embed(tiny_backbone(), images), rtol=0, atol=0
        )
    student, result = _train(views, Runtime(CPU, "float32"))
    before, after = _similarity(views, untrained), _similarity(views, student)
    assert 1 - after < 0.5 * (1 - before), (before, after)
    first, last = result.metrics[0], result.metrics[-1]
    assert set(last) == {"step", "epoch", "learning_rate", "loss", "similarity"}
    assert last["loss"] < first["loss"] and last["similarity"] > first["similarity"]


def test_a_student_that_learned_whitened_finds_more_of_what_its_teacher_finds_behind_a_whitening(views: Views) -> None:
    apart = {}
    for power in (0.0, 0.5):
        student, _ = _train(views, Runtime(CPU, "float32"), whitening_power=power)
        mine, wanted = (_whitened_similarities(each.numpy()) for each in _embeddings(views, student))
        apart[power] = 1 - np.corrcoef(mine, wanted)[0, 1]
    assert apart[0.5] < 0.9 * apart[0.0], apart


def _whitened_similarities(embeddings: NDArray[np.float32]) -> NDArray[np.float32]:
    whitened = fit_whitening(embeddings[ROWS], power=0.5, min_share=0.003).apply(embeddings)
    return (whitened @ whitened.T).ravel()


def test_a_small_bank_leaves_no_direction_free(views: Views) -> None:
    bank = torch.eye(8)[:3]
    compared = Compared(bank, 0.5)
    inside, outside = bank[0] + bank[1], bank[0] + bank[1] + torch.eye(8)[6]
    assert torch.nn.functional.cosine_similarity(compared(inside), compared(outside), dim=0) < 0.9


def test_the_teacher_is_not_changed_and_gets_no_gradient(views: Views) -> None:
    teacher = _teacher().folded()
    before = copy.deepcopy(teacher.state_dict())
    backbone = tiny_backbone()
    train_student(
        backbone,
        teacher,
        views,
        ROWS,
        start=new_student(backbone, 4, seed=0),
        transfer=Transfer(),
        optimization=Optimization(1, 7, 0.01, 0.0, 0.1),
        seed=0,
        run=Runtime(CPU, "float32"),
    )
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    frozen = tiny_backbone().model.state_dict()
    assert all(torch.equal(frozen[name], value) for name, value in backbone.model.state_dict().items())
    assert all(parameter.grad is None for parameter in backbone.parameters())


class _Stop(RuntimeError):
    pass


class _Memory:
    """Keeps the state of every third step; stops the training once."""

    def __init__(self, stop_at: int) -> None:
        self.kept: tuple[dict[str, Tensor], dict[str, Any]] | None = None
        self.calls, self.stop_at = 0, stop_at

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        return self.kept

    def due(self) -> bool:
        self.calls += 1
        if self.calls == self.stop_at:
            raise _Stop
        return self.calls % 3 == 0

    def save(self, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        self.kept = copy.deepcopy(dict(tensors)), copy.deepcopy(dict(record))


def test_an_interrupted_training_ends_with_the_same_bits(views: Views) -> None:
    whole, metrics = _train(views, Runtime(CPU, "float32"), num_epochs=6)
    memory = _Memory(stop_at=8)
    with pytest.raises(_Stop):
        _train(views, Runtime(CPU, "float32", memory), num_epochs=6)
    resumed, again = _train(views, Runtime(CPU, "float32", memory), num_epochs=6)
    assert memory.kept is not None
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())
    assert again.metrics == metrics.metrics


class _Mirrored:
    """Stands for object views: the cache's images upside down."""

    def __init__(self, views: Views) -> None:
        self.views = views

    def __len__(self) -> int:
        return len(self.views.cache)

    def image(self, row: int) -> Any:
        return self.views.cache.image(row)[::-1]


def test_object_views_are_taught_by_their_share(views: Views) -> None:
    """One batch of all rows, one step: what is told is the loss of the new student, a mean of the two teachers'."""

    def told(share: float, objects: Any) -> float:
        _, result = train_student(
            tiny_backbone(),
            _teacher().folded(),
            views,
            ROWS,
            start=new_student(tiny_backbone(), 4, seed=0),
            transfer=Transfer(object_share=share),
            optimization=Optimization(1, len(ROWS), 1e-3, 0.0, 0.0),
            seed=0,
            run=Runtime(CPU, "float32"),
            objects=objects,
        )
        return float(result.metrics[0]["loss"])

    without, none, half, only = told(0, None), *(told(share, _Mirrored(views)) for share in (0.0, 0.5, 1.0))
    assert none == pytest.approx(without, rel=1e-5)
    assert half == pytest.approx((none + only) / 2, rel=1e-5)
    assert only != pytest.approx(none, rel=0.01)


def test_the_bank_holds_train_images_as_the_teacher_sees_them(views: Views, monkeypatch: pytest.MonkeyPatch) -> None:
    banks, real = list[Tensor](), losses.perception_transfer

    def recorded(learned: Tensor, taught: Tensor, bank: Tensor, **options: float) -> Tensor:
        banks.append(bank)
        return real(learned, taught, bank, **options)

    monkeypatch.setattr(losses, "perception_transfer", recorded)
    _train(views, Runtime(CPU, "float32"), num_epochs=1, whitening_power=0.0)
    images = normalize(eval_batch(views.cache, np.arange(16), image_size=32, crop_fraction=1.0), HALF, HALF)
    with torch.no_grad():
        taught, plain = (embed(tiny_backbone(), images, each) for each in (_teacher().folded(), None))
    assert float((taught * plain).sum(1).max()) < 0.999, "the teacher differs from the plain backbone"
    for bank in banks:
        nearest = (bank @ taught.T).max(1)
        torch.testing.assert_close(nearest.values, torch.ones(8), atol=1e-5, rtol=0)
        assert set(nearest.indices.tolist()) <= set(ROWS.tolist()) and len(set(nearest.indices.tolist())) == 8
