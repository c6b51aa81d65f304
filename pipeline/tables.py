"""Pandas views of a run: who is in which cluster, how big clusters are, how training went, how well it retrieves.

Every function takes the run folder's path and reads published artifacts only; a missing one is a ValueError that names
the command which makes it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pandas as pd

from grappa.pipeline.config.schema import Config, num_clusters_of
from grappa.pipeline.config.yaml_file import load_config
from grappa.pipeline.graph.node import Node
from grappa.pipeline.graph.stages import find_stage
from grappa.pipeline.opening import chosen_rows
from grappa.pipeline.store.artifacts import MANIFEST_FILE, Manifest, RunFolder, check_same_origin, published, quoted

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Rows = Literal["test", "train", "all"]


def load_assignments(run: str | Path) -> pd.DataFrame:
    """Return who is in which cluster: index image_id; columns path, domain, split, label, and for each granularity
    ``k00256`` (int64, the pseudo-label) and ``k00256_distance`` (float32, 1 - cosine to its centroid)."""
    folder, config = _open(run)
    images = published(folder, "images")
    check_same_origin(folder, "images", *(f"clusters/{name}" for name in config.granularities))
    table = pd.read_parquet(images / "images.parquet").set_index("image_id")[["path", "domain", "split"]]
    table["label"] = pd.read_parquet(images / "labels.parquet").set_index("image_id")["label"]
    for name in config.granularities:
        found = pd.read_parquet(published(folder, Node("clusters", name)) / "assignments.parquet").set_index("image_id")
        table[name], table[f"{name}_distance"] = found["pseudo_label"], found["distance"]
    return table


def cluster_sizes(run: str | Path) -> pd.DataFrame:
    """Return one row a cluster: granularity, pseudo_label, num_train, num_images; empty clusters included."""
    table, parts = load_assignments(run), []
    for name in _granularities(table):
        everyone = pd.RangeIndex(num_clusters_of(name))
        counts = table[name].value_counts().reindex(everyone, fill_value=0)
        train = table.loc[table["split"] != "test", name].value_counts().reindex(everyone, fill_value=0)
        part = {"granularity": name, "pseudo_label": everyone, "num_train": train.array, "num_images": counts.array}
        parts.append(pd.DataFrame(part))
    return pd.concat(parts, ignore_index=True)


def domain_mix(run: str | Path) -> pd.DataFrame:
    """Return how domains share clusters: granularity, pseudo_label, domain, num_images, share (of the cluster, 0-1)."""
    table, parts = load_assignments(run), []
    for name in _granularities(table):
        counts = table.groupby([name, "domain"], observed=True).size().rename("num_images").reset_index()
        counts = counts.rename(columns={name: "pseudo_label"})
        counts["share"] = counts["num_images"] / counts.groupby("pseudo_label")["num_images"].transform("sum")
        counts.insert(0, "granularity", name)
        parts.append(counts)
    return pd.concat(parts, ignore_index=True)


def learning_curves(run: str | Path) -> pd.DataFrame:
    """Return the metrics along training: stage, instance, step, epoch, learning_rate, loss and the stage's own."""
    folder, config = _open(run)
    parts = []
    for stage in ("adaptors", "fusion", "student"):
        for instance in find_stage(stage).instances(config):
            lines = (published(folder, Node(stage, instance)) / "metrics.jsonl").read_text().splitlines()
            part = pd.DataFrame([json.loads(line) for line in lines])
            part.insert(0, "stage", stage)
            part.insert(1, "instance", instance or stage)
            parts.append(part)
    return pd.concat(parts, ignore_index=True)


def load_metrics(run: str | Path) -> pd.DataFrame:
    """Return the result table: model, domain (``_mean``: over all domains), gallery (domain | merged), metrics."""
    folder, _ = _open(run)
    return pd.read_csv(published(folder, "evaluation") / "metrics.csv")


def load_per_query(run: str | Path) -> pd.DataFrame:
    """Return the metrics of every query: image_id, domain, model, gallery, num_positives, average_precision, ..."""
    folder, _ = _open(run)
    return pd.read_parquet(published(folder, "evaluation") / "per_query.parquet")


def load_sweep(folder: str | Path) -> pd.DataFrame:
    """Return the table of a sweep: run, variant, one column a changed setting, the result table's, seconds a stage."""
    path = Path(folder) / "sweep.parquet"
    if not path.is_file():
        raise ValueError(f"{path} is missing; make it by `grappa sweep SWEEP --out {quoted(Path(folder))}`")
    return pd.read_parquet(path)


def load_jobs(run: str | Path) -> pd.DataFrame:
    """Return the jobs of a run, one row an artifact and job, in the order of submission.

    Columns: artifact, job_id, job_name, state (submitted, running, stopped, made, failed, not begun: as the job itself
    said), submitted, started, ended (UTC), seconds, restarts, node, peak_memory_bytes (of the first process), exit,
    recipe (sha256 of the artifact's fingerprint), error, outcome (accounting's word on a job that ended without one),
    log.
    """
    path = Path(run) / "jobs" / "jobs.csv"
    if not path.is_file():
        raise ValueError(f"{path} is missing: no job was submitted; do it by `grappa submit {quoted(Path(run))}`")
    texts = dict.fromkeys(("job_id", "recipe", "error", "outcome"), "string")
    numbers = dict.fromkeys(("restarts", "peak_memory_bytes", "exit"), "Int64")
    return pd.read_csv(path, dtype={**texts, **numbers}, parse_dates=["submitted", "started", "ended"])


def load_rejected(run: str | Path) -> pd.DataFrame:
    """Return the files that could not be used: path, root, domain, reason."""
    folder, _ = _open(run)
    return pd.read_parquet(published(folder, "images") / "rejected.parquet")


def load_objects(run: str | Path) -> pd.DataFrame:
    """Return the boxes: index image_id; columns path, domain, split, box_x0 .. box_y1, confidence, provider, accepted,
    reason (see ``grappa.pipeline.stages.objects``)."""
    folder, _ = _open(run)
    check_same_origin(folder, "images", "objects")
    images = pd.read_parquet(published(folder, "images") / "images.parquet").set_index("image_id")
    boxes = pd.read_parquet(published(folder, "objects") / "objects.parquet").set_index("image_id")
    return images[["path", "domain", "split"]].join(boxes, validate="one_to_one")


def load_attention(run: str | Path, *, rows: Rows = "test", pairs: str = "neighbors") -> pd.DataFrame:
    """Return each domain's mean granularity attention: domain, block, granularity, num_images, mean, std (of images).

    ``rows``: the images counted, by default those that are evaluated; ``pairs``: the fusion, neighbors or views.
    """
    from grappa.metrics.attention import attention_by_domain

    return attention_by_domain(*_attention(run, rows, pairs))


def attention_summary(run: str | Path, *, rows: Rows = "test", pairs: str = "neighbors") -> pd.DataFrame:
    """Return whether the attention differs by image and by domain, one row a (domain, block), both with ``_mean``.

    Columns: num_images, entropy (nats), entropy_share (of log G), variance, domain_variance, eta_squared,
    image_information, domain_information; ``grappa.metrics.attention.summarize_attention`` has their formulas.
    """
    from grappa.metrics.attention import summarize_attention

    attention, domains, _ = _attention(run, rows, pairs)
    return summarize_attention(attention, domains)


def _attention(run: str | Path, rows: str, pairs: str) -> tuple[NDArray[np.float32], NDArray[np.object_], list[str]]:
    """Return the attention of the chosen images (n, L, G), their domains (n,) and the granularities' names."""
    import numpy as np

    folder, _ = _open(run)
    check_same_origin(folder, "images", f"attention/{pairs}")
    home = published(folder, Node("attention", pairs))
    images = pd.read_parquet(published(folder, "images") / "images.parquet")
    chosen = chosen_rows(images, rows)
    inputs = Manifest.read(home / MANIFEST_FILE).fingerprint["inputs"]
    names = [name.removeprefix("adaptors/") for name in inputs if name.startswith("adaptors/")]
    attention = np.load(home / "attention.npy", mmap_mode="r", allow_pickle=False)
    return attention[chosen], images["domain"].to_numpy()[chosen], sorted(names, key=num_clusters_of)


def _open(run: str | Path) -> tuple[RunFolder, Config]:
    folder = RunFolder.open(Path(run))
    return folder, load_config(folder.config_path)


def _granularities(table: pd.DataFrame) -> list[str]:
    distances = [name for name in table.columns if name.endswith("_distance")]
    return [name.removesuffix("_distance") for name in distances]
