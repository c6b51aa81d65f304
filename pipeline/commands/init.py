"""`grappa init`: make or change a run folder, list the images, resolve and write the configuration."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grappa.backbone.files.hub import is_hub_name as is_hub_weights
from grappa.backbone.files.places import absolute, files_of, hint
from grappa.backbone.unusable import BackboneError
from grappa.core.home import expanded
from grappa.pipeline.commands.listed import say_images, say_lone_classes
from grappa.pipeline.commands.model_input import check_input, same_backbone, say_input, settle_cache, settle_cache_size
from grappa.pipeline.config.schema import Config, Images, automatic_num_clusters
from grappa.pipeline.config.yaml_file import (
    FORMER,
    ConfigError,
    Settings,
    dump_config,
    flow,
    load_config,
    merged,
    parse_assignments,
    parse_settings,
    preset_path,
    read_settings,
)
from grappa.pipeline.engine.externals import detector_digests, given_digests, hub_problems, is_hub_name, lost_weights
from grappa.pipeline.engine.fingerprints import read_manifest
from grappa.pipeline.engine.glance import cause_lines
from grappa.pipeline.engine.packages import missing_packages
from grappa.pipeline.engine.reuse import reuse_artifacts
from grappa.pipeline.engine.sources import NO_BOXES, list_sources, publish_listing, published_listing
from grappa.pipeline.engine.status import read_config, states
from grappa.pipeline.graph.models import SUPERVISED, adaptor_sets
from grappa.pipeline.store.artifacts import RUN_FILE, RunFolder, quoted
from grappa.pipeline.store.storage import atomic_write_text

if TYPE_CHECKING:
    import pandas as pd

Say = Callable[[str], None]
MOST_CHANGES = 12  # changed settings that are named in a line

FEW_IMAGES = 300
MOST_EXACT = 1_000_000  # train images whose neighbours are sought exactly under `auto`


@dataclass(frozen=True)
class Request:
    """The arguments of `grappa init`; an existing run keeps its value where an argument is empty."""

    images: Sequence[str] = ()
    config: str | None = None
    assignments: Sequence[str] = ()
    other: Path | None = None
    domains: Sequence[str] = ()
    layout: str | None = None


def initialize(root: Path, request: Request, *, say: Say) -> Config:
    """Make or change the run folder ``root``; ``say`` gets lines about the images, the changes and stale artifacts.

    The configuration of an existing run begins with its ``config.yaml``; that of a new run begins with the defaults, or
    with the configuration of ``request.other`` if no preset is named. Everything is checked before anything is written.
    """
    known = RunFolder.open(root, writable=True) if (root / RUN_FILE).exists() else None
    other = RunFolder.open(request.other) if request.other else None
    before = former_config(known)
    config = asked = _requested(known, request)
    check_backbone(config, known)
    listing = list_sources(given_images(config))
    num_train = count_train(config, listing)
    config = fitted(config, listing, num_train, before or former_config(other))
    run, former = write_run(root, config, listing)
    say_images(listing, former, say)
    if SUPERVISED in adaptor_sets(config):
        say_lone_classes(listing, say)
    _say_few(num_train, say)
    _say_bound(asked, num_train, say)
    for sentence in dict.fromkeys(missing_packages(config).values()):
        say(f"warning: {sentence}")
    if before and request.config:
        _say_changes(before, config, say)
    if other:
        reuse_artifacts(other, run, config, say=say)
    say_input(config, len(listing), say)
    _say_states(run, config, say)
    return config


def _say_few(num_train: int, say: Say) -> None:
    """Warn where there are so few images to learn from that a gain is not likely."""
    if num_train < FEW_IMAGES:
        what = f"{num_train} different train images are few (below {FEW_IMAGES})"
        say(f"warning: {what}; the verdict at the end of the run tells whether adaptation helped")


def _say_bound(asked: Config, num_train: int, say: Say) -> None:
    """Say that automatic granularities would be finer without their bound."""
    how, most = asked.clusters.num_clusters, asked.clusters.max_clusters
    if most is None or not isinstance(how, str):
        return
    finest, free = automatic_num_clusters(num_train, how, most)[-1], automatic_num_clusters(num_train, how)[-1]
    if finest < free:
        say(
            f"the finest granularity has {finest:,} clusters, without the bound clusters.max_clusters={most} it would "
            f"have {free:,}; for another bound: --set clusters.num_clusters={how} --set clusters.max_clusters=NUMBER"
        )


def write_run(root: Path, config: Config, listing: pd.DataFrame) -> tuple[RunFolder, pd.DataFrame | None]:
    """Make or open a run folder, publish the listing, write the configuration; return run and former listing."""
    run = RunFolder.create(root)
    former = published_listing(run)
    publish_listing(run, listing, config.images, former)
    atomic_write_text(run.config_path, dump_config(config))
    return run, former


def former_config(run: RunFolder | None) -> Config | None:
    """Return the configuration of a run; None where there is none."""
    return load_config(run.config_path) if run and run.config_path.exists() else None


def fitted(config: Config, listing: pd.DataFrame, num_train: int, before: Config | None) -> Config:
    """Return the configuration with layout, granularities, the pixel cache and the neighbours' engine settled.

    num_train: the different train images, as :func:`count_train` counts them. before: the configuration of the run, or
    of one whose artifacts are reused. ConfigError where the images do not suffice.
    """
    config = settle_cache(settle_cache_size(_settle_layout(config, listing), before), len(listing), before)
    config = settle_engine(resolve_num_clusters(config, num_train), num_train)
    _check_labels(config, listing)
    _check_boxes(config, listing)
    return config


def _settle_layout(config: Config, listing: pd.DataFrame) -> Config:
    """Replace ``images.layout: auto`` by what was recognised, unless folders differ: new files change no reading."""
    found = set(listing.attrs["layouts"].values())
    if config.images.layout != "auto" or len(found) != 1:
        return config
    images = config.images.model_copy(update={"layout": found.pop()})
    return config.model_copy(update={"images": images})


def settle_engine(config: Config, num_train: int) -> Config:
    """Replace ``neighbors.engine: auto``: exact as long as that is about as fast, else ivf."""
    if config.neighbors.engine != "auto":
        return config
    engine = "exact" if num_train <= MOST_EXACT else "ivf"
    neighbors = config.neighbors.model_copy(update={"engine": engine})
    return config.model_copy(update={"neighbors": neighbors})


def resolve_num_clusters(config: Config, num_train: int) -> Config:
    """Replace ``clusters.num_clusters: auto`` by numbers; ConfigError when a number is above half the train images."""
    values = config.clusters.num_clusters
    if num_train < 4:
        raise ConfigError(f"found {num_train} train images, expected at least 4; give more by --images")
    if isinstance(values, str):
        values = automatic_num_clusters(num_train, values, config.clusters.max_clusters)
    if max(values) > num_train // 2:
        raise ConfigError(
            f"clusters.num_clusters: {max(values)} clusters are more than half of the {num_train} train images; "
            f"give at most {num_train // 2}, or auto"
        )
    clusters = config.clusters.model_copy(update={"num_clusters": values})
    return config.model_copy(update={"clusters": clusters})


def _requested(known: RunFolder | None, request: Request) -> Config:
    """Return the configuration: the first one, overridden by the preset, by the assignments and by the images given.

    A preset replaces all settings of a run but those that say which images it has.
    """
    layers = [(str(known.config_path) if known else "the defaults", _base(known, request))]
    if request.config:
        preset = read_settings(preset_path(request.config))
        layers.append((f"--config {request.config}", merged(_same_weights(known, preset), preset)))
    if request.assignments:
        layers.append(("--set", parse_assignments(request.assignments)))
    for option, field, value in (
        ("--images", "sources", list(request.images)),
        ("--domain", "domains", list(request.domains)),
        ("--layout", "layout", request.layout),
    ):
        if value:
            layers.append((option, {"images": {field: value}}))
    return layered({}, layers)[1]


def layered(settings: Settings, layers: Iterable[tuple[str, Settings]]) -> tuple[Settings, Config]:
    """Put layers (origin, settings) over settings and make paths absolute; return settings and checked configuration.

    The result is checked after each layer, so that an error names the origin of the wrong value.
    """
    config = parse_settings(settings, "the defaults")
    for where, layer in layers:
        settings = merged(settings, _absolute(layer))
        config = parse_settings(settings, where)
    return settings, config


def _base(known: RunFolder | None, request: Request) -> Settings:
    if known and known.config_path.exists():
        settings = merged(merged(FORMER, {"images": {"layout": "domain/class"}}), read_settings(known.config_path))
        return _images_only(settings) if request.config else settings
    if request.other is None:
        return {}
    other = read_config(RunFolder.open(request.other)).model_dump(mode="json")
    return _images_only(other) if request.config else other


def _images_only(settings: Settings) -> Settings:
    """Return the settings that say which images a run has."""
    names = (*Images().listed_by, "max_rejected")
    return {"images": {name: value for name, value in settings["images"].items() if name in names}}


def _same_weights(known: RunFolder | None, preset: Settings) -> Settings:
    """Return the weights' file of a run where a preset has the same architecture: the file is this machine's."""
    if known is None or not known.config_path.exists():
        return {}
    before, after = load_config(known.config_path).backbone, parse_settings(preset, "the preset").backbone
    same = (before.name, before.options) == (after.name, after.options)
    return {"backbone": {"weights": before.weights}} if same else {}


def _absolute(settings: Settings) -> Settings:
    """Return the settings with absolute paths; users may give paths relative to the working folder."""
    changed: Settings = {}
    weights: Any = settings.get("backbone", {}).get("weights")
    if isinstance(weights, str):
        changed["backbone"] = {"weights": absolute(weights)}
    model: Any = settings.get("objects", {}).get("model")
    if isinstance(model, str) and not is_hub_name(model):
        changed["objects"] = {"model": os.path.abspath(expanded(model))}
    given: Any = settings.get("clusters", {}).get("embeddings")
    if isinstance(given, str):
        changed["clusters"] = {"embeddings": os.path.abspath(expanded(given))}
    sources: Any = settings.get("images", {}).get("sources")
    if isinstance(sources, list) and all(isinstance(source, str) for source in sources):
        changed["images"] = {"sources": [_absolute_source(source) for source in sources]}
    domains: Any = settings.get("images", {}).get("domains")
    if isinstance(domains, list) and all(isinstance(text, str) for text in domains):
        changed.setdefault("images", {})["domains"] = [_absolute_domain(text) for text in domains]
    return merged(settings, changed)


def _absolute_domain(text: str) -> str:
    name, _, folder = text.partition("=")
    return f"{name}={_absolute_source(folder)}" if folder else text


def _absolute_source(source: str) -> str:
    """Return a folder or file as an absolute path; a URL stays as it is, and an empty name, which is refused later."""
    return source if "://" in source or not source else os.path.abspath(expanded(source))


def check_backbone(config: Config, known: RunFolder | None) -> None:
    """Refuse an unsuitable backbone, and missing weights, detector or embeddings that the run has not read already."""
    detector_digests(config, _known(known, "objects", "detector"))
    given_digests(config, known, _known(known, "given_features", "embeddings"))
    weights = config.backbone.weights
    former = former_config(known)
    before = former.backbone if former else None
    if before is None or not same_backbone(before, config.backbone):
        check_input(config.backbone)
    if weights is not None and not is_hub_weights(weights) and (before is None or before.weights != weights):
        _check_weights(weights)


def _check_weights(path: str) -> None:
    """Refuse weights that are neither a file nor a folder that holds some."""
    if not os.path.exists(path):
        raise ConfigError(f"backbone.weights: no such file {path}; {hint(os.path.relpath(path))}")
    try:
        files_of(path)
    except BackboneError as error:
        raise ConfigError(f"backbone.weights: {error}") from error


def _known(run: RunFolder | None, artifact: str, note: str) -> dict[str, Any] | None:
    """Return a note of an artifact's provenance; None where there is none."""
    manifest = read_manifest(run, artifact) if run else None
    return manifest.provenance.get(note) if manifest else None


_ASKED = "evaluation.extra_rows asks for `supervised`"


def _check_labels(config: Config, listing: pd.DataFrame) -> None:
    """Refuse the model ``supervised`` where no train image has a label, before the other models are trained."""
    labeled = listing["label"].notna() & (listing["split"] != "test")
    if SUPERVISED in adaptor_sets(config) and not labeled.any():
        asking = "adaptors.supervision is labels" if config.adaptors.supervision == "labels" else _ASKED
        raise ConfigError(
            f"{asking}, but no train image has a label; give labels "
            "(DOMAIN/CLASS/file, or a table with the column `label`), or leave it out"
        )


def _check_boxes(config: Config, listing: pd.DataFrame) -> None:
    if config.objects.provider == "columns" and listing["box_x0"].isna().all():
        raise ConfigError(NO_BOXES)


def given_images(config: Config) -> Images:
    """Return the section that names the images; ConfigError when it names none."""
    if not config.images.sources and not config.images.domains:
        raise ConfigError("no images given; name a folder, a table (.csv, .parquet) or a tar by --images")
    return config.images


def count_train(config: Config, listing: pd.DataFrame) -> int:
    """Count the different images that models learn from: all but the test images; copies of one file count once.

    Where the numbers of clusters are given, a lower bound may be returned that suffices for them, and is not few.
    ConfigError where copies are the reason that the images do not suffice for clusters.
    """
    from grappa.images.copies import count_distinct_files
    from grappa.images.table import MISSING

    values = config.clusters.num_clusters
    learned = ((listing["split"] != "test") & (listing["size"] != MISSING)).to_numpy()
    needed = None if isinstance(values, str) else 2 * max(values)
    enough = None if needed is None else max(needed, FEW_IMAGES)
    number = count_distinct_files(listing, listing.attrs["roots"], among=learned, enough=enough)
    if number < (needed or 4) <= learned.sum():
        raise ConfigError(
            f"only {number} of {learned.sum()} train images differ, the others are copies; give at least "
            f"{needed or 4} different ones" + ("" if needed is None else ", or fewer clusters (clusters.num_clusters)")
        )
    return number


def _say_changes(before: Config, after: Config, say: Say) -> None:
    """Say which settings a preset changed."""
    old, new = before.model_dump(mode="json"), after.model_dump(mode="json")
    names = [(section, field) for section, fields in new.items() for field in fields]
    changed = [
        f"{section}.{field} {flow(old[section][field])} -> {flow(new[section][field])}"
        for section, field in names
        if old[section][field] != new[section][field]
    ]
    more = [f"and {len(changed) - MOST_CHANGES} more"] if len(changed) > MOST_CHANGES else []
    if changed:
        say(f"changed by the preset: {', '.join(changed[:MOST_CHANGES] + more)}")


def _say_states(run: RunFolder, config: Config, say: Say) -> None:
    found = states(run, config)
    for line in cause_lines(found):
        say(line)
    made = {each.node.stage for each in found if each.state.kind == "fresh"}
    sentences = [sentence for stage, sentence in hub_problems(config).items() if stage not in made]
    for sentence in filter(None, [*sentences, lost_weights(config, made="backbone" in made)]):
        say(f"warning: {sentence}")
    kinds = [each.state.kind for each in found]
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    next_step = f"{len(found)} artifacts: {counts}; next: grappa run {quoted(run.root)}"
    say(next_step if set(kinds) != {"fresh"} else "all is fresh")
