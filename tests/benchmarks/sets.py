"""R12: several adaptor sets in one run against as many runs of one set each, by the product's own commands."""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save_file

from tests.benchmarks import data
from tests.benchmarks.core import Gate, Options, Pair

GRAPPA = [sys.executable, "-m", "grappa"]
NUM_CLUSTERS = [8, 12, 18, 28, 43, 66, 100, 150]


@contextmanager
def one_run(options: Options) -> Iterator[Pair]:
    """Decode, embed, cluster and train: eight sets of one run folder; eight run folders of one set."""
    sizes = NUM_CLUSTERS[: options.size(8, 2)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images, settings = _prepared(folder, options)

        def cost(each: Sequence[Sequence[int]]) -> float:
            start = _clock(options)
            for chosen in each:
                _run(folder / "run", images, [*settings, f"clusters.num_clusters={list(chosen)}"])
            return _clock(options) - start

        setup = (
            f"{len(sizes)} runs of `grappa init` and `grappa run --until adaptors` with one set each, start of process "
            f"and decoding included; {options.size(512, 320)} JPEGs of 500 x 375, preset `small`"
        )
        yield Pair(lambda: cost([sizes]), lambda: cost([[k] for k in sizes]), setup, repeats=3, warm_up=False)


def _prepared(folder: Path, options: Options) -> tuple[Path, list[str]]:
    """Write images and the weights of a ViT-Tiny; return the images' folder and the settings of both sides."""
    images = folder / "images"
    (images / "one").mkdir(parents=True)
    data.write_jpegs(images / "one", options.size(512, 320))
    backbone = data.backbone(False, "vit_tiny_patch16_224", 224)
    save_file(backbone.model.state_dict(), folder / "vit.safetensors")
    return images, [
        f"backbone.weights={folder / 'vit.safetensors'}",
        f"compute.num_threads={options.threads}",
        f"compute.num_workers={options.threads}",
        f"adaptors.num_epochs={options.size(2, 1)}",
    ]


def _run(run: Path, images: Path, settings: Sequence[str]) -> None:
    changes = [word for each in settings for word in ("--set", each)]
    for command in (
        ["init", str(run), "--images", str(images), "--config", "small", *changes],
        ["run", str(run), "--until", "adaptors"],
    ):
        subprocess.run([*GRAPPA, *command], check=True, capture_output=True)
    shutil.rmtree(run)


def _clock(options: Options) -> float:
    """The wall clock, or the CPU time of the processes that were started."""
    if not options.cpu_time:
        return time.perf_counter()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


GATES = [Gate("R12", "eight sets in one run / eight runs of one set: time", 0.75, one_run)]
