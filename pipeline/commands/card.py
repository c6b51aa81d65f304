"""The model card of an exported model: README.md with the front matter that the Hugging Face hub reads.

Only what the run knows is said: the base model and its licence as timm states it, the domains, numbers with their
intervals, the verdict, settings, commit. No path of the machine is in it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grappa import __version__
from grappa.core.names import MEAN
from grappa.core.printing import printable, sentence
from grappa.images.paths import bare
from grappa.images.splits import train_rows
from grappa.pipeline.commands.run import caption
from grappa.pipeline.config.schema import Config
from grappa.pipeline.config.yaml_file import dump_config
from grappa.pipeline.engine.status import read_config
from grappa.pipeline.engine.verdict_file import Verdict, made_of, read_verdict
from grappa.pipeline.graph.models import evaluated_models
from grappa.pipeline.store.artifacts import (
    DamagedError,
    RunFolder,
    check_same_origin,
    published,
    readable_manifest,
    repair_command,
)

if TYPE_CHECKING:
    import pandas as pd

    from grappa.model_folder import ModelRecord

CARD = "README.md"
METRICS, PER_QUERY = "metrics.csv", "per_query.parquet"
# The hub's identifiers of licences among those that timm states; any other one is "other", with its name.
_OF_THE_HUB = ("apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0", "apple-ascl", "apple-amlr", "gemma")
_TAGS = ["image-retrieval", "image-feature-extraction", "embeddings", "adapters", "domain-adaptation", "timm"]


@dataclass(frozen=True)
class BaseModel:
    """The pretrained model that was adapted. repository: its name on the hub, "": unknown. licence: as timm states it,
    "": unknown. weights: where they came from, in words."""

    name: str
    repository: str
    licence: str
    weights: str


@dataclass(frozen=True)
class Facts:
    """What a run knows of its model.

    ``unknown`` says in words what it should know and does not, and how to mend that; it may name the run's folder,
    which is for the user and not for the card. scores: the result table, if there is one. gains: None where the results
    of the single queries are not known.
    """

    model: str
    base: BaseModel
    config: Config
    commit: str
    domains: Mapping[str, int]
    verdict: Verdict | None
    gains: pd.DataFrame | None
    scores: pd.DataFrame | None
    unknown: str
    sampled: str = ""

    def provenance(self) -> dict[str, Any]:
        """Return the facts for ``model.json``."""
        return {
            "grappa": __version__,
            "commit": self.commit,
            "model": self.model,
            "base_model": self.base.repository or self.base.name,
            "base_weights": self.base.weights,
            "base_license": self.base.licence or None,
            "images": dict(self.domains),
            "verdict": self.verdict.verdict if self.verdict else None,
        }


# ---------------------------------------------------------------- reading


def read_facts(run: RunFolder) -> Facts:
    """Return what a run knows of the model that it has published."""
    import pandas as pd

    config, manifest = read_config(run), readable_manifest(run, "model")
    assert manifest is not None, "the model is published"
    model = made_of(run, "model")
    images = published(run, "images", "images.parquet") / "images.parquet"
    listing = pd.read_parquet(images, columns=["domain", "split"])
    learned = listing["domain"].iloc[train_rows(listing)]
    scores, gains, unknown = _numbers_of(run, config, model)
    return Facts(
        model=model,
        base=_base_model(config),
        config=config,
        commit=str(manifest.provenance.get("git_commit") or ""),
        domains={str(name): int(number) for name, number in sorted(learned.value_counts().items())},
        verdict=_verdict_of(run),
        gains=gains,
        scores=scores,
        unknown=unknown,
        sampled=caption(run.artifact("evaluation").home / METRICS) if scores is not None else "",
    )


def _verdict_of(run: RunFolder) -> Verdict | None:
    """Return the verdict, if the run has one that belongs to its model."""
    try:
        check_same_origin(run, "model", "verdict")
    except DamagedError:
        raise
    except ValueError:
        return None
    return read_verdict(run)


def _numbers_of(run: RunFolder, config: Config, model: str) -> tuple[pd.DataFrame | None, pd.DataFrame | None, str]:
    """Return the result table, the gains of the model, and why one of them is None; damage is an error.

    Only the results of the single queries may be gone: the gains and their intervals are left out then.
    """
    from grappa.pipeline import tables
    from grappa.pipeline.open_run import read_metrics

    try:
        own = [f"retrieval/{name}" for name, node in evaluated_models(config).items() if node.instance == model]
        check_same_origin(run, "model", "images", "evaluation", *own, f"heads/{model}", f"embeddings/{model}")
        gone = run.artifact("evaluation").check(read=[METRICS]) == [f"{PER_QUERY}: missing"]
        scores = read_metrics(run.artifact("evaluation").home / METRICS) if gone else tables.load_metrics(run.root)
        if not scores["map"].notna().any():
            return None, None, "no numbers on the card: no image has a label"
        if gone:
            how = f"`{repair_command(run, 'evaluation')}` makes it again"
            return scores, None, f"no gains and intervals on the card: evaluation/{PER_QUERY} is gone; {how}"
        return scores, _gains(scores, tables.load_per_query(run.root), model), ""
    except DamagedError:
        raise
    except ValueError as error:
        return None, None, f"no numbers on the card: {sentence(error)}"


def _gains(scores: pd.DataFrame, per_query: pd.DataFrame, model: str) -> pd.DataFrame:
    """Return the gain of the deployed model over the best zero-shot model by domain.

    The frozen backbone has none: its table is empty.
    """
    from grappa.pipeline.pages.report.summary import comparisons

    found = comparisons(scores, per_query, "domain", deployed=model)
    return found[(found["candidate"] == model) & (found["against"] == "zero-shot")]


def _base_model(config: Config) -> BaseModel:
    settings = config.backbone
    if settings.module:
        return BaseModel(settings.module, "", "", f"of the module {settings.module}")
    given = settings.weights
    if given and given.startswith("hf-hub:"):
        repository = given.removeprefix("hf-hub:").partition("@")[0]
        return BaseModel(settings.name, repository, "", f"{repository} on the Hugging Face hub")
    if given:
        return BaseModel(settings.name, "", "", f"the file {os.path.basename(given)}")
    from grappa.backbone.weights import import_timm

    own = import_timm().get_pretrained_cfg(settings.name)
    repository = str(own.hf_hub_id or "")
    return BaseModel(settings.name, repository, str(own.license or ""), f"{repository or own.url}, by timm")


# ---------------------------------------------------------------- writing


def write_card(folder: Path, facts: Facts, record: ModelRecord, file: str, digest: str) -> None:
    """Write the card into a folder whose weights are in ``file``, of this sha256."""
    parts = (_front_matter(facts, file), _body(facts, record, file, digest))
    (folder / CARD).write_text("\n".join(parts), encoding="utf-8", errors="backslashreplace")


def _front_matter(facts: Facts, file: str) -> str:
    import yaml

    data: dict[str, Any] = {"library_name": "grappa", "pipeline_tag": "image-feature-extraction"}
    data["tags"] = [*_TAGS, *(["onnx"] if file.endswith(".onnx") else [])]
    if facts.base.repository:
        data |= {"base_model": facts.base.repository, "base_model_relation": "adapter"}
    licence = facts.base.licence
    if licence in _OF_THE_HUB:
        data["license"] = licence
    elif licence and licence != "unknown":
        data |= {"license": "other", "license_name": licence}
    return f"---\n{yaml.safe_dump(data, sort_keys=False, allow_unicode=True)}---\n"


def _body(facts: Facts, record: ModelRecord, file: str, digest: str) -> str:
    sections = {
        "What it is": _what(facts, record),
        "Did adaptation help?": _verdict(facts),
        "Numbers": _numbers(facts),
        "How to use it": _use_onnx(record) if file.endswith(".onnx") else _use(record),
        "Licence": _licence(facts.base),
        "How it was made": _made(facts, file, digest),
    }
    text = "\n\n".join(f"## {title}\n\n{content}" for title, content in sections.items())
    return f"# {_plain(facts.base.name)}, adapted to {_domains_in_words(facts.domains)}\n\n{text}\n"


def _what(facts: Facts, record: ModelRecord) -> str:
    images = sum(facts.domains.values())
    counts = ", ".join(f"{_plain(name or '(none)')} {number:,}" for name, number in facts.domains.items())
    learned = "is the frozen base model" if not record.sets else f"has {len(record.sets)} adaptor set(s) in its blocks"
    fusion = ", weighed by a fusion" if record.fusion else ""
    return (
        f"An image goes in, an L2-normalised vector of {record.embedding_dim} numbers comes out: images that are alike "
        f"have a large inner product. The model (`{facts.model}`) {learned}{fusion}, and a last step of the kind "
        f"`{record.head['kind']}`. It was adapted without labels by Grappa, on {images:,} images of "
        f"{len(facts.domains)} domain(s): {counts}."
    )


def _verdict(facts: Facts) -> str:
    if facts.verdict is None:
        return "Not known: the run has no verdict that belongs to this model."
    found = facts.verdict
    compared = next((each for each in found.models if each.model == facts.model), None)
    reference = compared is None or compared.difference == compared.low == compared.high == 0
    own = (
        ""
        if compared is None or reference
        else (
            f" The indicator of `{facts.model}` is that of the frozen base model {compared.difference:+.3f} "
            f"[{compared.low:+.3f}, {compared.high:+.3f}] (95 % interval)."
        )
    )
    return f"**{_plain(found.verdict)}**. {_plain(found.evidence)}{own} No label was read for this."


def _numbers(facts: Facts) -> str:
    from grappa.pipeline.pages.report.summary import domain_name, gain_text, result_table

    if facts.scores is None:
        return "None: the run had no labelled test images, or no evaluation of this very model."
    own = facts.scores[facts.scores["model"].isin(["zero_shot", facts.model])]
    lines = ["Mean average precision of test images, in each domain's own gallery (± the standard error over queries):"]
    lines += ["", result_table(own, "domain").markdown()]
    lines += ["", f"{facts.sampled}."] if facts.sampled else []
    if facts.gains is None:
        return "\n".join([*lines, "", "Gains and intervals are not told: the results of single queries are gone."])
    if not len(facts.gains):
        return "\n".join([*lines, "", "The deployed model is the frozen one: there is no gain to tell of."])
    lines += ["", "The gain over the best model without training, with its 95 % interval (paired bootstrap):", ""]
    lines += ["| domain | gain | over |", "| --- | ---: | --- |"]
    for _, row in facts.gains.iterrows():
        name = "**mean**" if row["domain"] == MEAN else _plain(domain_name(row["domain"]))
        lines.append(f"| {name} | {gain_text(row)} | `{row['reference']}` |")
    return "\n".join(lines)


def _use(record: ModelRecord) -> str:
    module = record.backbone.module
    more = f', module="{module}"' if module else ""
    return (
        "```python\nimport grappa  # pip install grappa-retrieval\n\n"
        f'model = grappa.load_model("FOLDER"{more})  # this folder; or "hf-hub:OWNER/NAME"\n'
        'vectors = model.encode(["a.jpg", "b.jpg"])  # (2, D) float32; paths, PIL images, arrays, tensors\n'
        "print(vectors @ vectors.T)  # cosines\n```\n\n"
        f"Images are brought to {record.backbone.image_size} x {record.backbone.image_size} pixels by "
        "`model.preprocess`, as they were for the adaptation. No code of this folder is run."
    )


def _use_onnx(record: ModelRecord) -> str:
    side = record.backbone.image_size
    return (
        "```python\nimport onnxruntime\n\n"
        'session = onnxruntime.InferenceSession("model.onnx")\n'
        f"# images: (batch, 3, {side}, {side}) float32, made as preprocessing.json says\n"
        'vectors = session.run(["embeddings"], {"images": images})[0]  # (batch, D) float32, L2-normalised\n```'
    )


def _licence(base: BaseModel) -> str:
    if not base.licence or base.licence == "unknown":
        return (
            f"The licence of the base model (weights: {_plain(base.weights)}) is not known to Grappa. The weights here "
            "contain it: look it up, and set `license` above, before you share them."
        )
    return (
        f"The weights here contain the base model, {_plain(base.repository or base.name)}, whose licence is "
        f"`{_plain(base.licence)}` as timm states it. What it demands holds for this model too."
    )


def _made(facts: Facts, file: str, digest: str) -> str:
    commit = f", commit {facts.commit[:12]}" if facts.commit else ""
    settings = _without_paths(facts.config)
    return (
        f"Grappa {__version__}{commit}. Base weights: {_plain(facts.base.weights)}. sha256 of "
        f"{file}: `{digest}`.\n\n<details><summary>All settings</summary>\n\n"
        f"```yaml\n{printable(dump_config(settings), kept=chr(10)).strip()}\n```\n\n</details>"
    )


def _without_paths(config: Config) -> Config:
    """Return the settings with the last part of each path only: the rest is nobody's business."""
    backbone, images, clusters, objects = config.backbone, config.images, config.clusters, config.objects
    weights = backbone.weights
    if weights and not weights.startswith("hf-hub:"):
        weights = os.path.basename(os.path.normpath(weights))
    short: dict[str, Any] = {name: tuple(map(_last, getattr(images, name))) for name in ("sources", "domains")}
    return config.model_copy(
        update={
            "backbone": backbone.model_copy(update={"weights": weights}),
            "images": images.model_copy(update=short),
            "clusters": clusters.model_copy(update={"embeddings": _short(clusters.embeddings)}),
            "objects": objects.model_copy(update={"model": _short(objects.model)}),
        }
    )


def _short(place: str | None) -> str | None:
    """Return the last part of a path; a name on the hub stays as it is."""
    return os.path.basename(os.path.normpath(place)) if place and os.path.isabs(place) else place


def _last(source: str) -> str:
    """Return ``DIR`` or ``NAME=DIR`` with the last part of the path, of a URL without what may be secret."""
    source = bare(source) if "://" in source else source
    name, sign, path = source.rpartition("=")
    return f"{name}{sign}{os.path.basename(os.path.normpath(path))}" if "/" not in name else os.path.basename(source)


def _domains_in_words(domains: Mapping[str, int]) -> str:
    names = [_plain(name) for name in domains if name]
    if not names:
        return "images"
    return ", ".join(names) if len(names) <= 4 else f"{len(names)} domains"


def _plain(text: str) -> str:
    from grappa.pipeline.pages.report.summary import plain_markdown

    return plain_markdown(text)
