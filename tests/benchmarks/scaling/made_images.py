"""Runs of any size on small images made from few photographs, in tars, with a ViT of two blocks at 32 px."""

from __future__ import annotations

import csv
import json
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file

from grappa.pipeline.commands.init import Request, initialize
from grappa.pipeline.demo.dataset import WEIGHTS, write_demo_images
from grappa.pipeline.store.artifacts import RUN_FILE, RunFolder
from tests.benchmarks.memory import measured
from tests.benchmarks.scaling.whole_runs import add_row

SIDE, A_TAR, BLOCKS = 40, 2_000, 2  # pixels of an image's shorter side, images of a tar, blocks of the ViT
NUM_CLUSTERS = (64, 512, 4_096)
LEAST = 2 * NUM_CLUSTERS[-1]
SETTINGS = (
    "backbone.name=vit_tiny_patch16_224",
    "backbone.image_size=32",
    "backbone.crop_fraction=1.0",
    "backbone.mean=[0.5,0.5,0.5]",
    "backbone.std=[0.5,0.5,0.5]",
    f"backbone.options={{embed_dim: 192, depth: {BLOCKS}, num_heads: 6}}",
    f"images.cache_size={SIDE}",
    "images.cache=jpeg",
    f"clusters.num_clusters={list(NUM_CLUSTERS)}",
    "compute.num_threads=1",
    "compute.num_workers=1",
    *(f"{stage}.{what}" for stage in ("adaptors", "fusion", "student") for what in ("num_epochs=1", "batch_size=256")),
)


def make_runs(out: Path, sizes: Sequence[int], table: Path | None) -> Iterator[Path]:
    """Make what is missing of a run of each size below ``out``, and yield it, ready for its stages, the smallest first;
    note what `init` took.

    The train photographs of ``table`` are what the images are made from, its test photographs stand beside them with
    their labels.
    """
    if min(sizes) < LEAST:
        raise SystemExit(f"--images {min(sizes)}: {NUM_CLUSTERS[-1]:,} clusters need at least {LEAST:,} images")
    weights = _write_weights(out / "two_blocks.safetensors")
    table = table or write_demo_images(out / "drawn", num_images_per_class=40)
    for size in sorted(sizes):
        yield _make_run(out, size, table, weights)


def _make_run(out: Path, size: int, table: Path, weights: Path) -> Path:
    root, images = out / f"run{size}", out / f"images{size}"
    if (root / RUN_FILE).exists():
        return root
    if not images.exists():
        write_images(images, size, table)
    request = Request([str(images)], None, [*SETTINGS, f"backbone.weights={weights.absolute()}"])
    found = measured(lambda: initialize(root, request, say=print))
    run = RunFolder.open(root)
    listing = run.artifact("sources").home / "sources.parquet"
    add_row(out, run, "sources", "", found, listing.stat().st_size)
    return root


def _write_weights(file: Path) -> Path:
    """Write the first blocks of the demo's ViT, with patches of 16 pixels that are averaged to its own of 8."""
    kept = {f"blocks.{number}" for number in range(BLOCKS)}
    tensors = {
        name: value
        for name, value in load_file(WEIGHTS).items()
        if not name.startswith("blocks.") or ".".join(name.split(".")[:2]) in kept
    }
    patches = tensors["patch_embed.proj.weight"]
    tensors["patch_embed.proj.weight"] = patches.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3) / 4
    save_file(tensors, file)
    return file


def write_images(folder: Path, size: int, table: Path) -> None:
    """Write ``size`` images without labels and those for testing into a new folder, which appears when it is whole."""
    with table.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    part = folder.with_name(f"{folder.name}.part")
    train = [row for row in rows if row["split"] == "train"]
    domains = sorted({row["domain"] for row in train})
    small = {one: [_small(table.parent / row["path"]) for row in train if row["domain"] == one] for one in domains}
    for number, first in enumerate(range(0, size, A_TAR)):
        domain = domains[number % len(domains)]
        names = range(first, min(first + A_TAR, size))
        _write_tar(part / domain / f"{number:06d}.tar", ((f"{one}.jpg", _made(small[domain], one)) for one in names))
    tests = (row for row in rows if row["split"] == "test")
    _write_tar(part / "labelled" / "tests.tar", (each for row in tests for each in _labelled(table.parent, row)))
    part.rename(folder)


def _labelled(folder: Path, row: dict[str, str]) -> Iterable[tuple[str, bytes]]:
    name = row["path"].rsplit(".", 1)[0]
    yield f"{name}.jpg", _encoded(_small(folder / row["path"]))
    yield f"{name}.json", json.dumps({key: row[key] for key in ("domain", "label", "split")}).encode()


def _write_tar(file: Path, members: Iterable[tuple[str, bytes]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members:
            about = tarfile.TarInfo(name)
            about.size = len(content)
            tar.addfile(about, BytesIO(content))


def _small(file: Path) -> Image.Image:
    """Return a photograph with a shorter side of twice an image's."""
    with Image.open(file) as opened:
        image = opened.convert("RGB")
    scale = 2 * SIDE / min(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BOX)


def _made(photographs: list[Image.Image], number: int) -> bytes:
    """Return an image as JPEG: a crop of one of the photographs in another colour, with noise; a function of its
    number."""
    random = np.random.default_rng(number)
    image = photographs[random.integers(len(photographs))]
    share = random.uniform(0.6, 1.0)
    width, height = share * image.width, share * image.height
    left, top = random.uniform(0, image.width - width), random.uniform(0, image.height - height)
    scale = SIDE / min(image.size)
    shape = (round(image.width * scale), round(image.height * scale))
    crop = image.resize(shape, Image.Resampling.BOX, box=(left, top, left + width, top + height))
    return _encoded(Image.fromarray(_recoloured(np.asarray(crop), random)))


def _recoloured(pixels: NDArray[np.uint8], random: np.random.Generator) -> NDArray[np.uint8]:
    gains = random.uniform(0.8, 1.2, 3).astype(np.float32)
    noise = random.integers(-12, 13, pixels.shape, dtype=np.int8)
    return np.clip(pixels * gains + noise, 0, 255).astype(np.uint8)


def _encoded(image: Image.Image) -> bytes:
    out = BytesIO()
    image.save(out, "JPEG", quality=85)
    return out.getvalue()
