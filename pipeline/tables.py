"""Pandas views of a run by the path of its folder: short names for the methods of ``grappa.Run``."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from grappa.pipeline.open_run import Which, open_run
from grappa.pipeline.store.artifacts import quoted


def load_assignments(run: str | Path) -> pd.DataFrame:
    """Return the cluster of each image; see ``Run.assignments``."""
    return open_run(run).assignments()


def cluster_sizes(run: str | Path) -> pd.DataFrame:
    """Return the sizes of all clusters; see ``Run.cluster_sizes``."""
    return open_run(run).cluster_sizes()


def domain_mix(run: str | Path) -> pd.DataFrame:
    """Return the share of each domain in each cluster; see ``Run.domain_mix``."""
    return open_run(run).domain_mix()


def cluster_metrics(run: str | Path) -> pd.DataFrame:
    """Return how well the clusters agree with the labels; see ``Run.cluster_metrics``."""
    return open_run(run).cluster_metrics()


def learning_curves(run: str | Path) -> pd.DataFrame:
    """Return the metrics along training; see ``Run.learning_curves``."""
    return open_run(run).learning_curves()


def load_metrics(run: str | Path) -> pd.DataFrame:
    """Return the result table; see ``Run.metrics``."""
    return open_run(run).metrics()


def load_per_query(run: str | Path) -> pd.DataFrame:
    """Return the metrics of every query; see ``Run.per_query``."""
    return open_run(run).per_query()


def load_jobs(run: str | Path) -> pd.DataFrame:
    """Return the jobs of a run; see ``Run.jobs``."""
    return open_run(run).jobs()


def load_rejected(run: str | Path) -> pd.DataFrame:
    """Return the files that could not be used; see ``Run.rejected``."""
    return open_run(run).rejected()


def load_objects(run: str | Path) -> pd.DataFrame:
    """Return the objects' boxes; see ``Run.objects``."""
    return open_run(run).objects()


def load_attention(run: str | Path, *, rows: Which = "test", pairs: str = "neighbors") -> pd.DataFrame:
    """Return each domain's mean granularity attention; see ``Run.attention``."""
    return open_run(run).attention(rows=rows, pairs=pairs)


def attention_summary(run: str | Path, *, rows: Which = "test", pairs: str = "neighbors") -> pd.DataFrame:
    """Return whether the attention differs by image and by domain; see ``Run.attention_summary``."""
    return open_run(run).attention_summary(rows=rows, pairs=pairs)


def load_sweep(folder: str | Path) -> pd.DataFrame:
    """Return the table of a sweep: run, variant, changed settings, columns of the result table, seconds by stage."""
    path = Path(folder) / "sweep.parquet"
    if not path.is_file():
        raise ValueError(f"{path} is missing; make it by `grappa sweep SWEEP --out {quoted(Path(folder))}`")
    try:
        return pd.read_parquet(path)
    except (OSError, ValueError) as error:
        command = f"grappa sweep SWEEP --out {quoted(Path(folder))}"
        raise ValueError(f"{path} is damaged ({error}); write it again by `{command}`") from error
