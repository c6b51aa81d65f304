"""Every loss equals its formula written out in numpy float64 and has its gradient, also a softmax in chunks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck
from torch.nn import functional as F

from grappa.method import losses
from tests.helpers.rounding import assert_same_sums

GENERATOR = torch.Generator().manual_seed(0)


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


def _attention(*shape: int) -> torch.Tensor:
    return _random(*shape).softmax(-1)


def test_norm_softmax_is_the_written_formula() -> None:
    x, p, y = _random(5, 8), _random(7, 8), torch.tensor([0, 6, 3, 3, 1])
    unit_x = x.numpy() / np.linalg.norm(x.numpy(), axis=1, keepdims=True)
    unit_p = p.numpy() / np.linalg.norm(p.numpy(), axis=1, keepdims=True)
    logits = unit_x @ unit_p.T / 0.05
    expected = np.mean([np.log(np.exp(row).sum()) - row[label] for row, label in zip(logits, y, strict=True)])
    np.testing.assert_allclose(losses.norm_softmax(x, p, y, temperature=0.05), expected, rtol=1e-12)


def test_barlow_twins_is_the_written_formula() -> None:
    x, y = _random(16, 6), _random(16, 6)
    a, b = ((v - v.mean(0)) / np.sqrt(v.var(0) + 1e-6) for v in (x.numpy(), y.numpy()))
    c = a.T @ b / 16
    off = sum(c[i, j] ** 2 for i in range(6) for j in range(6) if i != j)
    expected = (sum((c[i, i] - 1) ** 2 for i in range(6)) + 0.01 * off) / 6
    np.testing.assert_allclose(losses.barlow_twins(x, y, off_diagonal=0.01), expected, rtol=1e-12)


def test_attention_propagation_is_the_written_formula() -> None:
    a, b = _attention(5, 2, 4), _attention(5, 2, 4)

    def entropy(p: np.ndarray) -> np.ndarray:
        return -(p * np.log(p)).sum(-1)

    both = np.concatenate([a.numpy(), b.numpy()])
    agreement = -np.log((a.numpy() * b.numpy()).sum(-1)).mean()
    expected = agreement + entropy(both).mean() - 0.7 * entropy(both.mean(0)).mean()
    np.testing.assert_allclose(losses.attention_propagation(a, b, marginal_weight=0.7), expected, rtol=1e-12)


def test_attention_propagation_prefers_informative_attention_shared_by_neighbors() -> None:
    one_hot = torch.eye(4, dtype=torch.float64)[:, None, :].repeat(2, 1, 1)
    uniform, same = torch.full_like(one_hot, 0.25), torch.zeros_like(one_hot)
    same[..., 0] = 1
    best = losses.attention_propagation(one_hot, one_hot)
    for worse in ((uniform, uniform), (same, same), (one_hot, one_hot.roll(1, 0))):
        assert best < losses.attention_propagation(*worse) - 0.1


def test_swapped_attention_is_the_written_formula() -> None:
    a, b = _attention(6, 1, 3), _attention(6, 1, 3)

    def target(p: np.ndarray) -> np.ndarray:
        q = p**2
        for _ in range(3):
            q = q / q.sum(0, keepdims=True)
            q = q / q.sum(-1, keepdims=True)
        return q

    first = -(target(b.numpy()) * np.log(a.numpy())).sum(-1).mean()
    second = -(target(a.numpy()) * np.log(b.numpy())).sum(-1).mean()
    np.testing.assert_allclose(losses.swapped_attention(a, b, sharpness=2.0), (first + second) / 2, rtol=1e-12)


def test_perception_transfer_is_the_written_formula() -> None:
    student, teacher, bank = _random(5, 4), _random(5, 4), _random(7, 4)
    x, z, c = (each.numpy() / np.linalg.norm(each.numpy(), axis=1, keepdims=True) for each in (student, teacher, bank))

    def shares(rows: np.ndarray) -> np.ndarray:
        exponentials = np.exp(rows @ c.T / (0.1 * 3.0))
        return exponentials / exponentials.sum(1, keepdims=True)

    p, q = shares(z), shares(x)
    expected = 9.0 * (p * np.log(p / q)).sum(1).mean() + 0.7 * (1 - (x * z).sum(1)).mean()
    settings = {"temperature": 0.1, "softening": 3.0, "cosine_weight": 0.7}
    np.testing.assert_allclose(losses.perception_transfer(student, teacher, bank, **settings), expected, rtol=1e-12)
    np.testing.assert_allclose(losses.perception_transfer(2 * teacher, teacher, bank, **settings), 0, atol=1e-12)


def test_the_teacher_and_the_bank_carry_no_gradient() -> None:
    student, teacher, bank = (_random(5, 4).requires_grad_() for _ in range(3))
    losses.perception_transfer(student, teacher, bank, temperature=0.1).backward()
    assert student.grad is not None
    assert teacher.grad is None and bank.grad is None
    fixed = teacher.detach(), bank.detach()
    assert gradcheck(lambda x: losses.perception_transfer(x, *fixed, temperature=0.5), (student,))


def test_gradients_are_those_of_the_formulas() -> None:
    x, y, p = (_random(6, 4).requires_grad_() for _ in range(3))
    labels = torch.tensor([0, 1, 2, 3, 4, 5])
    assert gradcheck(lambda u, v: losses.norm_softmax(u, v, labels, temperature=0.5), (x, p))
    assert gradcheck(lambda u, v: losses.barlow_twins(u, v, off_diagonal=0.1), (x, y))
    logits = (_random(5, 2, 3).requires_grad_(), _random(5, 2, 3).requires_grad_())
    assert gradcheck(lambda u, v: losses.attention_propagation(u.softmax(-1), v.softmax(-1)), logits)


def test_the_swapped_target_carries_no_gradient() -> None:
    a, b = _random(5, 1, 3).requires_grad_(), _random(5, 1, 3).requires_grad_()
    losses.swapped_attention(a.softmax(-1), b.softmax(-1).detach(), sharpness=2.0).backward()
    assert a.grad is not None
    assert b.grad is None


def problem(num_classes: int, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(12, 16, generator=generator)
    proxies = 3.0 * torch.randn(num_classes, 16, generator=generator)
    return embeddings, proxies, torch.randint(0, num_classes, (12,), generator=generator)


def both(num_classes: int, temperature: float, monkeypatch: pytest.MonkeyPatch) -> list[list[torch.Tensor]]:
    """Loss and both gradients, in one piece (float64) and in chunks of 7 classes (float32)."""
    monkeypatch.setattr(losses, "CHUNK", 7)
    found = []
    for large, dtype in ((10**9, torch.float64), (1, torch.float32)):
        monkeypatch.setattr(losses, "LARGE", large)
        embeddings, proxies, labels = problem(num_classes)
        leaves = [embeddings.to(dtype).requires_grad_(), proxies.to(dtype).requires_grad_()]
        loss = losses.norm_softmax(*leaves, labels, temperature=temperature)
        found.append([loss.detach(), *torch.autograd.grad(3.0 * loss, leaves)])
    return found


@pytest.mark.parametrize("num_classes", [2, 7, 50])
@pytest.mark.parametrize("temperature", [0.005, 0.07, 1.0])
def test_a_loss_in_chunks_and_its_gradients_are_those_of_the_plain_formula(
    num_classes: int, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, large = both(num_classes, temperature, monkeypatch)
    for one, other in zip(plain, large, strict=True):
        assert other.dtype == torch.float32
        # An error of a cosine, a sum of 16, counts 1 / temperature times as much in the softmax.
        assert_same_sums(other, one, terms=round(16 / temperature) + 12 * num_classes)


@pytest.mark.parametrize("large", [10**9, 1])
def test_the_same_products_tell_each_images_loss_and_whether_its_class_is_nearest(
    large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "CHUNK", 7)
    monkeypatch.setattr(losses, "LARGE", large)
    embeddings, proxies, labels = problem(20)
    logits = F.normalize(embeddings.double()) @ F.normalize(proxies.double()).T / 0.1
    labels[:4] = logits[:4].argmax(1)
    proxies[19] = proxies[labels[0]]  # as near as the own one, which counts
    logits[:, 19] = logits[:, labels[0]]
    found = losses.classified(embeddings.requires_grad_(), proxies.requires_grad_(), labels, temperature=0.1)
    own = logits.gather(1, labels[:, None])[:, 0]
    assert found.right_B.tolist() == (own >= logits.amax(1)).tolist()
    assert 0 < found.right_B.sum() < 12
    assert_same_sums(found.losses_B, F.cross_entropy(logits, labels, reduction="none"), terms=16 * 10)
    assert_same_sums(found.loss, F.cross_entropy(logits, labels), terms=16 * 10)
    assert not found.losses_B.requires_grad and found.loss.requires_grad


def test_only_a_large_softmax_is_computed_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []

    def spy(*arguments: torch.Tensor) -> losses.Classified:
        used.append(len(arguments[1]))
        return losses.Classified(*torch.zeros(3))

    monkeypatch.setattr(losses, "large_norm_softmax", spy)
    monkeypatch.setattr(losses, "LARGE", 12 * 50)
    for num_classes in (49, 50):
        embeddings, proxies, labels = problem(num_classes)
        losses.norm_softmax(embeddings, proxies, labels, temperature=0.1)
    assert used == [50]


def test_the_gradient_in_chunks_can_be_taken_twice_of_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CHUNK", 7)
    embeddings, proxies, labels = problem(20)
    proxies.requires_grad_()
    loss = losses.large_norm_softmax(F.normalize(embeddings), proxies, labels, 0.1).loss
    (first,) = torch.autograd.grad(loss, proxies, retain_graph=True)
    (again,) = torch.autograd.grad(loss, proxies)
    assert torch.equal(first, again)
