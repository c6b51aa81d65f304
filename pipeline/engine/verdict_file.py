"""What a run has told without labels: whether adaptation helped, and which sets are fused.

Report, command line and ``Run`` read both here.

Nothing heavy is imported: `grappa run` says the verdict at its end.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from grappa.metrics.judged import Judged, Word
from grappa.pipeline.config.schema import Config, num_clusters_of
from grappa.pipeline.config.yaml_file import validation_sentence
from grappa.pipeline.graph.models import deployed_model
from grappa.pipeline.graph.node import Node
from grappa.pipeline.store.artifacts import RunFolder, check_same_origin, published, quoted, readable_manifest

VERDICT = Node("verdict")
VERDICT_FILE = "verdict.json"
SELECTION = Node("selection")
SELECTION_FILE = "selection.json"


@dataclass(frozen=True)
class Verdict:
    """Whether adaptation helped, told without labels.

    ``evidence``: two sentences for people. ``choice``: the model to deploy. ``images``, ``num_images``: the
    images that the indicator was computed on, of which split and how many. ``models``: the models that were compared.
    """

    verdict: Word
    evidence: str
    choice: str
    images: Literal["test", "train"]
    num_images: int
    models: tuple[Judged, ...]

    @property
    def sentence(self) -> str:
        """The verdict and its evidence, in one line."""
        return " ".join(f"{self.verdict}. {self.evidence}".split())


def chosen_model(run: RunFolder) -> str:
    """Return the model that the verdict chose; ValueError, with the command, where there is no verdict."""
    published(run, VERDICT, VERDICT_FILE)
    found = read_verdict(run)
    assert found is not None, "it was published"
    return found.choice


def made_of(run: RunFolder, name: str) -> str:
    """Return the model that the artifact ``model`` or ``index`` was made of, whatever the configuration says now.

    It is the one that the artifact's inputs name, or the choice of the verdict.
    """
    published(run, name)
    manifest = readable_manifest(run, name)
    assert manifest is not None, f"{name} is published"
    inputs = manifest.fingerprint["inputs"]
    if VERDICT.name in inputs:
        return chosen_model(run)
    final = (each.removeprefix("heads/") for each in inputs if each.startswith("heads/"))
    return next(final, "zero_shot")


def deployed_in(run: RunFolder, config: Config) -> str:
    """Return the model that is deployed, indexed and searched: the given one, or the choice of the verdict."""
    return deployed_model(config, chosen_model(run) if config.model.source == "auto" else None)


def read_verdict(run: RunFolder) -> Verdict | None:
    """Return the verdict of a run, or None where it has none; ValueError, with the cure, for a file of another form."""
    if readable_manifest(run, VERDICT.name) is None:
        return None
    file = published(run, VERDICT, VERDICT_FILE) / VERDICT_FILE
    try:
        content: Any = json.loads(file.read_bytes())
        return TypeAdapter(Verdict).validate_python(content)
    except FileNotFoundError:
        problem = "the file is missing"
    except ValidationError as error:
        problem = validation_sentence(error, str).removeprefix(": ")
    except ValueError as error:
        problem = f"not JSON ({error})"
    raise ValueError(f"{file}: {problem}; make it again by `grappa run {quoted(run.root)} --stage verdict --force`")


def kept_names(selection: Path) -> tuple[str, ...]:
    """Return the names of the sets that are fused, in the folder of an artifact ``selection``."""
    found = json.loads((selection / SELECTION_FILE).read_text())
    return tuple(each["name"] for each in found["sets"] if each["kept"])


def fused_granularities(run: RunFolder, config: Config, pairs: str = "neighbors") -> tuple[str, ...]:
    """Return the granularities over which the attention of a run goes: all, or those that its selection kept.

    The attention's own inputs tell which, whatever the configuration says now; ValueError, with the command that helps,
    where the selection was made again since.
    """
    node = Node("attention", pairs)
    attention = readable_manifest(run, node)
    if attention is None:
        return config.granularities
    inputs = attention.fingerprint["inputs"]
    if SELECTION.name in inputs:
        check_same_origin(run, SELECTION.name, node.name)
        return kept_names(published(run, SELECTION, SELECTION_FILE))
    names = (name.removeprefix("adaptors/") for name in inputs if name.startswith("adaptors/"))
    return tuple(sorted(names, key=num_clusters_of))
