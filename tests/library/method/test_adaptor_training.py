"""Training: only what should learn learns, it learns, and a resumed training is the same training."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from grappa.core.randomness import id_numbers
from grappa.images.transforms import Augmentation
from grappa.method.adaptor_training import (
    BACKGROUND,
    OBJECT,
    PLAIN,
    AdaptorLoss,
    Perception,
    _loss,
    new_adaptor_set,
    train_adaptor_set,
)
from grappa.method.fusion_training import PropagationLoss, train_fusion
from grappa.method.losses import WHOLE
from grappa.training.batches import BatchOrder, Runtime, Views
from grappa.training.loop import Optimization, fit, schedule
from grappa.training.targets import Targets
from tests.helpers.tiny import tiny_backbone, tiny_cache, tiny_set

NUM = 40
ROWS = np.arange(4, NUM)
LABELS = ROWS % 4
TARGETS = (Targets(LABELS, np.random.default_rng(0).normal(size=(4, 32)).astype(np.float32)),)
CPU = torch.device("cpu")
OPTIMIZATION = Optimization(num_epochs=3, batch_size=8, learning_rate=3e-3, weight_decay=0.01, warmup=0.1)


class Killed(Exception):
    """Stands for a crash."""


class MemoryCheckpoint:
    """Saves at every step; a crash comes right after the given one."""

    def __init__(self, crash_at: int | None = None) -> None:
        self.kept: tuple[dict[str, torch.Tensor], dict[str, Any]] | None = None
        self.crash_at, self.num_saved = crash_at, 0

    def load(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        return self.kept

    def due(self) -> bool:
        return True

    def save(self, tensors: dict[str, torch.Tensor], record: dict[str, Any]) -> None:
        self.kept = (
            {name: value.clone() for name, value in tensors.items()},
            {**record, "metrics": [*record["metrics"]]},
        )
        self.num_saved += 1
        if self.num_saved == self.crash_at:
            raise Killed


@pytest.fixture(scope="module")
def views(tmp_path_factory: pytest.TempPathFactory) -> Views:
    cache = tiny_cache(tmp_path_factory.mktemp("pixels"), NUM)
    ids = id_numbers([str(i) for i in range(NUM)])
    return Views(cache, ids, 32, Augmentation(0.7, 0.5, 0.2, 0.2, 0.2, 0.1))


def _train_set(views: Views, checkpoint: Any = None, *, targets: tuple[Targets, ...] = TARGETS, **changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "name": "k00004",
        "start": new_adaptor_set(tiny_backbone(), 4, name="k00004", seed=0),
        "adaptor_loss": AdaptorLoss(temperature=0.1),
        "proxy_learning_rate": 3e-3,
        "optimization": OPTIMIZATION,
        "seed": 0,
        "run": Runtime(CPU, "float32", checkpoint),
    }
    return train_adaptor_set(tiny_backbone(), views, ROWS, targets, **{**arguments, **changes})


def _train_fusion(views: Views, checkpoint: Any = None, **changes: Any) -> Any:
    neighbors = np.stack([(ROWS + 4) % NUM, (ROWS + 8) % NUM], axis=1)
    arguments: dict[str, Any] = {
        "level": "token",
        "attention_temperature": 1.0,
        "propagation": PropagationLoss(barlow_weight=0.1),
        "initial_std": 0.02,
        "optimization": OPTIMIZATION,
        "seed": 0,
        "run": Runtime(CPU, "float32", checkpoint),
    }
    sets = [tiny_set(i) for i in range(3)]
    return train_fusion(tiny_backbone(), sets, views, ROWS, neighbors, **{**arguments, **changes})


def test_a_set_learns_its_pseudo_labels(views: Views) -> None:
    longer = Optimization(num_epochs=12, batch_size=8, learning_rate=1e-2, weight_decay=0.0, warmup=0.1)
    _, result = _train_set(views, optimization=longer, proxy_learning_rate=1e-2, adaptor_loss=AdaptorLoss(0.02))
    assert result.metrics[-1]["loss"] < 0.7 * result.metrics[0]["loss"]
    assert result.metrics[-1]["step"] == 12 * (len(ROWS) // 8)


def test_several_targets_are_one_training_on_the_mean_of_their_losses(views: Views) -> None:
    coarse = Targets(ROWS % 2, np.random.default_rng(1).normal(size=(2, 32)).astype(np.float32))
    one_step = {"optimization": Optimization(1, len(ROWS), 3e-3, 0.01, 0.0), "adaptor_loss": AdaptorLoss(0.5)}
    together, *apart = (
        _train_set(views, targets=targets, **one_step)[1].metrics[0]
        for targets in ((*TARGETS, coarse), TARGETS, (coarse,))
    )
    for name in ("loss", "accuracy"):
        assert together[name] == pytest.approx(sum(each[name] for each in apart) / 2, rel=1e-6)
    assert apart[0]["loss"] != pytest.approx(apart[1]["loss"], rel=0.1)


def test_the_same_target_twice_is_the_training_on_it_alone(views: Views) -> None:
    once, twice = (_train_set(views, targets=TARGETS * number)[0].state_dict() for number in (1, 2))
    for name, tensor in once.items():
        torch.testing.assert_close(tensor, twice[name], rtol=1e-4, atol=1e-5)


def _train_on_two(views: Views, checkpoint: Any = None) -> Any:
    other = Targets(ROWS % 3, np.random.default_rng(2).normal(size=(3, 32)).astype(np.float32))
    return _train_set(views, checkpoint, targets=(*TARGETS, other))


def _train_on_views(views: Views, checkpoint: Any = None, **changes: Any) -> Any:
    adaptor_loss = AdaptorLoss(0.1, object_weight=1.0, transfer_weight=0.5, background_weight=0.5)
    arguments: dict[str, Any] = {
        "adaptor_loss": adaptor_loss,
        "perception": Perception(_Mirrored(views), _Mirrored(views)),
    }
    return _train_set(views, checkpoint, **{**arguments, **changes})


class _Mirrored:
    """Stands for object and background views: the cache's images upside down."""

    def __init__(self, views: Views) -> None:
        self.views = views

    def __len__(self) -> int:
        return len(self.views.cache)

    def image(self, row: int) -> np.ndarray[Any, Any]:
        return self.views.cache.image(row)[::-1]

    @property
    def known(self) -> np.ndarray[Any, Any]:
        return np.arange(len(self)) % 3 > 0


@pytest.mark.parametrize("crash_at", [1, 4, 9])
@pytest.mark.parametrize("train", [_train_set, _train_on_two, _train_on_views, _train_fusion])
def test_killed_and_resumed_equals_undisturbed_bit_for_bit(views: Views, train: Any, crash_at: int) -> None:
    whole, whole_result = train(views)
    checkpoint = MemoryCheckpoint(crash_at)
    with pytest.raises(Killed):
        train(views, checkpoint)
    resumed, resumed_result = train(views, checkpoint)
    state, again = whole.state_dict(), resumed.state_dict()
    assert all(torch.equal(state[name], again[name]) for name in state)
    assert json.dumps(whole_result.metrics) == json.dumps(resumed_result.metrics), "the very text is published"


def test_a_crash_between_two_records_leaves_the_metrics_as_they_would_be(views: Views, monkeypatch: Any) -> None:
    monkeypatch.setattr("grappa.training.loop.NUM_RECORDS", 3)
    whole = _train_set(views)[1]
    checkpoint = MemoryCheckpoint(6)
    with pytest.raises(Killed):
        _train_set(views, checkpoint)
    assert checkpoint.kept is not None
    assert checkpoint.kept[1]["since"] > 0, "the crash must fall between two records"
    assert json.dumps(_train_set(views, checkpoint)[1].metrics) == json.dumps(whole.metrics)


def test_only_adaptors_learn_and_the_backbone_keeps_its_bytes(views: Views, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny_backbone()
    before = _digest(backbone)
    seen: list[set[str]] = []
    real_fit = fit

    def spying_fit(module: torch.nn.Module, *arguments: Any) -> Any:
        result = real_fit(module, *arguments)
        seen.append({name for name, parameter in module.named_parameters() if parameter.grad is not None})
        return result

    for module in ("adaptor_training", "fusion_training"):
        monkeypatch.setattr(f"grappa.method.{module}.fit", spying_fit)
    monkeypatch.setattr(f"{__name__}.tiny_backbone", lambda: backbone)
    _train_set(views)
    _train_fusion(views, propagation=PropagationLoss())
    assert _digest(backbone) == before
    assert all(parameter.grad is None for parameter in backbone.parameters())
    assert {name.split(".")[0] for name in seen[0]} == {"set", "classifier"}
    assert {name.rsplit(".", 1)[1] for name in seen[1]} == {"query", "key"}


def test_fusion_moves_away_from_equal_attention_and_leaves_the_sets_alone(views: Views) -> None:
    fusion, result = _train_fusion(views)
    assert set(result.metrics[-1]) >= {"loss", "entropy", "marginal_entropy", "variance"}
    assert result.metrics[-1]["loss"] < result.metrics[0]["loss"]
    expected = torch.cat([tiny_set(i).outputs[0].down.weight for i in range(3)])
    assert torch.equal(fusion.outputs[0].down, expected)


def test_the_ablation_with_views_needs_no_neighbors(views: Views) -> None:
    backbone, sets = tiny_backbone(), [tiny_set(i) for i in range(2)]
    fusion, _ = train_fusion(
        backbone,
        sets,
        views,
        ROWS,
        None,
        level="cls",
        attention_temperature=1.0,
        propagation=PropagationLoss("swapped"),
        initial_std=0.02,
        optimization=OPTIMIZATION,
        seed=0,
        run=Runtime(CPU, "float32"),
    )
    assert fusion.outputs[0].level == "cls"


def test_a_fusion_with_no_loss_is_refused(views: Views) -> None:
    with pytest.raises(ValueError, match="nothing to train"):
        _train_fusion(views, propagation=PropagationLoss("none"))


def test_seeds_and_names_matter_worker_counts_do_not(views: Views) -> None:
    first = _train_set(views)[0].state_dict()
    other_seed, other_name = _train_set(views, seed=1)[0].state_dict(), _train_set(views, name="k00005")[0].state_dict()
    many = Views(views.cache, views.ids, views.image_size, views.augmentation, num_workers=3)
    same = _train_set(many)[0].state_dict()
    name = "adaptors.0.up.weight"
    assert torch.equal(first[name], same[name])
    assert not torch.equal(first[name], other_seed[name])
    assert not torch.equal(first[name], other_name[name])


def test_a_diverging_loss_stops_with_a_sentence(views: Views) -> None:
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        _train_set(views, adaptor_loss=AdaptorLoss(float("nan")))


def test_an_epoch_sees_each_row_once_in_an_order_of_its_own() -> None:
    order = BatchOrder(id_numbers([str(i) for i in range(21)]), 5, (0, "adaptors"))
    epochs = [np.concatenate([order.at(epoch * 4 + step)[0] for step in range(4)]) for epoch in range(2)]
    assert order.steps_per_epoch == 4
    assert all(len(set(rows)) == 20 for rows in epochs)
    assert list(epochs[0]) != list(epochs[1])


def test_the_rate_rises_then_falls_to_almost_zero() -> None:
    rates = [schedule(step, 100, 0.1) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == rates[10] == 1.0
    assert rates[99] < 0.001


def _digest(module: torch.nn.Module) -> str:
    tensors = module.state_dict().values()
    return hashlib.sha256(b"".join(value.numpy().tobytes() for value in tensors)).hexdigest()


def test_weights_of_zero_leave_the_training_as_it_is_without_object_views(views: Views) -> None:
    plain, _ = _train_set(views)
    unused, result = _train_on_views(views, adaptor_loss=AdaptorLoss(0.1), perception=Perception(_Mirrored(views)))
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(unused.state_dict()[name], tensor, rtol=1e-4, atol=1e-6)
    assert set(result.metrics[0]) >= {"accuracy", "object_accuracy", "transfer"}


def test_the_loss_is_its_parts_as_written(views: Views) -> None:
    """One batch of all rows, one step: the loss told is that of the untrained set."""
    once = Optimization(1, len(ROWS), 1e-3, 0.0, 0.0)
    weights = {"object_weight": 0.7, "transfer_weight": 0.3, "background_weight": 0.2}
    told = _train_on_views(views, optimization=once, adaptor_loss=AdaptorLoss(0.1, **weights))[1].metrics[0]["loss"]
    only = {name: AdaptorLoss(0.1, **{name: 1.0}) for name in weights}
    parts = {
        name: _train_on_views(views, optimization=once, adaptor_loss=each)[1].metrics[0]["loss"]
        for name, each in only.items()
    }
    plain = _train_set(views, optimization=once)[1].metrics[0]["loss"]
    assert told == pytest.approx(plain + sum(weights[name] * (parts[name] - plain) for name in weights), rel=1e-5)
    assert all(part > plain for part in parts.values())


@pytest.mark.parametrize("transfer_from", ["better", "all"])
def test_the_parts_equal_their_formulas_in_float64(transfer_from: Literal["better", "all"]) -> None:
    rng = np.random.default_rng(0)
    plain, seen, back, proxies, extra = (rng.normal(size=(n, 8)) for n in (5, 5, 5, 3, 1))
    labels, tau, soft = np.array([0, 1, 2, 2, 0]), 0.2, 2.0
    options = AdaptorLoss(
        tau,
        object_weight=0.7,
        transfer_weight=0.3,
        softening=soft,
        cosine_weight=0.4,
        background_weight=0.2,
        transfer_from=transfer_from,
    )

    def unit(x: Any) -> Any:
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    def log_softmax(x: Any) -> Any:
        return x - np.log(np.exp(x).sum(1, keepdims=True))

    def softmax_loss(x: Any, p: Any, y: Any) -> Any:
        return -log_softmax(unit(x) @ unit(p).T / tau)[np.arange(len(y)), y].mean()

    student, teacher = (log_softmax(unit(x) @ unit(proxies).T / (tau * soft)) for x in (plain, seen))
    transfer = soft**2 * (np.exp(teacher) * (teacher - student)).sum(1) + 0.4 * (1 - (unit(plain) * unit(seen)).sum(1))
    better = [
        softmax_loss(seen[[i]], proxies, labels[[i]]) < softmax_loss(plain[[i]], proxies, labels[[i]]) for i in range(5)
    ]
    assert 0 < sum(better) < 5
    transfer = np.mean(transfer * (np.array(better) if transfer_from == "better" else 1.0))
    expected = softmax_loss(plain, proxies, labels) + 0.7 * softmax_loss(seen, proxies, labels) + 0.3 * transfer
    known = np.array([True, False, True, True, False])
    expected += 0.2 * softmax_loss(back[known], np.concatenate([proxies, extra]), np.full(3, 3)) * 3 / 5
    embedded = {PLAIN: plain, OBJECT: seen, BACKGROUND: back}
    tensors = {kind: torch.from_numpy(value).requires_grad_() for kind, value in embedded.items()}
    classes = [(torch.from_numpy(proxies), torch.from_numpy(labels), WHOLE)]
    found, _ = _loss(tensors, classes, torch.from_numpy(known), torch.from_numpy(extra), options)
    assert float(found.detach()) == pytest.approx(expected, rel=1e-9)
    only_transfer = AdaptorLoss(tau, transfer_weight=1.0)
    _loss(tensors, classes, torch.from_numpy(known), None, only_transfer)[0].backward()
    assert tensors[OBJECT].grad is None or not tensors[OBJECT].grad.any(), "the teacher gets no gradient"


def test_where_no_object_view_is_better_nothing_is_transferred() -> None:
    proxies, labels = torch.eye(3), torch.tensor([0, 1, 2])
    embedded = {PLAIN: torch.eye(3).requires_grad_(), OBJECT: torch.eye(3)[[1, 2, 0]]}
    options = AdaptorLoss(0.1, transfer_weight=5.0)
    value, scalars = _loss(embedded, [(proxies, labels, WHOLE)], torch.zeros(3, dtype=torch.bool), None, options)
    alone, _ = _loss(
        {PLAIN: embedded[PLAIN]}, [(proxies, labels, WHOLE)], torch.zeros(3, dtype=torch.bool), None, options
    )
    assert float(scalars["transfer"]) == 0.0 and torch.equal(value, alone)


@pytest.mark.parametrize("large", [10**9, 1])
def test_a_batch_is_multiplied_with_all_proxies_once_by_each_kind_of_view(
    large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the accuracies and the choice of teachers need is in the products that the loss has."""
    monkeypatch.setattr("grappa.method.losses.LARGE", large)
    generator = torch.Generator().manual_seed(0)
    plain, seen, proxies = (torch.randn(n, 8, generator=generator) for n in (6, 6, 50))
    labels, once = torch.arange(6), 2 * 6 * 50 * 8
    found = {}
    for name, embedded in {"images": {PLAIN: plain}, "objects too": {PLAIN: plain, OBJECT: seen}}.items():
        with FlopCounterMode(display=False) as counter:
            _loss(embedded, [(proxies, labels, WHOLE)], torch.zeros(6, dtype=torch.bool), None, AdaptorLoss(0.1))
        found[name] = counter.get_total_flops()
    misses = [
        F.cross_entropy(F.normalize(each) @ F.normalize(proxies).T / 0.1, labels, reduction="none")
        for each in (plain, seen)
    ]
    num_taught = int((misses[1] < misses[0]).sum())
    assert 0 < num_taught < 6
    assert found == {"images": once, "objects too": 2 * once + 2 * num_taught * once // 6}


@pytest.mark.parametrize("bottleneck_dim", [0, 4])
def test_in_context_adaptors_learn_too(views: Views, bottleneck_dim: int) -> None:
    start = new_adaptor_set(tiny_backbone(), bottleneck_dim, in_context_rank=3, name="k00004", seed=0)
    before = {name: tensor.clone() for name, tensor in start.state_dict().items()}
    after = _train_set(views, start=start)[0].state_dict()
    assert all(not torch.equal(before[name], after[name]) for name in before)
