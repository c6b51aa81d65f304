"""The adapted model as a user deploys it: images in, L2-normalised embeddings out.

A model folder holds ``model.json`` (architecture and preprocessing) and ``weights.safetensors`` (backbone, adaptor
sets, fusion if there is one, and head): no pickle, and neither network nor other files are needed to open it. A model
without a fusion has one adaptor set (a student's, or one that was trained alone) or none (the frozen backbone).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from grappa.backbone.frozen import Backbone, build_backbone, embed
from grappa.backbone.own_module import Maker
from grappa.backbone.spec import BackboneSpec
from grappa.backbone.tensors import fill, give_memory, saved, tables_of
from grappa.core.arrays import below
from grappa.core.devices import usable_device
from grappa.core.printing import sentence, shown
from grappa.deploy.encoding import (
    BATCH,
    MAX_PIXELS,
    Errors,
    Item,
    ItemError,
    Report,
    encode,
    is_single,
    named,
    prepared,
)
from grappa.images.decoding import shrink
from grappa.images.framing import eval_crop
from grappa.method.adaptors import AdaptorSet, folded
from grappa.method.fusion import FoldedFusion, Fusion
from grappa.method.head import Head, IdentityHead, open_head
from grappa.model_folder import (
    FusionForm,
    ModelError,
    ModelRecord,
    check_weights,
    read_header,
    read_record,
    read_tensors,
    write_model,
)

__all__ = ["GrappaModel", "ItemError", "ModelError", "load_model", "save_model"]


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
        """The width D of an embedding."""
        return self.backbone.embedding_dim

    @property
    def spec(self) -> BackboneSpec:
        """How the input is prepared, and what the backbone is made of."""
        return self.backbone.spec

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return next((each.device for each in self.parameters()), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """The type of number that the backbone computes in."""
        return next((each.dtype for each in self.parameters()), torch.float32)

    def forward(self, images: Tensor) -> Tensor:
        """Embed (B, 3, S, S) float images, normalised as ``preprocess`` does; (B, D) float32, L2-normalised rows."""
        embeddings: Tensor = self.head(embed(self.backbone, images.to(self.dtype), self.adaptation))
        return embeddings

    @overload
    def encode(
        self,
        items: Item | Iterable[Item],
        *,
        batch_size: int = ...,
        device: str | torch.device | None = ...,
        progress: Report = ...,
        errors: Literal["raise"] = ...,
        max_pixels: int = ...,
    ) -> NDArray[np.float32]: ...

    @overload
    def encode(
        self,
        items: Item | Iterable[Item],
        *,
        batch_size: int = ...,
        device: str | torch.device | None = ...,
        progress: Report = ...,
        errors: Literal["mask"],
        max_pixels: int = ...,
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]: ...

    def encode(
        self,
        items: Item | Iterable[Item],
        *,
        batch_size: int = BATCH,
        device: str | torch.device | None = None,
        progress: Report = False,
        errors: Errors = "raise",
        max_pixels: int = MAX_PIXELS,
    ) -> NDArray[np.float32] | tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Embed images: (N, D) float32, L2-normalised, in the order of ``items``.

        Threads read, decode and crop a batch ahead. The same image in batches of the same size has the same bits as
        from `grappa embed`.

        Args:
            items: paths, PIL images, (H, W, 3) uint8 arrays, (3, H, W) uint8 tensors, or what ``preprocess`` returns,
                (3, S, S) float tensors; mixed as you like, any iterable. One item counts as a list of one.
            batch_size: images a forward pass.
            device: where to compute; the model moves there and stays. None: where it is.
            progress: a bar on stderr; or a function that is told the number of items done, and of all (None: unknown).
            errors: ``raise``: an item that cannot be used is an error that names it. ``mask``: its row is NaN, a
                warning names the first one, and what is returned is (embeddings, mask), mask (N,) bool, False there.
            max_pixels: a larger image is not decoded.

        Raises:
            ItemError: an item is no image, or a broken one. A ValueError, as for a device that is not there.
        """
        if device is not None:
            self.to(usable_device(device))
        several: Any = [items] if is_single(items) else items
        options: dict[str, Any] = {"batch_size": batch_size, "progress": progress, "max_pixels": max_pixels}
        embeddings, mask = encode(self, several, errors=errors, **options)
        return embeddings if errors == "raise" else (embeddings, mask)

    def preprocess(self, items: Item | Sequence[Item], *, max_pixels: int = MAX_PIXELS) -> Tensor:
        """Return an image as (3, S, S) float32, or a list of them as (B, 3, S, S): the input of ``forward``.

        An image is what ``encode`` takes; the steps are those of the pipeline's images. ItemError, a ValueError, for
        what cannot be used.
        """
        if is_single(items):
            one: Any = items
            return prepared(self, one, max_pixels)
        several: Any = items
        side, found = self.spec.image_size, []
        for number, item in enumerate(several):
            try:
                found.append(prepared(self, item, max_pixels))
            except ItemError as error:
                raise ItemError(f"{named(item, number)}: {error}") from error
        return torch.stack(found) if found else torch.empty(0, 3, side, side)

    def crop(self, image: np.ndarray[Any, Any]) -> Tensor:
        """Return an (H, W, 3) uint8 image as (3, S, S) uint8: shrunk as in the pixel cache, then its middle."""
        cropped = eval_crop(shrink(image, self.cache_size), **self.backbone.spec.framing)
        return torch.from_numpy(cropped.copy()).permute(2, 0, 1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GrappaModel:
        """Do what ``to``, ``half`` and the like ask for; the head's numbers stay float32, which its steps need."""
        for part in (self.backbone, self.adaptation):
            if part is not None:
                part._apply(fn, recurse)
        self.head._apply(lambda tensor: _of_its_type(fn(tensor), tensor))
        return self


def _of_its_type(found: Tensor, tensor: Tensor) -> Tensor:
    """Return ``tensor`` where ``found`` is, without its change of type."""
    return found if found.dtype == tensor.dtype else tensor.to(found.device)


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
    tensors = {f"backbone.{name}": value for name, value in saved(backbone.model).items()}
    for name, adaptor_set in sets.items():
        tensors.update({f"sets.{name}.{key}": value for key, value in adaptor_set.state_dict().items()})
    tensors.update({f"fusion.{key}": value for key, value in fusion.trained_state().items()} if fusion else {})
    tensors.update({f"head.{key}": value for key, value in head.state_dict().items()})
    fusion_form = FusionForm(**fusion.form()) if fusion else None
    record = ModelRecord(backbone.spec, cache_size, tuple(sets), fusion_form, head.form(), backbone.embedding_dim)
    write_model(folder, record, tensors)


def load_model(folder: str | Path, module: Maker | None = None) -> GrappaModel:
    """Open a model folder; the result is in evaluation mode on the CPU.

    The folder may come from anybody: the model is first put together from the names and shapes of its tensors alone,
    which takes no memory, and then from the tensors. Later changes of the files do not reach the model.

    Args:
        module: the function (or ``package.module:function``) that makes the backbone, of a model whose backbone is not
            timm's. The folder only names it; what is run is this.

    Raises:
        ModelError: a file is missing, damaged, or not the one that was exported, a value is out of its range, the two
            files disagree, or the folder was written by another version.
    """
    folder = Path(folder)
    record, header = read_record(folder), read_header(folder)
    check_weights(folder, record)
    if bool(record.backbone.module) != (module is not None):
        made = f"made by {record.backbone.module}" if record.backbone.module else "one of timm's"
        advice = "give that function: load_model(folder, module=...)" if record.backbone.module else "give no module"
        raise ModelError(f"the backbone of {folder} is {made}; {advice}")
    try:
        if module is not None:
            return _assembled(record, read_tensors(folder), build_backbone(record.backbone, module)).eval()
        with torch.device("meta"):
            backbone = build_backbone(record.backbone)
        _try_on_paper(record, header, backbone)
        return _assembled(record, read_tensors(folder), _with_memory(backbone)).eval()
    except ModelError:
        raise
    except (KeyError, TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise ModelError(
            f"model.json and weights.safetensors in {folder} disagree ({sentence(error, limit=300)}); export the model "
            "again"
        ) from error


def _with_memory(backbone: Backbone) -> Backbone:
    """Return a backbone built by shapes alone with memory for all that ``_assembled`` fills.

    Tables of whole numbers that are saved are computed too: a wrong one would lead out of a tensor.
    """
    if not tables_of(backbone.model):
        give_memory(backbone.model)
        return backbone
    return build_backbone(backbone.spec)


def _try_on_paper(record: ModelRecord, header: Mapping[str, Tensor], backbone: Backbone) -> None:
    """Put the model together and embed two images by shapes alone; an error where something does not fit."""
    side = record.backbone.image_size
    with torch.device("meta"), torch.inference_mode():
        found = _assembled(record, header, backbone)(torch.empty(2, 3, side, side))
    if found.shape != (2, record.embedding_dim):
        raise ValueError(f"an embedding has the shape {tuple(found.shape[1:])}, not ({record.embedding_dim},)")


def _assembled(record: ModelRecord, tensors: Mapping[str, Tensor], backbone: Backbone) -> GrappaModel:
    """Return the model of a record and its tensors, which ``backbone`` gets; an error where the two disagree."""
    parts = ("backbone.", "head.", *(["fusion."] if record.fusion else []), *(f"sets.{name}." for name in record.sets))
    unknown = [name for name in tensors if not name.startswith(parts)]
    if unknown:
        raise ValueError(f"the tensor {shown(unknown[0])} belongs to no part of the model")
    state = below(tensors, "backbone.")
    for name, table in tables_of(backbone.model).items():
        if name in state and not table.is_meta and not torch.equal(state[name], table):
            raise ValueError(f"backbone.{name} is not the table of this architecture")
    fill(backbone.model, state, "backbone.")
    if backbone.embedding_dim != record.embedding_dim:
        raise ValueError(f"embedding_dim is {record.embedding_dim}, the backbone's is {backbone.embedding_dim}")
    adapted = _open_adapted(record, tensors, backbone)
    head = open_head(record.head, below(tensors, "head."))
    return GrappaModel(backbone, adapted, cache_size=record.cache_size, head=head)


def _open_adapted(record: ModelRecord, tensors: Mapping[str, Tensor], backbone: Backbone) -> Fusion | AdaptorSet | None:
    sets = [AdaptorSet.from_state_dict(below(tensors, f"sets.{name}.")) for name in record.sets]
    for each in sets:
        if misfit := each.misfit(backbone):
            raise ValueError(misfit)
    if record.fusion is None:
        return sets[0] if sets else None
    fusion = Fusion(sets, level=record.fusion.level, temperature=record.fusion.temperature)
    fusion.load_trained_state(below(tensors, "fusion."))
    return fusion
