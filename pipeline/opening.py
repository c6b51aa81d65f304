"""Functions that open upstream artifacts for stages, and that settle device, precision and memory of a computation."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from grappa.backbone.adapting.dry_run import peak_numbers, without_tensors
from grappa.backbone.frozen import Backbone, build_backbone
from grappa.backbone.spec import BackboneSpec
from grappa.backbone.tensors import fill
from grappa.backbone.vit import reads_class_token
from grappa.core import memory
from grappa.core.devices import resolve_device, resolve_precision, set_num_threads
from grappa.core.memory import MeasuredShape, Shape, VitShape
from grappa.images.caching.uncached import FINDERS, Originals, open_images
from grappa.images.pixels import ImageRows, PixelCache
from grappa.images.table import BOX_COLUMNS
from grappa.method.adaptors import AdaptorSet
from grappa.method.fusion import Fusion
from grappa.method.head import Head
from grappa.method.head import open_head as open_form
from grappa.objects.backgrounds import Backgrounds
from grappa.objects.views import open_object_views
from grappa.pipeline.engine.context import StageContext
from grappa.pipeline.engine.fingerprints import image_roots
from grappa.pipeline.engine.verdict_file import SELECTION, kept_names
from grappa.pipeline.graph.models import deployed_model
from grappa.pipeline.graph.stages import upstream
from grappa.pipeline.store.artifacts import RunFolder, published

MARGIN = 1.4  # what a pass takes, as a multiple of what lives in it: an allocator keeps more


def read_images(folder: Path) -> pd.DataFrame:
    """Return the image table of an images artifact; row i is row i of every array."""
    return pd.read_parquet(folder / "images.parquet")


def open_pixels(context: StageContext) -> ImageRows:
    """Return the pixels of the images artifact: its cache, or the originals decoded at every access."""
    return open_images(context.input("images") / "pixels", image_roots(context.run))


def published_pixels(run: RunFolder, rows: Sequence[int] = ()) -> ImageRows:
    """Return the pixels of a run's images; what finds them is checked, and the shards of ``rows``, byte by byte."""
    images = run.artifact("images")
    manifest = images.manifest() if images.home.exists() else None
    finders = [f"pixels/{name}" for name in FINDERS if manifest is None or f"pixels/{name}" in manifest.outputs]
    found = open_images(published(run, "images", *finders) / "pixels", image_roots(run))
    if isinstance(found, PixelCache) and rows:
        published(run, "images", *sorted({f"pixels/{found.file(row).name}" for row in rows}))
    return found


def published_originals(run: RunFolder, max_pixels: int) -> Originals:
    """Return the originals of a run's images, at full size, from where they lie."""
    table = read_images(published(run, "images", "images.parquet"))
    return Originals.of(table, image_roots(run), max_pixels=max_pixels)


def open_backbone(context: StageContext) -> Backbone:
    """Return the backbone of the backbone artifact; only files of the run are read, nothing from the hub."""
    return backbone_in(context.input("backbone"), context.config.backbone.module)


def backbone_in(folder: Path, module: str | None = None) -> Backbone:
    """Return the backbone in the folder of a backbone artifact; ``module``: the setting ``backbone.module``."""
    spec = BackboneSpec.from_json(json.loads((folder / "backbone.json").read_text()))
    backbone = build_backbone(spec, module)
    fill(backbone.model, load_file(folder / "weights.safetensors"))
    return backbone


def open_sets(context: StageContext, names: tuple[str, ...]) -> dict[str, AdaptorSet]:
    """Return the adaptor sets of the given pseudo-granularities, in their order."""
    paths = {name: context.input("adaptors", name) / "adaptors.safetensors" for name in names}
    return {name: AdaptorSet.from_state_dict(load_file(path)) for name, path in paths.items()}


def open_fused_sets(context: StageContext) -> dict[str, AdaptorSet]:
    """Return the adaptor sets that are fused: all, or those that the stage ``selection`` kept."""
    names = context.config.granularities
    if SELECTION in upstream(context.node, context.config):
        names = kept_names(context.input("selection"))
    return open_sets(context, names)


def open_student(context: StageContext) -> AdaptorSet:
    """Return the student's adaptor set."""
    return AdaptorSet.from_state_dict(load_file(context.input("student") / "student.safetensors"))


def open_fusion(context: StageContext, instance: str, sets: Mapping[str, AdaptorSet]) -> Fusion:
    """Return the trained fusion over the given adaptor sets."""
    form, state = _read_with_form(context.input("fusion", instance) / "fusion.safetensors", "fusion")
    fusion = Fusion(list(sets.values()), level=form["level"], temperature=form["temperature"])
    fusion.load_trained_state(state)
    return fusion


def open_deployed(context: StageContext) -> str:
    """Return the model that is deployed: the given one, or the one that the verdict chose."""
    if context.config.model.source != "auto":
        return deployed_model(context.config)
    found = json.loads((context.input("verdict") / "verdict.json").read_text())
    return deployed_model(context.config, found["choice"])


def open_head(context: StageContext, model: str) -> Head:
    """Return the embedding head fitted for a model of the result table."""
    return head_in(context.input("heads", model))


def head_in(folder: Path) -> Head:
    """Return the head in the folder of an artifact of the stages ``heads`` or ``whitening``."""
    return open_form(*_read_with_form(folder / "head.safetensors", "head"))


def _read_with_form(path: Path, key: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the JSON of a safetensors file's metadata under ``key``, and its tensors."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        return json.loads(file.metadata()[key]), tensors


def open_objects(context: StageContext) -> ImageRows:
    """Return the object views, cached or not; for an image without an accepted box it is the whole image."""
    return open_object_views(context.input("objects") / "pixels", image_roots(context.run))


def accepted_boxes(table: pd.DataFrame) -> NDArray[np.float64]:
    """Return the boxes of an objects table, (N, 4) float64 pixels of the originals; NaN where no box is accepted."""
    return table[list(BOX_COLUMNS)].where(table["accepted"], np.nan).to_numpy(dtype=np.float64)


def open_backgrounds(context: StageContext) -> Backgrounds:
    """Return the background views; only an image with an accepted box has a background view."""
    boxes = accepted_boxes(pd.read_parquet(context.input("objects") / "objects.parquet"))
    sizes = read_images(context.input("images"))[["height", "width"]].to_numpy(dtype=np.int64)
    return Backgrounds(open_pixels(context), boxes, sizes)


def settle_device(context: StageContext) -> torch.device:
    """Return the device to compute on, and limit the threads of torch; the provenance records the device."""
    set_num_threads(context.num_threads)
    device = resolve_device(context.config.compute.device)
    context.resolve("device", str(device))
    return device


def settle_precision(context: StageContext, requested: str, device: torch.device) -> str:
    """Return the precision to compute with; resumed work keeps the precision that it began with."""
    return context.resolve("precision", resolve_precision(requested, device))


def settle_passes(
    context: StageContext, backbone: Backbone, adaptation: object, precision: str, number: int
) -> tuple[torch.device, str, int]:
    """Return device, precision and batch size of passes without gradients over ``number`` images; memory is checked."""
    device = settle_device(context)
    settled = settle_precision(context, precision, device)
    batch_size = context.resolve("inference_batch_size", context.config.compute.inference_batch_size)
    needed = memory.embedding(shape_of(backbone, [adaptation]), min(batch_size, number), settled)
    need_for_batches(context, device, needed)
    return device, settled, batch_size


def shape_of(backbone: Backbone, adaptations: Iterable[object] = ()) -> Shape:
    """Return the sizes on which the memory of an adapted backbone depends; all ``adaptations`` act at the same time."""
    model: Any = backbone.model
    modules = [each for each in adaptations if isinstance(each, nn.Module)]
    numbers = sum(each.numel() for module in modules for each in (*module.parameters(), *module.buffers()))
    if not reads_class_token(model):
        return _measured(backbone, modules, numbers)
    return VitShape(
        image_size=backbone.spec.image_size,
        tokens=model.patch_embed.num_patches + model.num_prefix_tokens,
        width=backbone.embedding_dim,
        heads=getattr(model.blocks[0], "attn", model.blocks[0]).num_heads,
        blocks=len(backbone.units),
        adapted=numbers // (2 * len(backbone.units) * backbone.embedding_dim),
    )


def _measured(backbone: Backbone, modules: list[nn.Module], numbers: int) -> MeasuredShape:
    """Return the sizes of any model, by a pass of one image without computing it, with explicit attention."""
    sets = [each for each in modules if isinstance(each, AdaptorSet)]
    acting: Any = Fusion(sets) if len(sets) > 1 else next(iter(modules), None)
    trained = acting is not None and any(True for _ in acting.parameters())
    acting = acting if acting is None else without_tensors(acting).requires_grad_(True)
    width, size = backbone.embedding_dim, backbone.spec.image_size  # they are found before
    twin: Any = without_tensors(backbone)
    for module in twin.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    modules = [twin] if acting is None else [twin, acting]
    held = [each for module in modules for each in (*module.parameters(), *module.buffers())]
    passing, kept = (
        peak_numbers(lambda images: twin(images, acting), size, held=held, gradients=asked)
        for asked in (False, trained)
    )
    return MeasuredShape(size, width, int(MARGIN * passing), int(MARGIN * kept), trained=numbers)


def need_for_batches(context: StageContext, device: torch.device, needed: int) -> None:
    """Check and note the bytes that batches and their reading need on a CPU; on a GPU torch reports a lack itself."""
    if device.type == "cpu":
        context.need_memory(needed + _need_for_originals(context))


def _need_for_originals(context: StageContext) -> int:
    if context.config.images.form != "none":
        return 0
    table = context.run.artifact("images").home / "images.parquet"
    sizes = pd.read_parquet(table, columns=["height", "width"])
    return memory.originals(int(sizes.prod(axis=1).max()), context.num_workers)
