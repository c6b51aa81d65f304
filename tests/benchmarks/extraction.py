"""R1 to R4 and R25: embedding images, loading them for it, and finding objects in them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import grappa.backbone.frozen
from grappa.backbone.features import extract_features
from grappa.backbone.frozen import Backbone, embed
from grappa.core.devices import autocast, resolve_precision
from grappa.images.caching.uncached import open_images
from grappa.images.ingest import decode_all
from grappa.images.pixels import ImageRows
from grappa.images.table import list_images
from grappa.images.transforms import eval_batch, normalize, whole_batch
from grappa.objects.foreground import foreground, seeing_finely
from tests.benchmarks import data
from tests.benchmarks.core import Gate, Options, Pair, seconds

CPU = torch.device("cpu")
BATCH, CACHE_SIZE, CROP = 32, 256, 0.875
CPUINFO = Path("/proc/cpuinfo")
HAS_AMX = CPUINFO.exists() and "amx_bf16" in CPUINFO.read_text()


def pixels(backbone: Backbone) -> Tensor:
    """A batch of uint8 images."""
    size = backbone.spec.image_size
    return torch.randint(0, 256, (BATCH, 3, size, size), generator=torch.Generator().manual_seed(0)).byte()


@contextmanager
def chosen_precision(options: Options) -> Iterator[Pair]:
    """What ``auto`` chooses here against a plain loop: timm's model in float32, eager, its own fused attention."""
    backbone, plain = (data.backbone(options.quick) for _ in range(2))
    plain.load_state_dict(backbone.state_dict())
    backbone.on(CPU)
    precision, images = resolve_precision("auto", CPU), pixels(backbone)
    found: dict[str, Tensor] = {}

    def ours() -> None:
        with torch.inference_mode(), autocast(CPU, precision):
            found["ours"] = embed(backbone, normalize(images, backbone.spec.mean, backbone.spec.std))

    def peer() -> None:
        with torch.inference_mode():
            found["peer"] = F.normalize(plain.model((images / 255.0 - 0.5) / 0.5), dim=-1)

    def check() -> tuple[bool, str]:
        least = float((found["ours"] * found["peer"]).sum(1).min())
        return least >= 0.999, f"{precision}, least cosine {least:.5f}"

    yield Pair(
        seconds(ours, options), seconds(peer, options), f"timm, float32, eager, fused attention; batch {BATCH}", check
    )


@contextmanager
def class_token_only(options: Options) -> Iterator[Pair]:
    """The same backbone and precision (float32), the last block for the class token only or whole."""
    backbone = data.backbone(options.quick).on(CPU)
    images = normalize(pixels(backbone), backbone.spec.mean, backbone.spec.std)
    found: dict[str, Tensor] = {}

    def run(name: str) -> None:
        with torch.inference_mode():
            found[name] = embed(backbone, images)

    def whole() -> None:
        with mock.patch.object(grappa.backbone.frozen, "is_plain", return_value=False):
            run("peer")

    def check() -> tuple[bool, str]:
        away = float((found["ours"] - found["peer"]).abs().max())
        return away <= 1e-5, f"largest difference {away:.1e}"

    yield Pair(seconds(lambda: run("ours"), options), seconds(whole, options), "the same model, float32", check)


class Files(Dataset[Tensor]):
    """JPEG files as a plain torch data set: PIL decode, resize of the shorter side, centre crop."""

    def __init__(self, files: Sequence[Path], size: int) -> None:
        self.files, self.size = files, size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> Tensor:
        with Image.open(self.files[number]) as image:
            rgb = image.convert("RGB")
        scale = CACHE_SIZE / min(rgb.size)
        rgb = rgb.resize((round(rgb.width * scale), round(rgb.height * scale)), Image.Resampling.BICUBIC)
        left, top = (rgb.width - self.size) // 2, (rgb.height - self.size) // 2
        cropped = np.asarray(rgb.crop((left, top, left + self.size, top + self.size)))
        return torch.from_numpy(cropped.copy()).permute(2, 0, 1)


def cached(files: Sequence[Path], folder: Path, form: str = "raw") -> ImageRows:
    """Write the files' pixel cache and open it."""
    listing = list_images([files[0].parent], layout="flat")
    roots = list(listing.attrs["roots"])
    decode_all(listing, roots, folder, cache=form, cache_size=CACHE_SIZE, max_pixels=10**8, shard_size=len(files))
    return open_images(folder, roots)


@contextmanager
def loading(options: Options, form: str = "raw") -> Iterator[Pair]:
    """An epoch of evaluation crops, nothing else; the peer's worker processes are kept from epoch to epoch."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "files").mkdir()
        files = data.write_jpegs(Path(folder) / "files", options.size(1024, 32))
        cache = cached(files, Path(folder) / "pixels", form)
        size = int(CACHE_SIZE * CROP)
        # No worker processes where there is one thread: they could not run beside anything.
        workers: dict[str, Any] = {"num_workers": options.threads, "persistent_workers": True}
        loader = DataLoader(Files(files, size), BATCH, **(workers if options.threads > 1 else {}))

        def ours() -> None:
            for rows in np.split(np.arange(len(cache)), range(BATCH, len(cache), BATCH)):
                eval_batch(cache, rows, image_size=size, crop_fraction=CROP, num_workers=options.threads)

        def peer() -> None:
            for batch in loader:
                assert batch.shape[1:] == (3, size, size)

        setup = f"torch DataLoader, {options.threads} workers, PIL; {len(files)} JPEGs of 500 x 375, batch {BATCH}"
        yield Pair(seconds(ours), seconds(peer), setup, repeats=5)


@contextmanager
def end_to_end(options: Options) -> Iterator[Pair]:
    """Extraction from the cache against the slower of its two parts alone."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "files").mkdir()
        files = data.write_jpegs(Path(folder) / "files", options.size(192, 32))
        cache, backbone = cached(files, Path(folder) / "pixels"), data.backbone(options.quick)
        size, precision = backbone.spec.image_size, resolve_precision("auto", CPU)
        out = np.empty((len(cache), backbone.embedding_dim), dtype=np.float32)

        def ours() -> None:
            extract_features(backbone, cache, out, batch_size=BATCH, precision=precision, num_workers=options.threads)

        def load(rows: Sequence[int]) -> Tensor:
            return eval_batch(cache, rows, image_size=size, crop_fraction=CROP, num_workers=options.threads)

        batches = [range(start, min(start + BATCH, len(cache))) for start in range(0, len(cache), BATCH)]
        loaded = [load(rows) for rows in batches]
        alone = seconds(lambda: [load(rows) for rows in batches]), seconds(_model(backbone, loaded, precision))

        def peer() -> float:
            return max(side() for side in alone)

        yield Pair(seconds(ours), peer, f"the slower of loader and model alone; {len(files)} images", repeats=5)


def _model(backbone: Backbone, loaded: Sequence[Tensor], precision: str) -> Callable[[], None]:
    def run() -> None:
        for images in loaded:
            with torch.inference_mode(), autocast(CPU, precision):
                embed(backbone, normalize(images, backbone.spec.mean, backbone.spec.std))

    return run


@contextmanager
def finding_objects(options: Options) -> Iterator[Pair]:
    """Looking for objects at 16 x 16 patches against embedding at 8 x 8, from the cache, in float32."""
    with tempfile.TemporaryDirectory() as folder:
        files = data.write_jpegs(Path(folder), options.size(64, 8))
        cache, backbone = cached(files, Path(folder)), data.backbone(options.quick, "vit_tiny_patch16_224", 128)
        finer, rows = seeing_finely(backbone).on(CPU), np.arange(len(cache))
        spec, seen = backbone.on(CPU).spec, finer.spec.image_size

        def ours() -> None:
            images = whole_batch(cache, rows, image_size=seen, num_workers=options.threads)
            with torch.inference_mode():
                foreground(finer, normalize(images, spec.mean, spec.std))

        def peer() -> None:
            images = eval_batch(cache, rows, num_workers=options.threads, **spec.framing)
            with torch.inference_mode():
                embed(backbone, normalize(images, spec.mean, spec.std))

        setup = f"features of the same ViT-Tiny at {spec.image_size} px, a batch of {len(cache)}; objects at {seen} px"
        yield Pair(seconds(ours, options), seconds(peer, options), setup, repeats=5)


GATES = [
    Gate(
        "R1",
        f"extraction in the chosen precision, times faster than fp32 eager ({'with' if HAS_AMX else 'no'} AMX)",
        3.0 if HAS_AMX else 1.15,
        chosen_precision,
        at_least=True,
    ),
    Gate("R2", "class-token-only last block / whole", 0.97, class_token_only),
    Gate("R3", "epoch from the pixel cache, times faster than from JPEG files", 5.0, loading, at_least=True),
    Gate("R3 jpeg", "the same, the cache of JPEGs", 1.5, partial(loading, form="jpeg"), at_least=True),
    Gate("R3 none", "the same without a cache", 0.75, partial(loading, form="none"), at_least=True),
    Gate("R4", "end-to-end extraction, share of its slower part's speed", 0.85, end_to_end, at_least=True),
    Gate("R25", "finding objects at 16 x 16 patches / features at 8 x 8", 2.5, finding_objects),
]
