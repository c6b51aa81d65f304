"""The file of a sweep, read, checked and turned into points: one base, named changes to it, a grid and seeds.

::

    base:  {config: small, images: [photos], set: {fusion.num_epochs: 3}}      # every key may be left out
    runs:                                                                      # names and changed settings
      base: {}
      swapped: {fusion.attention_loss: swapped}
    grid:  {adaptors.bottleneck_dim: [16, 48]}                                 # every run with every combination
    seeds: {clusters.seed: [0, 1, 2], fusion.seed: [0, 1, 2]}                  # the n-th values belong together
    until: evaluation                                                          # the last stage
    rows:  [zero_shot, fused, "k*"]                                            # models of the result table to keep

Paths are relative to the working folder, as for `grappa init`.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import Field, ValidationError, field_validator, model_validator

from grappa.core.printing import shown
from grappa.pipeline.config.section import Section
from grappa.pipeline.config.yaml_file import (
    PRESETS,
    ConfigError,
    Settings,
    flow,
    read_yaml,
    shipped_or_file,
    validation_sentence,
)
from grappa.pipeline.graph.stages import find_stage

SWEEPS = PRESETS / "sweeps"
NAME = r"[A-Za-z0-9][A-Za-z0-9_.+-]*"
MAX_RUNS = 1000
RESERVED = ("sweep.csv", "sweep.parquet")

Changes = dict[str, Any]


class Base(Section):
    config: str | None = None
    images: tuple[str, ...] = ()
    changes: Changes = Field({}, alias="set")


class SweepFile(Section):
    """The content of the file; keys such as ``fusion.seed`` are those of the configuration."""

    base: Base = Base()
    runs: dict[str, Changes | None] = Field({})
    grid: dict[str, tuple[Any, ...]] = Field({})
    seeds: dict[str, tuple[Any, ...]] = Field({})
    until: str = "evaluation"
    rows: tuple[str, ...] = ("*",)

    @field_validator("runs")
    @classmethod
    def _are_names_of_folders(cls, value: dict[str, Changes | None]) -> dict[str, Changes | None]:
        for name in value:
            if not re.fullmatch(NAME, name) or name in RESERVED:
                raise ValueError(
                    f"found the name {name!r}; it names a folder: give letters, digits, '_', '.', '+', '-'"
                )
        return value

    @field_validator("until")
    @classmethod
    def _is_a_stage(cls, value: str) -> str:
        return find_stage(value).name

    @field_validator("grid", "seeds")
    @classmethod
    def _have_values(cls, value: dict[str, tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
        for key, values in value.items():
            texts = [flow(each) for each in values]
            if not texts or len(set(texts)) != len(texts):
                raise ValueError(f"found {list(values)} for {key}; give one or more different values")
        return value

    @model_validator(mode="after")
    def _fit_together(self) -> SweepFile:
        lengths = {key: len(values) for key, values in self.seeds.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"seeds: found {lengths} values, expected as many for each key: the n-th go together")
        changed = {"base.set": self.base.changes, "grid": self.grid, "seeds": self.seeds}
        changed |= {f"runs.{name}": changes or {} for name, changes in self.runs.items()}
        for name, key in ((name, key) for name, changes in changed.items() for key in changes):
            if not re.fullmatch(r"\w+\.\w+", key):
                raise ValueError(f"{name}: found the key {key!r}, expected section.key such as fusion.seed")
            self.refuse_varied(name, key)
        return self

    def refuse_varied(self, where: str, key: str) -> None:
        """Raise ConfigError where ``where`` sets a key that the grid or the seeds set for every run."""
        for name, varied in (("grid", self.grid), ("seeds", self.seeds)):
            if key in varied and where != name:
                raise ConfigError(f"{where}: {key} is set by the {name} too; drop one of them")


@dataclass(frozen=True)
class Point:
    """One run of a sweep: the name of its folder, the name without the seed (``variant``), and its changes."""

    name: str
    variant: str
    changes: Mapping[str, Any]


def read_sweep(name_or_file: str) -> tuple[SweepFile, str]:
    """Return a checked sweep of the package or from a file, and its path, which errors name."""
    path = shipped_or_file(name_or_file, SWEEPS, f"sweep {name_or_file}", "sweep")
    found = read_yaml(path)
    if not isinstance(found, dict | None):
        raise ConfigError(f"{path}: found {shown(found)}, expected keys such as `runs:`")
    try:
        return SweepFile.model_validate(found or {}), str(path)
    except ValidationError as error:
        raise ConfigError(f"{path}: {validation_sentence(error, _unknown)}") from None


def points(sweep: SweepFile) -> tuple[Point, ...]:
    """Return the runs: all with the first seed, in the order of the file, then all with the second seed, ...

    Raises ConfigError when two runs have the same name or there is nothing to sweep.
    """
    if not (sweep.runs or sweep.grid or sweep.seeds):
        raise ConfigError("nothing to sweep: give runs, a grid or seeds")
    number = math.prod(map(len, (sweep.runs or [None], *sweep.grid.values(), _seeds(sweep))))
    if number > MAX_RUNS:
        raise ConfigError(f"the sweep has {number} runs; give at most {MAX_RUNS}")
    runs = sweep.runs or ({"": None} if sweep.grid else {"base": None})
    found = []
    for seed in _seeds(sweep):
        for (name, changes), cell in itertools.product(runs.items(), _cells(sweep.grid)):
            variant = "-".join(part for part in (name, *_parts(cell)) if part)
            full = f"{variant}-seed={_seed_text(seed)}" if seed else variant
            found.append(Point(full, variant, {**(changes or {}), **cell, **seed}))
    names = [point.name for point in found]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"two runs would both be called {name}; name them under `runs:` instead")
    return tuple(found)


def nested(changes: Mapping[str, Any]) -> Settings:
    """Return ``{"fusion.seed": 1}`` as sections with fields."""
    settings: Settings = {}
    for key, value in changes.items():
        section, _, field = key.partition(".")
        settings.setdefault(section, {})[field] = value
    return settings


def varied(sweep: SweepFile) -> tuple[str, ...]:
    """Return all names ``section.key`` that a run changes; they are columns of the table."""
    keys = [*(key for changes in sweep.runs.values() for key in changes or {}), *sweep.grid, *sweep.seeds]
    return tuple(dict.fromkeys(keys))


def _seeds(sweep: SweepFile) -> list[Changes]:
    columns = sweep.seeds.values()
    return [dict(zip(sweep.seeds, values, strict=True)) for values in zip(*columns, strict=True)] or [{}]


def _cells(grid: Mapping[str, Sequence[Any]]) -> list[Changes]:
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def _parts(cell: Changes) -> list[str]:
    """Return a text ``bottleneck_dim=16`` for each value, with the section where two keys have the same field."""
    fields = [key.partition(".")[2] for key in cell]
    names = [key if fields.count(field) > 1 else field for key, field in zip(cell, fields, strict=True)]
    return [f"{name}={_value_text(value)}" for name, value in zip(names, cell.values(), strict=True)]


def _seed_text(seed: Changes) -> str:
    texts = [_value_text(value) for value in seed.values()]
    return texts[0] if len(set(texts)) == 1 else "+".join(texts)


def _value_text(value: Any) -> str:
    """Return a value as part of the name of a folder: ``16``, ``20+40``, ``auto_7``."""
    text = "+".join(map(_value_text, value)) if isinstance(value, list) else flow(value)
    return re.sub(r"[^A-Za-z0-9_.+-]", "_", text)


def _unknown(name: str) -> str:
    keys = Base.model_fields if name.startswith("base.") else SweepFile.model_fields
    return f"unknown key {name}: expected one of {', '.join(field.alias or key for key, field in keys.items())}"
