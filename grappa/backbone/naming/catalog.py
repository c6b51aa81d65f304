"""Which backbones there are, by name: judged, listed and described from timm's source files, without loading torch."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Any

from grappa.backbone.naming.timm_source import (
    Declared,
    SourceFile,
    declared,
    find_file,
    former_names,
    pretrained_names,
    source_files,
)
from grappa.backbone.spec import CROP_MODES
from grappa.core.printing import shown

# Why architectures can be no backbone, as it turns out when they are built.
_ENCODERS = ("deepseek_vit_412m", "gemma4_vit_167m", "gemma4_vit_570m", *(f"qwen3_vit_{n}m" for n in (88, 306, 416)))
REFUSED: Mapping[str, str] = {
    **dict.fromkeys(
        (f"{each}_enc" for each in _ENCODERS),
        "it gives tokens for a language model, not one vector an image",
    ),
}
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")  # of which timm takes the first that there is
# Files of timm whose models' embedding is not as wide as what `_stated_width` reads says.
_OTHER_WIDTHS = frozenset(
    "convit crossvit efficientvim fasternet fastvit hieradet_sam2 inception_next mambaout qwen3_vit visformer "
    "vision_transformer_sam vitamin".split()
)


@dataclass(frozen=True)
class CatalogEntry:
    """A pretrained model of timm, as the source says.

    family: the file of timm that has the architecture. width: D of its embeddings, or None where the source does not
    say it plainly. image_size: height and width of its input in pixels. weights: their file on this machine, or None.
    refused: why it can be no backbone, or "".
    """

    name: str
    family: str
    width: int | None
    image_size: tuple[int, int]
    weights: Path | None
    refused: str


def list_backbones(pattern: str = "*") -> list[CatalogEntry]:
    """Return the pretrained models whose name matches a pattern with the wildcards ``*``, ``?``, ``[...]``.

    A pattern without wildcards matches the names that contain it.
    """
    wanted = pattern if any(sign in pattern for sign in "*?[") else f"*{pattern}*"
    folders = _cached_folders()
    return [_entry(name, folders) for name in pretrained_names() if fnmatchcase(name, wanted.lower())]


def _entry(name: str, folders: Collection[str]) -> CatalogEntry:
    model = name.partition(".")[0]
    found, file = declared(name), find_file(model)
    if found is None or file is None:
        raise ValueError(f"timm's source does not have {name!r}; give a name of timm")
    _, height, width = found.weights.input_size
    weights, refused = _file_of(found, folders), _refusal(model, found.weights)
    return CatalogEntry(name, found.family, _stated_width(file, model), (height, width), weights, refused)


# ---------------------------------------------------------------- what is wrong with a name


def name_problem(name: str) -> str:
    """Return a sentence where ``name`` can be no backbone; "" where nothing speaks against it.

    Refused are names that timm does not have, tags of weights that it does not have, and architectures whose blocks
    cannot be adapted. What else makes a model unsuitable is found when it is built.
    """
    model, _, tag = name.partition(".")
    if not source_files():
        return ""
    file = find_file(model)
    if file is None:
        return _unknown(name)
    found = declared(name)
    reason = _refusal(model, found.weights if found else None)
    if reason:
        return f"{name!r} can be no backbone: {reason}; `grappa backbones` lists what can"
    if tag and file.weights and found is None:
        known = sorted(each for each in file.weights[model].tags if each) if model in file.weights else []
        hint = f"there are {', '.join(known)}" if known else "leave out what follows the dot"
        return f"timm has no weights called {name!r}; {hint}"
    return ""


def _unknown(name: str) -> str:
    model = name.partition(".")[0]
    former = former_names()
    if model in former:
        now = former[model]
        advice = f"set it to {now}, as it is called now" if now else "choose another one"
        return f"timm no longer has a model called {name!r}; {advice}"
    models = [each for file in source_files() for each in file.models]
    close = difflib.get_close_matches(model.lower(), models, n=1, cutoff=0.75)
    hint = f"did you mean {close[0]}?" if close else f"see `grappa backbones{_search_word(name, models)}`"
    return f"timm has no model called {shown(name)}; {hint}"


def _search_word(name: str, models: Collection[str]) -> str:
    """Return a blank and the first word of an unknown name that names of timm contain, to search by; else ""."""
    words = (word for word in re.findall(r"[a-z]+\d*", name.lower()) if len(word) > 3)
    return next((f" {word}" for word in words if any(word in model for model in models)), "")


def _refusal(model: str, weights: Any) -> str:
    """Return why a model can be no backbone, by its architecture or by how its images are framed; "" where it can."""
    if model in REFUSED:
        return REFUSED[model]
    if weights is not None and weights.crop_mode not in CROP_MODES:
        return f"its images are framed by {weights.crop_mode}; known are {' and '.join(CROP_MODES)}"
    return ""


# ---------------------------------------------------------------- what the source says of a model


def patch_size(name: str, options: Mapping[str, Any]) -> int | None:
    """Return the side of a model's square patches in pixels, as options or source say it; None where neither does."""
    model = name.partition(".")[0]
    file = find_file(model)
    stated = options.get("patch_size", file.arguments(model).get("patch_size") if file else None)
    return stated if isinstance(stated, int) and stated > 0 else None


def _stated_width(file: SourceFile, model: str) -> int | None:
    """Return the width of the embeddings where the function of the model gives it; stages double the first's width."""
    if file.family in _OTHER_WIDTHS:
        return None
    given = file.arguments(model)
    width = next((given[name] for name in ("embed_dim", "embed_dims", "dims") if name in given), None)
    if isinstance(width, tuple | list):
        return int(width[-1])
    stages = next((len(given[name]) for name in ("depths", "stages") if isinstance(given.get(name), tuple | list)), 1)
    return None if width is None else int(width) * 2 ** (stages - 1)


# ---------------------------------------------------------------- weights on this machine


def find_weights(name: str) -> Path | None:
    """Return the file of a model's pretrained weights in the local cache of the hub; None where it is not there."""
    found = declared(name)
    return _file_of(found, _cached_folders()) if found and found.has_weights else None


def _file_of(found: Declared, folders: Collection[str]) -> Path | None:
    hub, url = found.hub_id, found.weights.url
    if hub:
        folder = f"models--{hub.replace('/', '--')}"
        snapshots = (_hub_cache() / folder).glob("snapshots/*") if folder in folders else ()
        files = (each / name for each in snapshots for name in _HUB_FILES)
    else:
        files = (_torch_cache() / PurePosixPath(str(url)).name for _ in range(1))
    return next((each for each in files if each.is_file()), None)


def _cached_folders() -> frozenset[str]:
    try:
        return frozenset(os.listdir(_hub_cache()))
    except OSError:
        return frozenset()


def _hub_cache() -> Path:
    return Path(import_module("huggingface_hub.constants").HF_HUB_CACHE)


def _torch_cache() -> Path:
    """Return where torch keeps what it downloads from plain addresses, as ``torch.hub`` says."""
    caches = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    return Path(os.environ.get("TORCH_HOME", f"{caches}/torch")).expanduser() / "hub" / "checkpoints"
