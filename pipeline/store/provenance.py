"""The provenance of a result: commit, package versions, host, job, times, memory. It is no part of the identity."""

from __future__ import annotations

import os
import platform
import resource
import shlex
import socket
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "faiss-cpu",
    "faiss-gpu",
    "numpy",
    "pandas",
    "pyarrow",
    "pillow",
    "safetensors",
    "scikit-learn",
    "pydantic",
    "transformers",
    "submitit",
)


def provenance(*, started: datetime, device: str, job: str | None = None) -> dict[str, Any]:
    """Return the provenance of work that began at `started` (with a time zone) on `device` and ends now, for JSON.

    `job` is the Slurm job id; without it SLURM_JOB_ID is used, if set. The peak memory is this process's, in bytes.
    """
    return {
        "git_commit": code_commit(),
        "python": platform.python_version(),
        "packages": package_versions(),
        "host": socket.gethostname(),
        "device": device,
        "slurm_job": job or os.environ.get("SLURM_JOB_ID"),
        "started": _iso(started),
        "ended": _iso(datetime.now(UTC)),
        "peak_memory_bytes": peak_memory(),
        "command": shlex.join(sys.argv),
    }


def package_versions() -> dict[str, str]:
    """Return the versions of the installed packages that results may depend on; no package is imported."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def code_commit() -> str | None:
    """Return the commit of the checkout that this code runs from; None where it is installed as a wheel."""
    return git_commit(Path(__file__).resolve().parents[2])


def git_commit(folder: Path) -> str | None:
    """Return the commit of a checkout, with `+changes` when tracked files differ; None when it is no checkout."""
    if not (folder / ".git").exists():
        return None
    commit = _git(folder, "rev-parse", "HEAD")
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return f"{commit}+changes" if commit and changes else commit


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def peak_memory() -> int:
    """Return the largest resident memory that this process has had, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _iso(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="seconds")
