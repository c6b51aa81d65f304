"""A node of the graph: one instance of a stage, and the name of the artifact that it makes."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Node:
    """One instance of a stage; ``instance`` is None where the stage has only one.

    A node names its artifact; ``graph.stages`` says what it reads. ValueError where stage or instance have other
    characters than letters, digits, '_' and '-'.
    """

    stage: str
    instance: str | None = None

    def __post_init__(self) -> None:
        for part in (self.stage, self.instance):
            if part is not None and not re.fullmatch(r"[A-Za-z0-9_-]+", part):
                raise ValueError(f"Artifact name {part!r} may hold letters, digits, '_' and '-' only.")

    @property
    def name(self) -> str:
        """The artifact's name, such as ``features`` or ``clusters/k00256``."""
        return self.stage if self.instance is None else f"{self.stage}/{self.instance}"

    def __str__(self) -> str:
        return self.name

    @classmethod
    def parse(cls, name: str) -> Node:
        """Return the node of an artifact's name."""
        stage, _, instance = name.partition("/")
        return cls(stage, instance or None)
