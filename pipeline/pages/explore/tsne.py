"""scikit-learn's t-SNE as a program: ``tsne.py POINTS POSITIONS`` reads (N, D) float32 and writes (N, 2), both .npy.

It is a program, because scikit-learn tells how far it is by printing, and because a page must answer meanwhile. Every
line on stdout that begins with ``PROGRESS`` tells the share that is done. It ends when its stdin does: with the process
that started it, however that ends.
"""

from __future__ import annotations

import io
import os
import re
import sys
import threading
from contextlib import redirect_stdout

import numpy as np

PROGRESS = "progress "
DIMENSIONS = 50
MAX_IMAGES = 10_000
NUM_ITERATIONS = 750
EARLY = 250  # scikit-learn's iterations of early exaggeration


class _Progress(io.TextIOBase):
    """Turns what scikit-learn prints into shares of the work."""

    def __init__(self, stream: object) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        found = re.search(r"Iteration (\d+):", text)
        if found:
            share = 0.1 + 0.9 * int(found[1]) / NUM_ITERATIONS
            print(f"{PROGRESS}{share:.3f}", file=self._stream, flush=True)  # type: ignore[call-overload]
        return len(text)


def _end_with_stdin() -> None:
    while os.read(0, 4096):  # not sys.stdin, whose lock would be held at the end
        pass
    os._exit(1)


def main(source: str, target: str) -> None:
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    from sklearn.manifold import TSNE

    points = np.load(source, allow_pickle=False)
    perplexity = min(30.0, (len(points) - 1) / 3)
    model = TSNE(2, perplexity=perplexity, init="pca", max_iter=NUM_ITERATIONS, random_state=0, verbose=2)
    with redirect_stdout(_Progress(sys.stdout)):
        positions = model.fit_transform(points)
    np.save(target, positions.astype(np.float32), allow_pickle=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
