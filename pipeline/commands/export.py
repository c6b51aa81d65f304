"""`grappa export`: the model of a run in a folder of its own, with its model card, in the format that is asked for."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grappa.pipeline.commands.card import read_facts, write_card
from grappa.pipeline.commands.search import load_run_model
from grappa.pipeline.store.artifacts import RunFolder, published, readable_manifest
from grappa.pipeline.store.storage import file_digest, new_folder, refuse_existing

if TYPE_CHECKING:
    from grappa.model import GrappaModel
    from grappa.pipeline.commands.card import Facts

FILES = ("model.json", "weights.safetensors")
FORMATS = ("safetensors", "onnx")
SECONDS, BATCH = 1.0, 16  # how long a pass is repeated for its time; the images of a larger batch


def export(run: Path, folder: Path, *, format: str = "safetensors", half: bool = False) -> str:
    """Write the model of a run into the new folder ``folder``, whole or not at all; return the result in a sentence.

    The folder holds the model card, README.md, and model.json and weights.safetensors; or, as ONNX, model.onnx and
    preprocessing.json. half: numbers of 16 bits, of ONNX only.
    """
    _check(format, half)
    refuse_existing(folder)
    source = RunFolder.open(run)
    published(source, "model")
    facts = read_facts(source)
    with new_folder(folder) as draft:
        write = _write_safetensors if format == "safetensors" else _write_onnx
        how, measured = write(source, draft, facts, half)
        names = ", ".join(sorted(path.name for path in draft.iterdir()))
        size = sum(path.stat().st_size for path in draft.iterdir()) / 1e6
    remark = f" ({facts.unknown})" if facts.unknown else ""
    return f"wrote {names}{remark} to {folder}: {size:.1f} MB, {measured}; {how.format(folder=str(folder))}"


def push(folder: Path, name: str, *, private: bool = False) -> str:
    """Put an exported folder on the Hugging Face hub; return in a sentence where it is."""
    from grappa.deploy.hub_model import push as send

    return send(folder, name, private=private)


def _check(format: str, half: bool) -> None:
    if format == "torchscript":
        raise ValueError(
            "the format torchscript is not written: torch has given it up for torch.export, which takes "
            "grappa.deploy.static.static_form(model); choose --format safetensors or onnx"
        )
    if format not in FORMATS:
        raise ValueError(f"the format is {format!r}; expected {' or '.join(FORMATS)}")
    if half and format != "onnx":
        raise ValueError("--half is for --format onnx; of safetensors call half() of the model that load_model returns")


def _write_safetensors(run: RunFolder, draft: Path, facts: Facts, half: bool) -> tuple[str, str]:
    from grappa.model_folder import seal

    home = published(run, "model")
    for name in FILES:
        shutil.copyfile(home / name, draft / name)
    record = seal(draft, facts.provenance())
    write_card(draft, facts, record, "weights.safetensors", record.weights_sha256)
    return "open them with grappa.load_model({folder!r})", _times({"torch": load_run_model(run.root)})


def _write_onnx(run: RunFolder, draft: Path, facts: Facts, half: bool) -> tuple[str, str]:
    from grappa.deploy import onnx_file, onnx_model
    from grappa.model_folder import read_record

    model, record, manifest = (
        load_run_model(run.root),
        read_record(published(run, "model")),
        readable_manifest(run, "model"),
    )
    assert manifest is not None, "the model is published"
    origin = onnx_model.model_digests(manifest.outputs)
    agreement = onnx_file.write_onnx(model, draft, half=half, notes=facts.provenance(), made_of=origin)
    write_card(draft, facts, record, onnx_model.FILE, file_digest(draft / onnx_model.FILE)[1])
    opened = onnx_model.session(draft / onnx_model.FILE)
    runners = {"ONNX Runtime": lambda images: onnx_file.run(opened, images), "torch": model}
    return f"it {agreement}; open it with ONNX Runtime, images as preprocessing.json says", _times(runners, model)


def _times(runners: dict[str, Any], model: GrappaModel | None = None) -> str:
    """Return how long an image takes on this CPU, alone and in a batch."""
    import torch

    side = (model or next(iter(runners.values()))).spec.image_size
    parts = []
    with torch.inference_mode():
        for name, run in runners.items():
            alone, together = (_milliseconds(run, torch.randn(number, 3, side, side)) for number in (1, BATCH))
            parts.append(f"{name} {alone:.1f} ms an image alone, {together / BATCH:.1f} in a batch of {BATCH}")
    return f"on {os.cpu_count()} CPU cores {'; '.join(parts)}"


def _milliseconds(run: Callable[[Any], Any], images: Any) -> float:
    """Return the time of the fastest of several passes."""
    run(images)
    times: list[float] = []
    while len(times) < 20 and (not times or sum(times) < SECONDS):
        began = time.perf_counter()
        run(images)
        times.append(time.perf_counter() - began)
    return min(times) * 1e3
