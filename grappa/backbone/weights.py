"""Reading pretrained weights from files: plain tensors under timm's or DINO's names, made to fit a model."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from grappa.backbone.unusable import BackboneError

_shim: list[torch.library.Library] = []


def import_timm() -> Any:
    """Import timm, also where a CPU-only torch stands beside a CUDA-built torchvision.

    There torchvision's compiled operators do not load, and its import fails on the missing schema of ``nms``. To
    declare two schemas is enough for all that timm needs. Where torchvision loads, nothing is declared.
    """
    try:
        return importlib.import_module("timm")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _shim.append(library)
    return importlib.import_module("timm")


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read a state dict from safetensors or a torch file, never unpickling code: float32 tensors under timm's names."""
    if not path.is_file():
        raise BackboneError(f"backbone.weights names {path}, which is no file; give an existing file")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except SafetensorError as error:
        raise BackboneError(f"{path} is no readable safetensors file ({error}); give whole weights") from error
    except Exception as error:  # torch raises many kinds here; all mean the same to a user
        raise BackboneError(
            f"{path} is no plain state dict that can be read without running code; save it as safetensors"
        ) from error
    return {_timm_key(key): value.float() for key, value in _innermost(state, path).items()}


def load_state(vit: nn.Module, state: Mapping[str, Tensor], *, source: str) -> None:
    """Load a state dict into a VisionTransformer; all tensors must fit and be finite.

    A classifier in the file is ignored; positions for another image size are resampled.
    """
    wanted = vit.state_dict()
    given = {key: value for key, value in state.items() if key in wanted or not _is_head(key)}
    if "pos_embed" in given and given["pos_embed"].shape != wanted["pos_embed"].shape:
        given["pos_embed"] = _resample_positions(vit, given["pos_embed"], source)
    missing, unknown = sorted(set(wanted) - set(given)), sorted(set(given) - set(wanted))
    wrong = [key for key in wanted if key in given and wanted[key].shape != given[key].shape]
    if missing or unknown or wrong:
        raise BackboneError(_misfit(source, missing, unknown, wrong, given, wanted))
    broken = [key for key, value in given.items() if not bool(torch.isfinite(value).all())]
    if broken:
        raise BackboneError(f"the weights in {source} hold NaN or infinity (first: {broken[0]}); give whole weights")
    vit.load_state_dict(dict(given), strict=True)


def _misfit(
    source: str,
    missing: list[str],
    unknown: list[str],
    wrong: list[str],
    given: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
) -> str:
    parts = [f"{len(missing)} tensors missing (first: {missing[0]})"] if missing else []
    parts += [f"{len(unknown)} unknown (first: {unknown[0]})"] if unknown else []
    parts += [f"{k} is {tuple(given[k].shape)} instead of {tuple(wanted[k].shape)}" for k in wrong[:1]]
    return (
        f"the weights in {source} do not fit backbone.name: {'; '.join(parts)}; set the name and options they belong to"
    )


def _innermost(state: Any, path: Path) -> dict[str, Tensor]:
    for name in ("teacher", "state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(name), dict):
            state = state[name]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise BackboneError(f"{path} holds no state dict (names with tensors); give such a file")
    return state


def _timm_key(key: str) -> str:
    for prefix in ("module.", "backbone.", "vit."):
        key = key.removeprefix(prefix)
    return key


def _is_head(key: str) -> bool:
    return key.split(".")[0] in {"head", "head_dist", "pre_logits", "fc", "mask_token"}


def _resample_positions(vit: nn.Module, positions: Tensor, source: str) -> Tensor:
    timm = import_timm()
    model: Any = vit
    prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    side = (positions.shape[1] - prefix) ** 0.5
    if positions.ndim != 3 or positions.shape[2] != model.embed_dim:
        return positions
    if side != int(side):
        raise BackboneError(f"the positions in {source} have shape {tuple(positions.shape)}, which is no square grid")
    resampled: Tensor = timm.layers.resample_abs_pos_embed(
        positions, new_size=list(model.patch_embed.grid_size), num_prefix_tokens=prefix
    )
    return resampled
