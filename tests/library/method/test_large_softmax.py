from __future__ import annotations

import pytest
import torch

from grappa.method import losses
from grappa.method import losses as large_softmax
from tests.helpers.rounding import assert_same_sums


def problem(num_classes: int, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(12, 16, generator=generator)
    proxies = 3.0 * torch.randn(num_classes, 16, generator=generator)
    return embeddings, proxies, torch.randint(0, num_classes, (12,), generator=generator)


def both(num_classes: int, temperature: float, monkeypatch: pytest.MonkeyPatch) -> list[list[torch.Tensor]]:
    """Loss and both gradients, in one piece (float64) and in chunks of 7 classes (float32)."""
    monkeypatch.setattr(large_softmax, "CHUNK", 7)
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
def test_loss_and_gradients_are_those_of_the_plain_formula(
    num_classes: int, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, large = both(num_classes, temperature, monkeypatch)
    for one, other in zip(plain, large, strict=True):
        assert other.dtype == torch.float32
        # An error of a cosine, a sum of 16, counts 1 / temperature times as much in the softmax.
        assert_same_sums(other, one, terms=round(16 / temperature) + 12 * num_classes)


def test_only_the_large_case_is_computed_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []

    def spy(*arguments: torch.Tensor) -> torch.Tensor:
        used.append(len(arguments[1]))
        return torch.zeros(())

    monkeypatch.setattr(losses, "large_norm_softmax", spy)
    monkeypatch.setattr(losses, "LARGE", 12 * 50)
    for num_classes in (49, 50):
        embeddings, proxies, labels = problem(num_classes)
        losses.norm_softmax(embeddings, proxies, labels, temperature=0.1)
    assert used == [50]


def test_the_gradient_can_be_taken_twice_of_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_softmax, "CHUNK", 7)
    embeddings, proxies, labels = problem(20)
    proxies.requires_grad_()
    loss = large_softmax.large_norm_softmax(torch.nn.functional.normalize(embeddings), proxies, labels, 0.1)
    (first,) = torch.autograd.grad(loss, proxies, retain_graph=True)
    (again,) = torch.autograd.grad(loss, proxies)
    assert torch.equal(first, again)
