"""Reading weight files without running code: what a file is, is told by its first bytes, never by its name.

Tensors keep the type they are stored in and, where file and library allow it, stay mapped from the file: a checkpoint
of many gigabytes is not held in memory beside the model.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from grappa.backbone.files.places import files_of
from grappa.backbone.unusable import BackboneError

_STARTS = {
    b"version https://git-lfs": "is a pointer of Git LFS, not the file itself; fetch it by `git lfs pull`",
    b"<": "is a web page, not weights; download the file again",
    b"\x89HDF": "is an HDF5 file (Keras); give weights of PyTorch",
    b"\x93NUMPY": "is one array of numpy; give a state dict of PyTorch or safetensors",
    b"\x1f\x8b": "is packed by gzip; unpack it first",
    b"GGUF": "is a GGUF file (llama.cpp); give safetensors",
}
_NUMPY = ("core", "_core")  # the older and the newer name of one part of numpy
_CODE = "holds more than tensors, which cannot be read without running code"


class _Left:
    """Stands for a harmless object beside the tensors; whatever it is made of is left out."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


# What training scripts save beside the tensors. None of it runs code of the file: classes of other packages are not
# imported, an object without content or a dictionary stands for each.
_OBJECTS = (
    *("omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig", "omegaconf.nodes.AnyNode"),
    *("omegaconf.base.ContainerMetadata", "omegaconf.base.Metadata", "typing.Any", "types.SimpleNamespace"),
    *("mmengine.logging.history_buffer.HistoryBuffer", "mmcv.utils.config.Config", "mmengine.config.config.Config"),
    *("pathlib.PosixPath", "pathlib.WindowsPath", "pathlib._local.PosixPath", "pathlib._local.WindowsPath"),
)
_DICTIONARIES = (
    *("lightning_fabric.utilities.data.AttributeDict", "lightning.fabric.utilities.data.AttributeDict"),
    *("pytorch_lightning.utilities.parsing.AttributeDict", "yacs.config.CfgNode", "fvcore.common.config.CfgNode"),
    *("addict.addict.Dict", "addict.Dict", "easydict.EasyDict", "mmengine.config.config.ConfigDict"),
    *("mmcv.utils.config.ConfigDict", "timm.utils.misc.AttrDict"),
)


def _harmless() -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """Return what a torch file may name beside tensors: settings, numbers and arrays of numpy."""
    scalar: Any = np.float64(0).__reduce__()[0]
    array: Any = np.zeros(0).__reduce__()[0]
    return [
        argparse.Namespace,
        np.dtype,
        np.ndarray,
        *{type(np.dtype(code)) for code in "?bhilqpBHILQPefdgSU"},
        *((maker, f"numpy.{part}.multiarray.{maker.__name__}") for maker in (scalar, array) for part in _NUMPY),
        *((_Left, name) for name in _OBJECTS),
        *((collections.OrderedDict, name) for name in _DICTIONARIES),
    ]


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Return all tensors of a weight file as they are stored, nested ones under joined names (``teacher.cls_token``).

    Args:
        path: a file of safetensors or of torch (zip or older), a folder of a model with its weight file or shards,
            ``local-dir:FOLDER`` or ``hf-hub:OWNER/NAME``. A torch file may hold settings beside the tensors.

    Raises:
        BackboneError: no such file, a file that is damaged, holds no tensors, or cannot be read without running code;
            the sentence says what the file is.
    """
    state: dict[str, Tensor] = {}
    for file in files_of(path):
        state.update(_tensors(_content(file)))
    if not state:
        raise BackboneError(f"{path} holds no state dict (names with tensors); give such a file")
    return state


def _tensors(content: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(content, Tensor):
        if name:
            yield name, content.detach()
    elif isinstance(content, np.ndarray) and content.dtype.kind in "fiub":
        yield name, torch.from_numpy(content)
    elif isinstance(content, Mapping):
        for key, value in content.items():
            if not (isinstance(value, Tensor) and not name and not isinstance(key, str)):
                yield from _tensors(value, f"{name}.{key}" if name else str(key))


def _content(file: Path) -> Any:
    with file.open("rb") as opened:
        start = opened.read(64)
    for known, sentence in _STARTS.items():
        if start.startswith(known):
            raise BackboneError(f"{file} {sentence}")
    if _is_safetensors(start, file):
        return _read_safetensors(file)
    if start.startswith(b"PK"):
        return _read_zip(file)
    return _read_torch(file, mapped=False)


def _is_safetensors(start: bytes, file: Path) -> bool:
    """Tell whether a file begins as safetensors do (the length of a JSON object, then the object), or says it is."""
    length = int.from_bytes(start[:8], "little")
    return (start[8:9] == b"{" and length < 100_000_000) or file.suffix == ".safetensors"


def _read_safetensors(file: Path) -> Any:
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise BackboneError(f"{file} is no readable safetensors file ({error}); give whole weights") from error


def _read_zip(file: Path) -> Any:
    try:
        with zipfile.ZipFile(file) as opened:
            names = opened.namelist()
    except (zipfile.BadZipFile, OSError) as error:
        raise BackboneError(f"{file} is damaged or was not copied to its end ({error}); copy it again") from error
    if any(name.endswith("/constants.pkl") for name in names):
        raise BackboneError(f"{file} is a program (TorchScript); save its state_dict() by safetensors' save_file")
    if any(name.endswith(".npy") for name in names):
        raise BackboneError(f"{file} holds arrays of numpy (JAX, Flax); give weights of PyTorch")
    if not any(name.endswith("data.pkl") for name in names):
        raise BackboneError(f"{file} is a zip archive without weights of PyTorch; unpack it, or give another file")
    return _read_torch(file, mapped=True)


def _read_torch(file: Path, *, mapped: bool) -> Any:
    try:
        with torch.serialization.safe_globals(_harmless()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old pickle protocols: what cannot be read is refused below
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch raises many kinds here; the sentence tells them apart
        raise BackboneError(f"{file} {_refusal(file, error, mapped)}") from error


def _refusal(file: Path, error: Exception, mapped: bool) -> str:
    """Return what stands in the way: the objects that a file wants to make, or that it is no file of torch."""
    named = re.search(r"GLOBAL ([\w.]+\.\w+)", str(error))
    names = _foreign(file) if mapped else []
    names = names or ([named.group(1)] if named else [])
    if names:
        save = 'torch.save({"state_dict": model.state_dict()}, FILE)'
        return f"{_CODE} (it names {', '.join(names[:3])}); save the tensors alone: {save}"
    if file.stat().st_size == 0 or isinstance(error, EOFError) or "unexpected pos" in str(error):
        return "is damaged or was not copied to its end; copy it again"
    return "is no state dict that can be read without running code; save it as safetensors"


def _foreign(file: Path) -> list[str]:
    """Return the classes and functions that a file names and that are not allowed; none where it cannot be told."""
    with contextlib.suppress(Exception), torch.serialization.safe_globals(_harmless()):
        return list(torch.serialization.get_unsafe_globals_in_checkpoint(file))
    return []
