"""Pretrained weights from files and from timm's hub: read, made to fit a model, checked, loaded."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from grappa.backbone.files.hub import HUB, unreachable
from grappa.backbone.files.layouts import label_of
from grappa.backbone.files.matching import Match, find_match
from grappa.backbone.files.reading import read_state_dict
from grappa.backbone.library import architecture_of, import_timm, quiet
from grappa.backbone.tensors import may_be_infinite
from grappa.backbone.unusable import BackboneError

__all__ = ["BackboneError", "hub_state", "import_timm", "load_state", "read_state_dict"]

_SIZES = {192: "tiny", 384: "small", 768: "base", 1024: "large", 1280: "huge", 1408: "giant", 1536: "giant"}
MOST_GROUPS = 4  # of ignored tensors, in a sentence
_EXPECTED = "expected timm's names or a layout of the table `Weight files` in grappa/README.md"


def load_state(model: nn.Module, state: Mapping[str, Tensor], *, source: str) -> str:
    """Load weights into a model, whatever prefix and layout they have; all that the features need must be there.

    Names and positions of other layouts and image sizes are converted as timm does, numbers become the model's type.
    Heads, decoders, mask tokens and other modules are left out.

    Args:
        model: any module; timm's conversions are for modules that timm built.
        state: tensors, as `read_state_dict` or `hub_state` return them.
        source: the file or name that a sentence names.

    Returns:
        What is worth saying: the prefix taken, the layout, what was ignored; "" where the names were the model's.

    Raises:
        BackboneError: tensors are missing, unknown, of another shape, or hold NaN or infinity. The model is unchanged.
    """
    match = find_match(model, state)
    if not match.fits:
        raise BackboneError(_misfit(model, match, state, source))
    if match.rivals:
        raise BackboneError(
            f"{source} holds two models of this kind, under {match.prefix!r} and {match.rivals[0]!r}; "
            "save the tensors of one in a file of their own"
        )
    kinds = {name: value.dtype for name, value in model.state_dict().items()}
    for name, value in match.state.items():
        number = value.to(kinds[name])
        if not bool((~number.isnan() if may_be_infinite(name) else number.isfinite()).all()):
            raise BackboneError(f"the weights in {source} hold NaN or infinity (first: {name}); give whole weights")
    with torch.no_grad():
        model.load_state_dict(match.state, strict=False)
    return _said(match)


def hub_state(name: str) -> dict[str, Tensor]:
    """Return the pretrained weights of a name of timm as its hub has them, for `load_state`.

    Raises:
        BackboneError: timm knows no weights of this name, or they are not at hand and cannot be had; in 5 seconds.
    """
    timm = import_timm()
    try:
        record = timm.get_pretrained_cfg(name)
    except RuntimeError:  # an architecture without a tag of this name
        record = None
    if record is None or not record.has_weights:
        raise BackboneError(
            f"timm has no pretrained weights for {name!r}; give a file with --set backbone.weights=FILE"
        )
    if record.hf_hub_id:
        return read_state_dict(HUB + record.hf_hub_id)
    return read_state_dict(_from_address(name, str(record.url)))


def _from_address(name: str, address: str) -> Path:
    """Return the file of weights that lie on a web server; torch keeps it in its own cache."""
    timm = import_timm()
    cached = Path(torch.hub.get_dir()) / "checkpoints" / address.rpartition("/")[2]
    problem = "" if cached.is_file() else unreachable(address)
    try:
        if problem:
            raise OSError(problem)
        with quiet():
            return Path(timm.models._hub.download_cached_file(address))
    except Exception as error:  # many kinds; all mean the same to a user
        raise BackboneError(
            f"the pretrained weights of {name!r} could not be had from {address} ({error}); "
            "give a local file with --set backbone.weights=FILE"
        ) from error


def _said(match: Match) -> str:
    parts = [f"names of {match.layout}"] if match.layout else []
    if match.prefix:
        beside = f" (not {', '.join(each.rstrip('.') for each in match.others)})" if match.others else ""
        parts.append(f"taken from {match.prefix.rstrip('.')}{beside}")
    inside = [name for name in match.ignored if not name.startswith(tuple(match.others))]
    groups = list(dict.fromkeys(_group(name, match.prefix) for name in inside))
    if groups:
        parts.append(f"ignored: {', '.join(groups[:MOST_GROUPS])}{', ...' if len(groups) > MOST_GROUPS else ''}")
    return "; ".join(parts)


def _group(name: str, prefix: str) -> str:
    """Return the start of a name up to where it leaves ``prefix``: ``teacher.head`` of ``teacher.head.mlp.0.bias``."""
    words, taken = name.split("."), prefix.split(".")
    shared = next((place for place, word in enumerate(words) if place >= len(taken) or word != taken[place]), 0)
    return ".".join(words[: shared + 1])


# ---------------------------------------------------------------- what does not fit


def _misfit(model: nn.Module, match: Match, state: Mapping[str, Tensor], source: str) -> str:
    wanted = model.state_dict()
    parts = [f"{len(match.missing)} tensors missing (first: {match.missing[0]})"] if match.missing else []
    parts += [f"{len(match.unknown)} unknown (first: {match.unknown[0]})"] if match.unknown else []
    parts += [_wrong(name, match.state[name], wanted[name]) for name in match.wrong[:1]]
    where = f" under {match.prefix!r}" if match.prefix and 2 * len(match.missing) <= len(wanted) else ""
    label = match.layout or label_of(state)
    looks = f" (they look like {label}{where})" if label else ""
    return (
        f"the weights in {source}{looks} do not fit backbone.name: {'; '.join(parts)}; {_advice(model, match, label)}"
    )


def _wrong(name: str, given: Tensor, wanted: Tensor) -> str:
    if given.shape != wanted.shape:
        return f"{name} is {tuple(given.shape)} instead of {tuple(wanted.shape)}"
    return f"{name} holds {given.dtype} instead of floating-point numbers"


def _advice(model: nn.Module, match: Match, label: str) -> str:
    wanted = model.state_dict()
    if not match.state:
        return f"no name fits: {f'this is another architecture, or {_EXPECTED}' if label else _EXPECTED}"
    if 2 * len(match.missing) > len(wanted):
        return (
            "most names differ, so the file is of another architecture: set backbone.name to it, or give another file"
        )
    found, own = _measures(match.state, [*match.state, *match.unknown]), _measures(wanted, wanted)
    if found != own and "width" in found:
        sizes = ", ".join(f"{what} {value}" for what, value in found.items())
        close = _close_names(architecture_of(model), found)
        return f"the file has {sizes}: set backbone.name or backbone.options to such a model{close}"
    biased = f"{architecture_of(model)}_qkvb"
    if match.unknown and all(name.endswith("qkv.bias") for name in match.unknown) and import_timm().is_model(biased):
        return f"queries and values have a bias in this file: set backbone.name={biased}"
    if match.wrong and not match.missing and not match.unknown:
        return "the file is of another size of this architecture: set backbone.name or backbone.options to it"
    right = "" if match.wrong else "the sizes are right, so "
    return f"{right}the file is incomplete or of another variant of this architecture (backbone.name, backbone.options)"


def _measures(state: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, int]:
    """Return width, blocks and patch of a transformer's weights; what is not seen is left out."""
    patches = state.get("patch_embed.proj.weight")
    numbers = [int(found.group(1)) for name in names if (found := re.match(r"blocks\.(\d+)\.", name))]
    measures = {} if patches is None else {"width": patches.shape[0]}
    if numbers:
        measures["blocks"] = max(numbers) + 1
    if patches is not None and patches.ndim == 4:
        measures["patch"] = patches.shape[-1]
    return measures


def _close_names(architecture: str, found: Mapping[str, int]) -> str:
    """Return timm's names of such sizes that are most like ``architecture``, as the end of a sentence."""
    import difflib

    size, patch = _SIZES.get(found.get("width", 0)), found.get("patch")
    names = import_timm().list_models(f"*_{size}_patch{patch}*") if size and patch else []
    close = difflib.get_close_matches(architecture, names, n=2, cutoff=0.0)
    return f" (as {' or '.join(close)})" if close else ""
