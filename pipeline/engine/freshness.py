"""The state of one artifact: whether it has the fingerprint that configuration and inputs ask for, and why not."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from grappa.pipeline.graph.node import Node
from grappa.pipeline.store.artifacts import Artifact, CorruptManifest, Fingerprint

Kind = Literal["missing", "fresh", "stale", "corrupt"]
_ABSENT = object()


@dataclass(frozen=True)
class State:
    """An artifact's state; `reasons` are lines for people, empty unless the artifact is stale or corrupt.

    `causes` are those of the reasons that lie in the artifact itself. Where a stale artifact has none, it follows from
    an artifact that it reads.
    """

    kind: Kind
    reasons: list[str]
    causes: tuple[str, ...] = field(default=(), compare=False)

    @property
    def follows(self) -> bool:
        """Whether the artifact is stale only because one that it reads is not fresh."""
        return self.kind == "stale" and not self.causes

    def __str__(self) -> str:
        return f"{self.kind}: {'; '.join(self.reasons)}" if self.reasons else self.kind


@dataclass(frozen=True)
class Problem:
    """An artifact that a node reads and that is not fresh.

    ``node`` makes the artifact. ``text`` is a sentence for people with the command that solves the problem; it is empty
    where running the node's stage again solves it.
    """

    node: Node
    kind: Kind
    text: str = ""

    def __str__(self) -> str:
        return self.text or f"upstream {self.node} is {self.kind}"


def compare_fingerprints(old: Fingerprint, new: Fingerprint) -> list[str]:
    """Return a line for each difference: stage version, then config, then inputs, by name; empty when equal."""
    lines = [
        f"{label}: {_text(old[field])} -> {_text(new[field])}"
        for field, label in (("stage", "stage"), ("instance", "instance"), ("version", "stage version"))
        if old[field] != new[field]
    ]
    return lines + _config_lines(old["config"], new["config"]) + _input_lines(old["inputs"], new["inputs"])


def _config_lines(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    values = {key: (old.get(key, _ABSENT), new.get(key, _ABSENT)) for key in sorted({*old, *new})}
    return [f"config {key}: {_text(a)} -> {_text(b)}" for key, (a, b) in values.items() if a != b]


def _input_lines(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    return [
        f"input {name}: {'removed' if name not in new else 'added' if name not in old else 'content changed'}"
        for name in sorted({*old, *new})
        if old.get(name, _ABSENT) != new.get(name, _ABSENT)
    ]


def _text(value: object) -> str:
    if value is _ABSENT:
        return "(not there)"
    return value if isinstance(value, str) else json.dumps(value)


def artifact_state(
    artifact: Artifact, expected: Fingerprint | None, upstream_problems: Sequence[str] = (), verify: bool = False
) -> State:
    """Return the state of one artifact; nothing on disk is changed.

    `expected` is None where an input is missing, so that the fingerprint cannot be computed; `upstream_problems` (such
    as `upstream clusters/k01024 is stale`) must then say why. With `verify` every byte is hashed again.
    """
    assert expected is not None or upstream_problems, "without a fingerprint an upstream problem must be named"
    try:
        manifest = artifact.manifest()
    except CorruptManifest as error:
        return State("corrupt", [str(error)])
    if manifest is None:
        return State("missing", [])
    problems = artifact.check(verify, manifest=manifest)
    if problems:
        return State("corrupt", problems)
    reasons = [] if expected is None else compare_fingerprints(manifest.fingerprint, expected)
    reasons += [line for line in upstream_problems if line not in reasons]
    return State("stale" if reasons else "fresh", reasons)
