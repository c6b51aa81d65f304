"""The adapted model as a user deploys it: images in, L2-normalised embeddings out.

A model folder holds ``model.json`` (architecture and preprocessing) and ``weights.safetensors`` (backbone, adaptor
sets, fusion if there is one, and head): no pickle, and neither network nor other files are needed to open it. A model
without a fusion has one adaptor set (a student's, or one that was trained alone) or none (the frozen backbone).
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

from grappa.backbone.vit import Backbone, BackboneSpec, build_backbone, embed
from grappa.core.arrays import below
from grappa.images.decoding import image_to_rgb, shrink
from grappa.images.transforms import eval_crop, normalize
from grappa.method.adaptors import AdaptorSet, folded
from grappa.method.fusion import FoldedFusion, Fusion
from grappa.method.head import Head, IdentityHead, open_head

FORMAT = 3


class ModelError(ValueError):
    """A folder that holds no model this version can open; the sentence says why."""


class GrappaModel(nn.Module):
    """The backbone, the fusion or adaptor set that adapts its blocks (in its folded inference form; None: it is frozen
    as it came), and the embedding head (None: no head)."""

    def __init__(
        self, backbone: Backbone, adapted: Fusion | AdaptorSet | None, *, cache_size: int, head: Head | None = None
    ) -> None:
        super().__init__()
        self.adaptation: FoldedFusion | AdaptorSet | None
        if adapted is None:
            self.backbone, self.adaptation = backbone, None
        elif isinstance(adapted, Fusion):
            self.backbone, self.adaptation = backbone, adapted.folded()
        else:
            self.backbone, self.adaptation = folded(backbone, adapted)
        self.head = IdentityHead() if head is None else head
        self.cache_size = cache_size
        self.requires_grad_(False)

    @property
    def embedding_dim(self) -> int:
        return self.backbone.width

    def forward(self, images: Tensor) -> Tensor:
        """Embed (B, 3, S, S) float images, normalised as ``preprocess`` does; (B, D) float32, L2-normalised rows."""
        embeddings: Tensor = self.head(embed(self.backbone, images, self.adaptation))
        return embeddings

    def preprocess(self, image: Image.Image) -> Tensor:
        """Return a PIL image as (3, S, S) float32, by the same steps as the pipeline's images."""
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
    fusion: Fusion | None,
    *,
    cache_size: int,
    head: Head | None = None,
) -> None:
    """Write ``model.json`` and ``weights.safetensors`` into an existing folder.

    Args:
        sets: the adaptor sets by pseudo-granularity, in the fusion's order; without a fusion the only adaptor set, or
            none for the frozen backbone.
        cache_size: pixels of the shorter side of the images the model was adapted on.
        head: the embedding head, fitted on the model's embeddings; None: no head.
    """
    if fusion is None and len(sets) > 1:
        raise ValueError(f"found {len(sets)} adaptor sets and no fusion; a model without one has at most one set")
    head = IdentityHead() if head is None else head
    tensors = {f"backbone.{name}": value for name, value in backbone.vit.state_dict().items()}
    for name, adaptor_set in sets.items():
        tensors.update({f"sets.{name}.{key}": value for key, value in adaptor_set.state_dict().items()})
    tensors.update({f"fusion.{key}": value for key, value in fusion.trained_state().items()} if fusion else {})
    tensors.update({f"head.{key}": value for key, value in head.state_dict().items()})
    record = {
        "format": FORMAT,
        "backbone": backbone.spec.to_json(),
        "cache_size": cache_size,
        "sets": list(sets),
        "fusion": fusion.form() if fusion else None,
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
        backbone.vit.load_state_dict(below(tensors, "backbone."))
        adapted = _open_adapted(record, tensors)
        head = open_head(record["head"], below(tensors, "head."))
        return GrappaModel(backbone, adapted, cache_size=int(record["cache_size"]), head=head).eval()
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"model.json and weights.safetensors in {folder} disagree ({error}); export the model again"
        ) from error


def _open_adapted(record: Mapping[str, Any], tensors: dict[str, Tensor]) -> Fusion | AdaptorSet | None:
    sets = [AdaptorSet.from_state_dict(below(tensors, f"sets.{name}.")) for name in record["sets"]]
    if record["fusion"] is None:
        (only,) = sets or (None,)
        return only
    fusion = Fusion(sets, level=record["fusion"]["level"], temperature=record["fusion"]["temperature"])
    fusion.load_trained_state(below(tensors, "fusion."))
    return fusion


def _read_record(folder: Path) -> dict[str, Any]:
    path = folder / "model.json"
    try:
        record: dict[str, Any] = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        advice = "give a folder written by `grappa export`, or a run folder"
        raise ModelError(f"{folder} has no model.json; {advice}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is not JSON ({error}); export the model again") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        found = record.get("format") if isinstance(record, dict) else record
        raise ModelError(f"{path} has format {found!r}, this version reads {FORMAT}; update grappa or export again")
    return record


def _read_weights(folder: Path) -> dict[str, Tensor]:
    path = folder / "weights.safetensors"
    if not path.is_file():
        raise ModelError(f"{folder} has no weights.safetensors; give a folder written by `grappa export`")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ModelError(f"{path} is damaged ({error}); export the model again") from error
