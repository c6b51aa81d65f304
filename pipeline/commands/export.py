"""`grappa export`: the model of a run in a folder of its own, with its model card, in the format that is asked for."""

from __future__ import annotations

import shutil
from pathlib import Path

from grappa.pipeline.commands.card import Facts, read_facts, write_card
from grappa.pipeline.store.artifacts import RunFolder, published
from grappa.pipeline.store.storage import new_folder, refuse_existing

FILES = ("model.json", "weights.safetensors")


def export(run: Path, folder: Path) -> str:
    """Write the model of a run into the new folder ``folder``, whole or not at all; return the result in a sentence.

    The folder holds model.json, weights.safetensors and README.md, the model card.
    """
    refuse_existing(folder)
    source = RunFolder.open(run)
    model, facts = published(source, "model"), read_facts(source)
    with new_folder(folder) as draft:
        _copy(model, draft, facts)
    remark = f" ({facts.unknown})" if facts.unknown else ""
    names = f"{', '.join(FILES)} and README.md"
    return f"wrote {names}{remark} to {folder}; open them with grappa.load_model({str(folder)!r})"


def _copy(model: Path, draft: Path, facts: Facts) -> None:
    from grappa.model_folder import seal

    for name in FILES:
        shutil.copyfile(model / name, draft / name)
    record = seal(draft, facts.provenance())
    write_card(draft, facts, record)
