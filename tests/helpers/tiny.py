"""A tiny frozen backbone, tiny adaptor sets, drawn images and whole runs that take seconds: shared by tests."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from grappa.backbone.frozen import Backbone, build_backbone
from grappa.backbone.spec import BackboneSpec
from grappa.core.notes import claim
from grappa.images.pixels import PixelCache, write_index, write_shard
from grappa.method.adaptors import AdaptorSet
from grappa.pipeline.commands.init import Request, initialize
from grappa.pipeline.engine.execution import Selection, run_stages
from grappa.pipeline.engine.progress import Progress
from grappa.pipeline.engine.status import read_config
from grappa.pipeline.graph.stages import nodes
from grappa.pipeline.store.artifacts import RunFolder

OPTIONS = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8}
HALF = (0.5, 0.5, 0.5)


def tiny_backbone(seed: int = 0) -> Backbone:
    """A ViT of two blocks, 32 wide, 32 px input, random weights."""
    torch.manual_seed(seed)
    return build_backbone(BackboneSpec("vit_tiny_patch16_224", 32, 1.0, HALF, HALF, OPTIONS)).float()


def tiny_set(seed: int, *, trained: bool = True) -> AdaptorSet:
    """A set for the tiny backbone; ``trained`` gives it non-zero up-projections."""
    adaptors = AdaptorSet([32] * 2, 4, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    if trained:
        for adaptor in adaptors.outputs:
            torch.nn.init.normal_(adaptor.up.weight, std=0.5, generator=generator)
    return adaptors.requires_grad_(False)


def tiny_cache(folder: Path, num_images: int, *, seed: int = 0) -> PixelCache:
    """Images of 40 x 48 pixels in four groups of different color, written as a pixel cache."""
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 255, (4, 5, 6, 3))
    small = [base[i % 4] + rng.integers(-30, 30, (5, 6, 3)) for i in range(num_images)]
    images = [np.clip(s, 0, 255).astype(np.uint8).repeat(8, 0).repeat(8, 1) for s in small]
    folder.mkdir(parents=True, exist_ok=True)
    write_index(folder, write_shard(folder, 0, images))
    return PixelCache.open(folder)


def draw_images(folder: Path, *, num_classes: int = 4, num_images: int = 5, seed: int = 0) -> Path:
    """Draw three domains (stripes, checks, discs) as DOMAIN/CLASS/file PNGs, classes differ in period and color."""
    rng = np.random.default_rng(seed)
    for domain in ("stripes", "checks", "discs"):
        for label in range(num_classes):
            for number in range(num_images):
                path = folder / domain / f"class_{label}" / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(_drawn(domain, label, rng)).save(path)
    return folder


def _drawn(domain: str, label: int, rng: np.random.Generator) -> np.ndarray[Any, Any]:
    y, x = np.mgrid[:44, :52]
    period, shift = 6 + 4 * label, rng.integers(0, 10)
    patterns = {
        "stripes": (x + shift) % period < period / 2,
        "checks": ((x + shift) // period + y // period) % 2 == 0,
        "discs": (x - 26) ** 2 + (y - 22) ** 2 < (3 * period / 2) ** 2,
    }
    color = np.array([40 * label, 200 - 30 * label, 90 + 20 * label]) + rng.integers(-15, 15, 3)
    image = np.where(patterns[domain][..., None], color, 230) + rng.integers(-20, 20, (44, 52, 3))
    return np.clip(image, 0, 255).astype(np.uint8)


def write_table(folder: Path, table: Path, **columns: Callable[[Path], str]) -> Path:
    """Write a CSV of all images in ``folder`` with the columns path, domain and the given functions of the path."""
    rows = [["path", "domain", *columns]]
    for path in sorted(folder.rglob("*.png")):
        domain = path.relative_to(folder).parts[0]
        rows.append([str(path), domain, *(make(path) for make in columns.values())])
    with table.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return table


def split_of(path: Path) -> str:
    """The first two classes of ``draw_images`` are learned from, the others tested."""
    return "train" if path.parent.name in ("class_0", "class_1") else "test"


def write_weights(path: Path) -> Path:
    """Write the tiny backbone's weights as safetensors."""
    save_file(tiny_backbone().model.state_dict(), path)
    return path


def settings(weights: Path, **changes: object) -> list[str]:
    """Return the ``section.key=value`` texts of a run that takes seconds."""
    values: dict[str, object] = {
        "backbone.name": "vit_tiny_patch16_224",
        "backbone.weights": weights,
        "backbone.image_size": 32,
        "backbone.crop_fraction": 1.0,
        "backbone.options": "{embed_dim: 32, depth: 2, num_heads: 2, patch_size: 8}",
        "images.cache_size": 40,
        "images.shard_size": 16,
        "clusters.num_clusters": "[4, 8]",
        "neighbors.num_neighbors": 4,
        "adaptors.bottleneck_dim": 4,
        "adaptors.num_epochs": 2,
        "adaptors.batch_size": 4,
        "fusion.num_epochs": 1,
        "fusion.batch_size": 4,
        "fusion.num_neighbors": 3,
        "student.bottleneck_dim": 4,
        "student.num_epochs": 1,
        "student.batch_size": 4,
        "model.source": "fused",
        "compute.num_threads": 1,
        "compute.num_workers": 1,
        "compute.device": "cpu",
    }
    values.update({name.replace("__", "."): value for name, value in changes.items()})
    return [f"{name}={value}" for name, value in values.items()]


def make_run(folder: Path, images: Sequence[Path], weights: Path, **changes: object) -> RunFolder:
    """Initialize a tiny run."""
    request = Request([str(path) for path in images], None, settings(weights, **changes), None)
    initialize(folder, request, say=lambda line: None)
    return RunFolder.open(folder)


def run_all(run: RunFolder, **selection: Any) -> list[str]:
    """Run what is not fresh; the lines said."""
    lines: list[str] = []
    run_stages(run, read_config(run), Selection(**selection), progress=Progress(), say=lines.append)
    return lines


def digests(run: RunFolder) -> dict[str, str]:
    """Return the sha256 of every output of every artifact by ``artifact/file``."""
    found = {}
    for node in nodes(read_config(run)):
        artifact = run.artifact(node)
        manifest = artifact.manifest()
        if manifest is not None:
            found.update({f"{artifact.name}/{file}": entry["sha256"] for file, entry in manifest.outputs.items()})
    return found


def with_other_bytes(image: Path, folder: Path) -> Path:
    """Write a copy of a PNG that decodes to the same pixels and is not the same file."""
    (folder / f"copy_{image.name}").write_bytes(image.read_bytes() + b"more")
    return folder / f"copy_{image.name}"


def sign_again(folder: Path) -> None:
    """Write the digests of an artifact's present files into its manifest, as if a stage had made them so."""
    manifest = json.loads((folder / "manifest.json").read_text())
    present = [name for name in manifest["outputs"] if (folder / name).exists()]
    manifest["outputs"] = {name: claim(folder / name) for name in present}
    (folder / "manifest.json").write_text(json.dumps(manifest))
