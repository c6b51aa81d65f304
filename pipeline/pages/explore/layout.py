"""Where an image lies on the map: two principal components, or t-SNE in a process of its own.

N images, D width. Positions are (N, 2) float32 in [0, 1], the longer side of the cloud fills it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from grappa.pipeline.pages.explore.tsne import DIMENSIONS, MAX_IMAGES, PROGRESS

PROGRAM = Path(__file__).with_name("tsne.py")
SAMPLE = 50_000
BLOCK_ROWS = 65536
NUM_PLACED_BY = 3


def principal_components(embeddings: NDArray[np.float32], num_dimensions: int = 2) -> NDArray[np.float32]:
    """Return the first principal components of embeddings (N, D), (N, num_dimensions) float32."""
    from sklearn.decomposition import PCA

    number = min(num_dimensions, *embeddings.shape)
    step = max(1, len(embeddings) // SAMPLE)
    model = PCA(number, svd_solver="covariance_eigh").fit(np.asarray(embeddings[::step]))
    starts = range(0, len(embeddings), BLOCK_ROWS)
    found = np.concatenate([model.transform(embeddings[start : start + BLOCK_ROWS]) for start in starts])
    return np.pad(found, ((0, 0), (0, num_dimensions - number))).astype(np.float32)


def fitted(positions: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return positions (N, 2) moved and scaled into the unit square; a few far images do not shrink all others."""
    low, high = np.percentile(positions, [0.1, 99.9], axis=0)
    span = max(float((high - low).max()), 1e-12)
    return (((positions - (low + high) / 2) / span) * 0.94 + 0.5).astype(np.float32)


def tsne(embeddings: NDArray[np.float32], report: Callable[[float], None]) -> NDArray[np.float32]:
    """Return t-SNE's positions (N, 2) of embeddings.

    Above ``MAX_IMAGES`` it is that of every n-th image, and the others lie between the nearest three of these.
    """
    reduced = principal_components(embeddings, DIMENSIONS)
    chosen = np.linspace(0, len(reduced) - 1, min(len(reduced), MAX_IMAGES)).astype(np.int64)
    if len(chosen) < 4:
        return reduced[:, :2]
    with tempfile.TemporaryDirectory(prefix="grappa-tsne-") as folder:
        source, target = Path(folder) / "points.npy", Path(folder) / "positions.npy"
        np.save(source, reduced[chosen], allow_pickle=False)
        _run([str(source), str(target)], report)
        placed: NDArray[np.float32] = np.load(target, allow_pickle=False)
    return placed if len(chosen) == len(reduced) else _between(reduced, chosen, placed)


def _run(arguments: list[str], report: Callable[[float], None]) -> None:
    # -P: the folder of the program, with the names of our modules in it, is no place to import from
    command = [sys.executable, "-P", "-u", str(PROGRAM), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": str(os.cpu_count() or 1)}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env=environment, text=True) as child:
        try:
            assert child.stdout is not None and child.stderr is not None
            for line in child.stdout:
                if line.startswith(PROGRESS):
                    report(float(line.removeprefix(PROGRESS)))
            problem = child.stderr.read()
        except BaseException:
            child.kill()
            raise
    if child.returncode:
        raise RuntimeError(f"t-SNE ended with {child.returncode}: {(problem.strip().splitlines() or ['killed'])[-1]}")


def _between(
    points: NDArray[np.float32], chosen: NDArray[np.int64], placed: NDArray[np.float32]
) -> NDArray[np.float32]:
    from sklearn.neighbors import NearestNeighbors

    search = NearestNeighbors(n_neighbors=NUM_PLACED_BY, algorithm="brute").fit(points[chosen])
    found = np.empty((len(points), 2), dtype=np.float32)
    for start in range(0, len(points), 4096):
        distances, near = search.kneighbors(points[start : start + 4096])
        weights = 1 / (distances + 1e-6)
        found[start : start + 4096] = (placed[near] * weights[..., None]).sum(1) / weights.sum(1, keepdims=True)
    found[chosen] = placed
    return found
