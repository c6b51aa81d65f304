"""The runs of a sweep, which are all checked before anything is written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grappa.core.names import ORACLE
from grappa.pipeline.commands.init import check_backbone, count_train, fitted, former_config, given_images, layered
from grappa.pipeline.config.schema import Config, Images
from grappa.pipeline.config.yaml_file import (
    PRESETS,
    ConfigError,
    Settings,
    parse_assignments,
    read_settings,
    shipped_or_file,
)
from grappa.pipeline.engine.execution import Selection, selected
from grappa.pipeline.engine.sources import list_sources
from grappa.pipeline.graph.models import evaluated_models
from grappa.pipeline.store.artifacts import RUN_FILE, RunFolder
from grappa.pipeline.sweep.spec import Point, SweepFile, nested, points, read_sweep

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class SweepRequest:
    """The arguments of `grappa sweep`; ``config``, ``images`` and ``assignments`` change the base of the file."""

    sweep: str
    out: Path | None = None
    config: str | None = None
    images: Sequence[str] = ()
    assignments: Sequence[str] = ()
    other: Path | None = None


@dataclass(frozen=True)
class SweepRun:
    """A planned run: its folder (which need not exist), its configuration and the listing of its images."""

    name: str
    variant: str
    changes: Mapping[str, Any]
    root: Path
    config: Config
    listing: pd.DataFrame

    @property
    def folder(self) -> RunFolder:
        """The run folder; it exists after the sweep has begun."""
        return RunFolder(self.root)


@dataclass(frozen=True)
class Sweep:
    """A checked sweep; ``other``: a further run whose artifacts are reused."""

    file: SweepFile
    out: Path
    runs: tuple[SweepRun, ...]
    other: RunFolder | None

    @property
    def has_table(self) -> bool:
        """Whether the evaluation is among the stages to run."""
        return any(
            node.stage == "evaluation" for node in selected(self.runs[0].config, Selection(until=self.file.until))
        )


def prepare(request: SweepRequest) -> Sweep:
    """Read and check the file, each configuration, the folders and the images; nothing on disk is changed."""
    file, where = read_sweep(request.sweep)
    base = _base(file, where, request)
    out = request.out or Path("runs") / Path(request.sweep).stem
    _check_folder(out)
    configs = [(point, layered(base, [(f"{where}: {point.name}", nested(point.changes))])[1]) for point in points(file)]
    listings: dict[Images, pd.DataFrame] = {}
    for point, config in configs:
        _check_known(out / point.name, config)
        images = given_images(config)
        listings[images] = listings[images] if images in listings else list_sources(images)
    other = RunFolder.open(request.other) if request.other else None
    runs = [_run(out, point, config, listings[config.images], former_config(other)) for point, config in configs]
    sweep = Sweep(file, out, tuple(runs), other)
    if sweep.has_table:
        _check_models(file.rows, where, (run.config for run in runs))
    return sweep


def _base(file: SweepFile, where: str, request: SweepRequest) -> Settings:
    """Return the settings that all runs share: the preset, overridden by the file's base and by the command line."""
    layers: list[tuple[str, dict[str, dict[str, Any]]]] = []
    name = request.config or file.base.config
    if name:
        place = f"--config {name}" if request.config else f"{where}: base.config {name}"
        layers.append((place, read_settings(shipped_or_file(name, PRESETS, place, "preset"))))
    layers.append((f"{where}: base.set", nested(file.base.changes)))
    assigned = parse_assignments(request.assignments)
    for key in (f"{section}.{field}" for section, fields in assigned.items() for field in fields):
        file.refuse_varied(f"--set {key}", key)
    layers.append(("--set", assigned))
    images = list(request.images or file.base.images)
    if images:
        layers.append(("--images" if request.images else f"{where}: base.images", {"images": {"sources": images}}))
    return layered({}, layers)[0]


def _check_folder(out: Path) -> None:
    if (out / RUN_FILE).exists():
        raise ConfigError(f"{out} is a run folder; give another folder by --out: the runs lie below it")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; give a folder by --out: the runs lie below it")


def _check_known(root: Path, config: Config) -> None:
    """Refuse a run folder that cannot be used, and missing weights."""
    known = RunFolder.open(root, writable=True) if (root / RUN_FILE).exists() else None
    check_backbone(config, known)


def _run(out: Path, point: Point, config: Config, listing: pd.DataFrame, other: Config | None) -> SweepRun:
    before = former_config(RunFolder(out / point.name)) or other
    try:
        chosen = fitted(config, listing, count_train(config, listing), before)
    except ConfigError as error:
        raise ConfigError(f"{point.name}: {error}") from None
    return SweepRun(point.name, point.variant, point.changes, out / point.name, chosen, listing)


def _check_models(patterns: Iterable[str], where: str, configs: Iterable[Config]) -> None:
    models = list(dict.fromkeys(model for config in configs for model in (*evaluated_models(config), ORACLE)))
    for pattern in patterns:
        if not any(fnmatchcase(model, pattern) for model in models):
            raise ConfigError(f"{where}: rows: {pattern!r} is no model of any run; there are {', '.join(models)}")
