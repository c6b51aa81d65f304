"""Stage ``backbone``: a copy of the pretrained weights in the run, so that no later stage needs the hub or a file."""

from __future__ import annotations

from grappa.backbone.frozen import load_backbone
from grappa.backbone.tensors import saved
from grappa.pipeline.engine.context import StageContext
from grappa.pipeline.store.checkpoints import write_tensors
from grappa.pipeline.store.storage import atomic_write_json


def run(context: StageContext) -> str:
    settings = context.config.backbone
    remarks: list[str] = []
    backbone = load_backbone(
        settings.name,
        weights=settings.weights,
        image_size=settings.image_size,
        crop_fraction=settings.crop_fraction,
        mean=settings.mean,
        std=settings.std,
        options=settings.options,
        module=settings.module,
        say=remarks.append,
    )
    state = saved(backbone.model)
    write_tensors(context.path / "weights.safetensors", state)
    atomic_write_json(context.path / "backbone.json", backbone.spec.to_json())
    millions = sum(value.numel() for value in state.values()) / 1e6
    spec = backbone.spec
    size = f"{spec.name}: {millions:.1f} M parameters, {len(backbone.units)} blocks, {spec.image_size} px input"
    return f"{size} (weights: {remarks[0]})" if remarks else size
