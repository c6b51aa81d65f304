"""Reading and writing a model folder, whoever made it: plain values and plain tensors, checked before anything is made.

``model.json`` says what the tensors of ``weights.safetensors`` are. Nothing in the two files is run, and nothing in
them leads anywhere else. Values are checked for type and range; tensors for finite numbers. A folder that was exported
also says where it came from, and the digest of its weights. What ``model.json`` says is read without torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from grappa.backbone.architectures import Number
from grappa.backbone.spec import BackboneSpec
from grappa.core.printing import sentence, shown

if TYPE_CHECKING:
    from torch import Tensor

    from grappa.method.fusion import AttentionLevel

FORMAT = 3
RECORD_FILE, WEIGHTS_FILE = "model.json", "weights.safetensors"
MAX_RECORD_BYTES, MAX_HEADER_BYTES = 2**20, 2**22  # a hundred times what the largest known model needs
TEMPERATURE = Number(1e-8, 1e8)
_DTYPES = {"F32": "float32", "I64": "int64"}  # int64: counters of batch norms and tables of a backbone
_KEYS = {"format", "backbone", "cache_size", "sets", "fusion", "head", "embedding_dim"}
_LATER_KEYS = {"provenance", "weights_sha256"}  # of exported folders; those of former versions have none
_DIGEST = re.compile(r"[0-9a-f]{64}")
_SET_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_AGAIN = "export the model again"


class ModelError(ValueError):
    """A folder that holds no model this version can open; the sentence says why, on one printable line."""

    def __init__(self, text: str) -> None:
        super().__init__(sentence(text, limit=600))


@dataclass(frozen=True)
class FusionForm:
    """How the layers of a fusion attend: see ``grappa.method.fusion``."""

    level: AttentionLevel
    temperature: float


@dataclass(frozen=True)
class ModelRecord:
    """What ``model.json`` says, checked.

    cache_size: pixels of the shorter side of the images the model was adapted on. sets: the names of the adaptor sets,
    in the fusion's order. head: the ``form()`` of the head. embedding_dim: the width D. weights_sha256: the digest of
    ``weights.safetensors``; "": not told. provenance: where the model came from, for people; nothing computes with it.
    """

    backbone: BackboneSpec
    cache_size: int
    sets: tuple[str, ...]
    fusion: FusionForm | None
    head: Mapping[str, Any]
    embedding_dim: int
    weights_sha256: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in (("cache_size", self.cache_size), ("embedding_dim", self.embedding_dim)):
            _expect(name, value, Number(1, 2**31 - 1, whole=True))
        _check_sets(self.sets, alone=self.fusion is None)
        if self.weights_sha256 != "" and not _is_digest(self.weights_sha256):
            raise ValueError(f"weights_sha256 is {shown(self.weights_sha256)}; expected 64 hexadecimal digits")
        if not isinstance(self.provenance, Mapping):
            raise ValueError(f"provenance is {shown(self.provenance)}; expected an object")
        if self.fusion is not None:
            _expect("fusion.temperature", self.fusion.temperature, TEMPERATURE)
            if self.fusion.level not in ("token", "cls"):
                raise ValueError(f"fusion.level is {shown(self.fusion.level)}; expected token or cls")

    def to_json(self) -> dict[str, Any]:
        """Return the record as it stands in ``model.json``."""
        plain = {"backbone": self.backbone.to_json(), "sets": list(self.sets), "head": dict(self.head)}
        record = {"format": FORMAT, **asdict(self), **plain}
        return {name: value for name, value in record.items() if value or name not in _LATER_KEYS}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> ModelRecord:
        """Return the record that gave this ``to_json()``; ValueError for any other value."""
        if set(record) - _LATER_KEYS != _KEYS:
            raise ValueError(f"it has the keys {shown(sorted(record))}; expected {', '.join(sorted(_KEYS))}")
        fusion, sets, head = record["fusion"], record["sets"], record["head"]
        if fusion is not None and (not isinstance(fusion, dict) or set(fusion) != {"level", "temperature"}):
            raise ValueError(f"fusion is {shown(fusion)}; expected null or an object with level and temperature")
        if not isinstance(sets, list) or not isinstance(head, dict):
            raise ValueError(f"sets is {shown(sets)} and head is {shown(head)}; expected a list and an object")
        return cls(
            backbone=BackboneSpec.from_json(record["backbone"]),
            cache_size=record["cache_size"],
            sets=tuple(sets),
            fusion=None if fusion is None else FusionForm(fusion["level"], fusion["temperature"]),
            head=head,
            embedding_dim=record["embedding_dim"],
            weights_sha256=record.get("weights_sha256", ""),
            provenance=record.get("provenance", {}),
        )


def _check_sets(names: tuple[str, ...], *, alone: bool) -> None:
    if len(set(map(repr, names))) != len(names) or not (names or alone):
        raise ValueError(f"sets is {shown(list(names))}; expected different names, and one or more for a fusion")
    if alone and len(names) > 1:
        raise ValueError(f"found {len(names)} adaptor sets and no fusion; a model without one has at most one set")
    for name in names:
        if not isinstance(name, str) or not _SET_NAME.fullmatch(name):
            raise ValueError(f"an adaptor set is called {shown(name)}; expected letters, digits, - and _")


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


def _expect(name: str, value: object, allowed: Number) -> None:
    if not allowed.allows(value):
        raise ValueError(f"{name} is {shown(value)}; expected {allowed}")


# ---------------------------------------------------------------- writing


def write_model(folder: Path, record: ModelRecord, tensors: Mapping[str, Tensor]) -> None:
    """Write both files into an existing folder."""
    from safetensors.torch import save

    plain = {name: value.contiguous().cpu() for name, value in tensors.items()}
    (folder / WEIGHTS_FILE).write_bytes(save(plain))
    (folder / RECORD_FILE).write_text(json.dumps(record.to_json(), indent=2, allow_nan=False) + "\n")


def seal(folder: Path, provenance: Mapping[str, Any]) -> ModelRecord:
    """Note the digest of the weights and where the model came from in ``model.json``; return the record."""
    digest = weights_digest(folder / WEIGHTS_FILE)
    record = replace(read_record(folder), weights_sha256=digest, provenance=dict(provenance))
    (folder / RECORD_FILE).write_text(json.dumps(record.to_json(), indent=2, allow_nan=False) + "\n")
    return record


def weights_digest(path: Path) -> str:
    """Return the sha256 of a file of weights, in hex; ModelError where it cannot be read."""
    try:
        with path.open("rb", buffering=0) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror}); make it readable") from error


# ---------------------------------------------------------------- reading


def read_record(folder: Path) -> ModelRecord:
    """Return what ``model.json`` says; ModelError where it is no such file, or a value in it is out of its range."""
    path = folder / RECORD_FILE
    try:
        record = json.loads(_small_file(path), parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ModelError(f"{path} has too many brackets in each other; {_AGAIN}") from error
    except ValueError as error:  # of JSON, of UTF-8, of a number with too many digits
        raise (
            error
            if isinstance(error, ModelError)
            else ModelError(f"{path} is not JSON ({sentence(error, limit=100)}); {_AGAIN}")
        ) from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        found = record.get("format") if isinstance(record, dict) else record
        raise ModelError(
            f"{path} has format {shown(found)}, this version reads {FORMAT}; update grappa or export again"
        )
    try:
        return ModelRecord.from_json(record)
    except ValueError as error:
        raise ModelError(f"{path}: {sentence(error)}") from error


def check_weights(folder: Path, record: ModelRecord) -> None:
    """Refuse weights that are not those that were exported, where ``model.json`` tells; ModelError."""
    if record.weights_sha256 and (found := weights_digest(folder / WEIGHTS_FILE)) != record.weights_sha256:
        raise ModelError(
            f"{folder / WEIGHTS_FILE} is not the file that was exported: its sha256 begins with {found[:12]}, "
            f"model.json says {record.weights_sha256[:12]}; copy the folder again, or {_AGAIN}"
        )


def read_header(folder: Path) -> dict[str, Tensor]:
    """Return the tensors' names with empty tensors of their shapes and types, on the device ``meta``."""
    import torch

    path = folder / WEIGHTS_FILE
    _check_header_size(path)
    found = {}
    with _opened(path) as file:
        for name in file.keys():  # noqa: SIM118 (no mapping)
            part = file.get_slice(name)
            kind = _DTYPES.get(part.get_dtype())
            if kind is None or (kind == "int64" and not name.startswith("backbone.")):
                raise ModelError(f"{path}: {shown(name)} is of type {part.get_dtype()}, expected F32; {_AGAIN}")
            if 0 in part.get_shape():
                raise ModelError(f"{path}: {shown(name)} is empty, of shape {shown(part.get_shape())}; {_AGAIN}")
            found[name] = torch.empty(part.get_shape(), dtype=getattr(torch, kind), device="meta")
    return found


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Return copies of all tensors, independent of the file; ModelError where one is not finite."""
    from grappa.backbone.tensors import may_be_infinite

    path = folder / WEIGHTS_FILE
    with _opened(path) as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (no mapping)
    for name, value in tensors.items():
        bad = value.isnan() if may_be_infinite(name) else ~value.isfinite()
        if bool(bad.any()):
            raise ModelError(f"{path}: {shown(name)} holds NaN or infinity; {_AGAIN}")
    return tensors


def _small_file(path: Path) -> bytes:
    """Return the bytes of a regular file that is not larger than a record can be."""
    try:
        status = os.stat(path)
        if stat.S_ISREG(status.st_mode) and status.st_size <= MAX_RECORD_BYTES:
            return path.read_bytes()
    except (OSError, ValueError) as error:
        advice = "give a folder written by `grappa export`, or a run folder"
        reason = "" if isinstance(error, FileNotFoundError | NotADirectoryError) else f" ({sentence(error, limit=100)})"
        raise ModelError(f"{path.parent} has no {RECORD_FILE}{reason}; {advice}") from error
    found = f"{status.st_size} bytes" if stat.S_ISREG(status.st_mode) else "no regular file"
    raise ModelError(f"{path} is {found}, expected a file of at most {MAX_RECORD_BYTES} bytes; {_AGAIN}")


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number")


def _check_header_size(path: Path) -> None:
    if not path.is_file():
        raise ModelError(f"{path.parent} has no {WEIGHTS_FILE}; give a folder written by `grappa export`")
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror}); make it readable") from error
    if size > MAX_HEADER_BYTES:
        raise ModelError(f"{path} is damaged (its header claims {size} bytes); {_AGAIN}")


def _opened(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is damaged ({sentence(error, limit=100)}); {_AGAIN}") from error
