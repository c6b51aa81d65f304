"""The adapted model as a user deploys it: images in, L2-normalised embeddings out.

A model folder holds ``model.json`` (architecture and preprocessing) and ``weights.safetensors`` (backbone, adaptor
sets, fusion and head): no pickle, and neither network nor other files are needed to open it. Format 1 had no head; it
is still opened.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from grappa.adaptors import AdaptorSet
from grappa.backbone import Backbone, BackboneSpec, build_backbone, embed
from grappa.decoding import image_to_rgb, shrink
from grappa.fusion import Fusion
from grappa.head import Head, IdentityHead, open_head
from grappa.transforms import eval_crop, normalize

FORMAT, FIRST_FORMAT = 2, 1


class ModelError(ValueError):
    """A folder that holds no model this version can open; the sentence says why."""


class GrappaModel(nn.Module):
    """Backbone, adaptor sets and fusion, in their folded inference form, and the embedding head (None: none)."""

    def __init__(self, backbone: Backbone, fusion: Fusion, *, cache_size: int, head: Head | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.residuals = fusion.folded()
        self.head = IdentityHead() if head is None else head
        self.cache_size = cache_size
        self.requires_grad_(False)

    @property
    def embedding_dim(self) -> int:
        return self.backbone.width

    def forward(self, images: Tensor) -> Tensor:
        """Embed (B, 3, S, S) float images, normalised as ``preprocess`` does; (B, D) float32, L2-normalised rows."""
        embeddings: Tensor = self.head(embed(self.backbone, images, list(self.residuals)))
        return embeddings

    def preprocess(self, image: Image.Image) -> Tensor:
        """Return a PIL image as (3, S, S) float32, by the very steps the pipeline's images went through."""
        return normalize(self.crop(image_to_rgb(image)).unsqueeze(0), self.backbone.spec.mean, self.backbone.spec.std)[
            0
        ]

    def crop(self, image: np.ndarray[Any, Any]) -> Tensor:
        """Return an (H, W, 3) uint8 image as (3, S, S) uint8: shrunk as in the pixel cache, then the centre crop."""
        spec = self.backbone.spec
        shrunk = shrink(image, self.cache_size)
        cropped = eval_crop(shrunk, image_size=spec.image_size, crop_fraction=spec.crop_fraction)
        return torch.from_numpy(cropped.copy()).permute(2, 0, 1)


def save_model(
    folder: Path,
    backbone: Backbone,
    sets: Mapping[str, AdaptorSet],
    fusion: Fusion,
    *,
    cache_size: int,
    head: Head | None = None,
) -> None:
    """Write ``model.json`` and ``weights.safetensors`` into an existing folder.

    Args:
        sets: the adaptor sets by pseudo-granularity, in the fusion's order.
        cache_size: pixels of the shorter side of the images the model was adapted on.
        head: the last step, fitted on the fused model's embeddings; None: none.
    """
    head = IdentityHead() if head is None else head
    tensors = {f"backbone.{name}": value for name, value in backbone.vit.state_dict().items()}
    for name, adaptor_set in sets.items():
        tensors.update({f"sets.{name}.{key}": value for key, value in adaptor_set.state_dict().items()})
    tensors.update({f"fusion.{key}": value for key, value in fusion.trained_state().items()})
    tensors.update({f"head.{key}": value for key, value in head.state_dict().items()})
    layer: Any = fusion[0]
    record = {
        "format": FORMAT,
        "backbone": backbone.spec.to_json(),
        "cache_size": cache_size,
        "granularities": list(sets),
        "fusion": {"level": layer.level, "temperature": layer.temperature},
        "head": head.form(),
        "embedding_dim": backbone.width,
    }
    plain = {name: value.contiguous().cpu() for name, value in tensors.items()}
    (folder / "weights.safetensors").write_bytes(save(plain))
    (folder / "model.json").write_text(json.dumps(record, indent=2) + "\n")


def load_model(folder: str | Path) -> GrappaModel:
    """Open a model folder; the result is in evaluation mode on the CPU.

    Raises:
        ModelError: a file is missing or damaged, or was written by a newer version.
    """
    folder = Path(folder)
    record, tensors = _read_record(folder), _read_weights(folder)
    try:
        backbone = build_backbone(BackboneSpec.from_json(record["backbone"]))
        backbone.vit.load_state_dict(_below(tensors, "backbone."))
        sets = [AdaptorSet.from_state_dict(_below(tensors, f"sets.{name}.")) for name in record["granularities"]]
        fusion = Fusion(sets, level=record["fusion"]["level"], temperature=record["fusion"]["temperature"])
        fusion.load_trained_state(_below(tensors, "fusion."))
        head = open_head(record["head"], _below(tensors, "head.")) if record["format"] > FIRST_FORMAT else None
        return GrappaModel(backbone, fusion, cache_size=int(record["cache_size"]), head=head).eval()
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"model.json and weights.safetensors in {folder} disagree ({error}); export the model again"
        ) from error


def _read_record(folder: Path) -> dict[str, Any]:
    path = folder / "model.json"
    try:
        record: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ModelError(f"{folder} has no model.json; give a folder written by `grappa export`") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is not JSON ({error}); export the model again") from error
    if not isinstance(record, dict) or record.get("format") not in (FIRST_FORMAT, FORMAT):
        found = record.get("format") if isinstance(record, dict) else record
        known = f"{FIRST_FORMAT} and {FORMAT}"
        raise ModelError(f"{path} has format {found!r}, this version reads {known}; update grappa or export again")
    return record


def _read_weights(folder: Path) -> dict[str, Tensor]:
    path = folder / "weights.safetensors"
    if not path.is_file():
        raise ModelError(f"{folder} has no weights.safetensors; give a folder written by `grappa export`")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ModelError(f"{path} is damaged ({error}); export the model again") from error


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
