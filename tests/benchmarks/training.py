"""R9, R10 and R14: the softmax over very many classes, an adaptor set's step, and what checkpoints cost."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from pytorch_metric_learning.losses import NormalizedSoftmaxLoss
from torch import Tensor, nn
from torch.nn import functional as F

from grappa.backbone.frozen import Backbone
from grappa.images.transforms import Augmentation, normalize
from grappa.method.adaptor_training import AdaptorLoss, train_adaptor_set
from grappa.method.adaptors import AdaptorSet
from grappa.method.losses import norm_softmax
from grappa.pipeline.config.schema import Compute
from grappa.pipeline.store.checkpoints import FileCheckpoint
from grappa.training.batches import Runtime, Views
from grappa.training.loop import Optimization
from grappa.training.targets import Targets
from tests.benchmarks import data
from tests.benchmarks.core import Gate, Options, Pair, Side, seconds
from tests.benchmarks.extraction import CPU, cached, pixels
from tests.benchmarks.memory import peak_growth

BATCH, WIDTH, NUM_CLASSES, TEMPERATURE, BOTTLENECK = 256, 384, 131_072, 0.05, 48
NUM_TRAINED, AUGMENTATION = 128, Augmentation(0.6, 0.5, 0.3, 0.3, 0.3, 0.1)
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain_softmax(embeddings: Tensor, proxies: Tensor, labels: Tensor) -> Tensor:
    """The loss as it is written."""
    return F.cross_entropy(F.normalize(embeddings, dim=-1) @ F.normalize(proxies, dim=-1).T / TEMPERATURE, labels)


def ours(embeddings: Tensor, proxies: Tensor, labels: Tensor) -> Tensor:
    return norm_softmax(embeddings, proxies, labels, temperature=TEMPERATURE)


def _step(loss: Loss, num_classes: int, threads: int) -> Callable[[], Tensor]:
    """Return a forward and backward pass; gradients are given up before each."""
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(BATCH, WIDTH, generator=generator, requires_grad=True)
    proxies = torch.randn(num_classes, WIDTH, generator=generator, requires_grad=True)
    labels = torch.randint(0, num_classes, (BATCH,), generator=generator)
    loss(embeddings, proxies[:512], labels % 512).backward()

    def run() -> Tensor:
        embeddings.grad = proxies.grad = None
        value = loss(embeddings, proxies, labels)
        value.backward()
        return value

    embeddings.grad = proxies.grad = None
    return run


def _metric_learning_step(num_classes: int) -> Callable[[], Tensor]:
    """The same step by pytorch-metric-learning, whose loss keeps its proxies as (D, C); started from the same ones."""
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(BATCH, WIDTH, generator=generator, requires_grad=True)
    loss = NormalizedSoftmaxLoss(num_classes, WIDTH, temperature=TEMPERATURE)
    loss.W = nn.Parameter(torch.randn(num_classes, WIDTH, generator=generator).T.contiguous())
    labels = torch.randint(0, num_classes, (BATCH,), generator=generator)

    def run() -> Tensor:
        embeddings.grad = loss.W.grad = None
        value: Tensor = loss(embeddings, labels)
        value.backward()
        return value

    return run


def _softmax_pair(name: str, peer: Callable[[], Tensor], num_classes: int, options: Options) -> Pair:
    runs = [_step(ours, num_classes, options.threads), peer]

    def check() -> tuple[bool, str]:
        losses = [float(run().detach()) for run in runs]
        return abs(losses[0] - losses[1]) < 1e-4, f"losses {losses[0]:.5f} and {losses[1]:.5f}"

    setup = f"{name}, float32; batch {BATCH}, d={WIDTH}, k={num_classes}, forward and backward"
    return Pair(*(seconds(run, options) for run in runs), setup, check)


@contextmanager
def softmax_time(options: Options) -> Iterator[Pair]:
    """A step of the head alone."""
    number = options.size(NUM_CLASSES, 20_000)
    yield _softmax_pair("plain torch", _step(plain_softmax, number, options.threads), number, options)


@contextmanager
def softmax_time_metric_learning(options: Options) -> Iterator[Pair]:
    """The same against pytorch-metric-learning."""
    number = options.size(NUM_CLASSES, 20_000)
    yield _softmax_pair("NormalizedSoftmaxLoss", _metric_learning_step(number), number, options)


@contextmanager
def softmax_memory(options: Options) -> Iterator[Pair]:
    """Growth of fresh processes during a step, gradients of embeddings and proxies included."""
    num_classes = options.size(NUM_CLASSES, 20_000)
    sides = [partial(peak_growth, _step, loss, num_classes, options.threads) for loss in (ours, plain_softmax)]
    yield Pair(*sides, "plain torch; each in a fresh process", repeats=3, warm_up=False)


@contextmanager
def adaptor_step(options: Options) -> Iterator[Pair]:
    """A training step of an adaptor set against one of the whole ViT, AdamW and the same attention on both sides."""
    sides = [_training_step(options, whole, fused=True) for whole in (False, True)]
    setup = f"full fine-tuning, float32, AdamW, fused attention on both sides (the faster here), r={BOTTLENECK}"
    yield Pair(*sides, setup, repeats=5)


def _training_step(options: Options, whole: bool, *, fused: bool) -> Side:
    backbone = data.backbone(options.quick).on(CPU)
    for block in backbone.model.blocks:  # type: ignore[union-attr]
        block.attn.fused_attn = fused  # type: ignore[union-attr]
    adaptors = AdaptorSet(backbone.widths, BOTTLENECK)
    backbone.requires_grad_(whole)
    images = normalize(pixels(backbone), backbone.spec.mean, backbone.spec.std)
    optimizer = torch.optim.AdamW(backbone.parameters() if whole else adaptors.parameters(), lr=1e-4)
    labels, proxies = torch.arange(len(images)), torch.randn(1024, backbone.embedding_dim)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        embeddings = backbone(images, None if whole else adaptors)
        norm_softmax(embeddings, proxies, labels, temperature=TEMPERATURE).backward()
        optimizer.step()

    return seconds(run, options)


@contextmanager
def fused_attention(options: Options) -> Iterator[Pair]:
    """What ``Backbone.on`` chooses on a CPU in float32, the fused kernel, against explicit products."""
    sides = [_training_step(options, False, fused=fused) for fused in (True, False)]
    yield Pair(*sides, "the same adaptor set's step with explicit attention", repeats=5)


@contextmanager
def training_share(options: Options) -> Iterator[Pair]:
    """A set's training from the pixel cache, as the stage does it, against the parts of its step that no one can spare:
    the backbone's passes forward and back, on one batch that is at hand."""
    with tempfile.TemporaryDirectory() as folder:
        files = data.write_jpegs(Path(folder), NUM_TRAINED)
        cache, backbone = cached(files, Path(folder)), data.backbone(options.quick, "vit_tiny_patch16_224", 128).on(CPU)
        width, rows = backbone.embedding_dim, np.arange(NUM_TRAINED)
        proxies = np.random.default_rng(0).normal(size=(1024, width)).astype(np.float32)
        once = Optimization(1, NUM_TRAINED // 2, 1e-3, 0.01, 0.0)
        views = Views(cache, rows.astype(np.uint64), backbone.spec.image_size, AUGMENTATION, options.threads)

        def ours() -> None:
            train_adaptor_set(
                backbone,
                views,
                rows,
                [Targets(rows, proxies)],
                name="k01024",
                start=AdaptorSet(backbone.widths, BOTTLENECK),
                adaptor_loss=AdaptorLoss(TEMPERATURE),
                proxy_learning_rate=1e-3,
                optimization=once,
                seed=0,
                run=Runtime(CPU, "float32"),
            )

        adaptors = AdaptorSet(backbone.widths, BOTTLENECK)
        drawn = views.draw(0, rows[: once.batch_size])
        images = normalize(drawn, backbone.spec.mean, backbone.spec.std)

        def peer() -> None:
            for _ in range(2):
                backbone(images, adaptors).sum().backward()

        setup = f"forward and backward alone; ViT-Tiny at 128 px, float32, batch {once.batch_size}, 1,024 proxies"
        yield Pair(seconds(ours, options), seconds(peer, options), f"{setup}, {NUM_TRAINED} images a side", repeats=5)


@contextmanager
def checkpoints(options: Options) -> Iterator[Pair]:
    """Writing a set's state (weights, 8,192 proxies, two moments each) against the interval between two."""
    backbone: Backbone = data.backbone(options.quick)
    adaptors = AdaptorSet(backbone.widths, BOTTLENECK)
    state = {**adaptors.state_dict(), "proxies": torch.randn(8192, backbone.embedding_dim)}
    tensors = {
        f"{part}.{name}": value.clone() for part in ("module", "first", "second") for name, value in state.items()
    }
    interval = float(Compute().checkpoint_seconds)
    with tempfile.TemporaryDirectory() as folder:
        keeper = FileCheckpoint(Path(folder), seconds=interval)
        side = seconds(lambda: keeper.save(tensors, {"step": 1}))
        yield Pair(side, lambda: interval, f"the default compute.checkpoint_seconds = {interval:g}", repeats=5)


GATES = [
    Gate("R9 time", "softmax head at 131,072 classes / plain torch: time", 0.6, softmax_time),
    Gate("R9 memory", "softmax head at 131,072 classes / plain torch: memory", 0.45, softmax_memory, unit="bytes"),
    Gate("R9 pml", "the same / pytorch-metric-learning: time", 0.6, softmax_time_metric_learning),
    Gate("R10", "adaptor training step / full fine-tuning step", 0.72, adaptor_step),
    Gate("R10 attn", "fused / explicit attention in an adaptor training step", 1.0, fused_attention),
    Gate("R10 share", "training from the cache, share of its floor's speed", 0.9, training_share, at_least=True),
    Gate("R14", "a checkpoint / the default interval between two", 0.02, checkpoints),
]
