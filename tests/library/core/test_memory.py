"""What a step says it will take at its peak is true, and it refuses to start where that is not there."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from grappa.backbone.frozen import Backbone, build_backbone
from grappa.backbone.spec import BackboneSpec
from grappa.core import memory
from grappa.core.vectors import read_rows
from grappa.images.transforms import normalize
from grappa.method import head as heads
from grappa.method.adaptor_training import new_adaptor_set
from grappa.method.head import apply_head, fit_neighborhood_head, fit_whitening_head
from grappa.method.losses import norm_softmax
from grappa.metrics import retrieval
from grappa.metrics.retrieval import evaluate
from grappa.pipeline.engine import memory_limit as machine
from grappa.pipeline.engine.memory_limit import NotEnoughMemoryError, available_memory, require_memory
from grappa.pipeline.opening import shape_of
from grappa.search import index as indexes
from grappa.search import kmeans, two_levels
from grappa.search import neighbors as neighborhoods
from grappa.search.index import SearchIndex
from grappa.search.kmeans import assign, cluster
from grappa.search.neighbors import nearest_neighbors
from tests.benchmarks.memory import peak_growth
from tests.helpers.tiny import draw_images, make_run, run_all, write_weights

HALF = (0.5, 0.5, 0.5)
VIT = memory.VitShape(image_size=160, tokens=101, width=192, heads=3, blocks=4, adapted=32)
NUM, WIDTH, NUM_CLUSTERS, NUM_NEIGHBORS = 9000, 256, 300, 10


def clustering(features: np.ndarray, ids: np.ndarray) -> object:
    file = getattr(features, "filename", None)
    points = read_rows(Path(file), ids[::-1]) if file else features
    found = cluster(points, num_clusters=NUM_CLUSTERS, ids=ids.astype(np.uint64), num_iterations=2)
    del points
    return assign(features, found.centroids)


def clustering_in_two_levels(features: np.ndarray, ids: np.ndarray) -> object:
    points = features.copy()  # what the stage reads
    return two_levels.cluster_in_two_levels(
        points, num_clusters=NUM_CLUSTERS, ids=ids.astype(np.uint64), num_iterations=2
    )


def neighbors(features: np.ndarray, ids: np.ndarray) -> object:
    return nearest_neighbors(features, features[ids], num_neighbors=NUM_NEIGHBORS, query_ids=ids, candidate_ids=ids)


def evaluation(features: np.ndarray, ids: np.ndarray) -> object:
    labels, domains = (ids // 3).astype(str).astype(object), np.full(len(ids), "one", dtype=object)
    return evaluate(features[ids], labels=labels, domains=domains, ids=ids.astype(np.uint64), gallery="merged")


def head(features: np.ndarray, ids: np.ndarray) -> object:
    fitted = fit_neighborhood_head(features[ids], ids[::-1].astype(np.uint64), num_centroids=NUM_CLUSTERS)
    return apply_head(fitted, features)


def index(features: np.ndarray, ids: np.ndarray) -> object:
    return SearchIndex.build(features[ids], [str(each) for each in ids])


STEPS: dict[str, tuple[Callable[[np.ndarray, np.ndarray], object], int]] = {
    "clustering": (clustering, kmeans.memory_needed(NUM, WIDTH, NUM_CLUSTERS)),
    "two_levels": (clustering_in_two_levels, two_levels.memory_needed(NUM, WIDTH, NUM_CLUSTERS)),
    "neighbors": (neighbors, neighborhoods.memory_needed(NUM, NUM, WIDTH, NUM_NEIGHBORS)),
    "evaluation": (evaluation, retrieval.memory_needed(NUM, WIDTH)),
    "head": (head, heads.memory_needed(NUM, NUM, WIDTH, NUM_CLUSTERS)),
    "index": (index, indexes.memory_needed(NUM, WIDTH)),
}


def embedding(batch_size: int) -> Callable[[], object]:
    """What runs in the fresh process: a batch by the frozen backbone, of which one image was seen before."""
    torch.set_num_threads(1)
    backbone = small_vit()

    def run(number: int) -> object:
        images = torch.randint(0, 256, (number, 3, VIT.image_size, VIT.image_size)).byte()
        with torch.inference_mode():
            return backbone(normalize(images, HALF, HALF))

    run(1)
    return partial(run, batch_size)


def training(batch_size: int) -> Callable[[], object]:
    """The same with a set's step."""
    torch.set_num_threads(1)
    backbone = small_vit()
    adaptors = new_adaptor_set(backbone, VIT.adapted, name="k00016", seed=0)
    proxies = torch.zeros(64, backbone.embedding_dim, requires_grad=True)

    def run(number: int) -> object:
        images = torch.randint(0, 256, (number, 3, VIT.image_size, VIT.image_size)).byte()
        embeddings = backbone(normalize(images, HALF, HALF), adaptors)
        return norm_softmax(embeddings, proxies, torch.arange(number), temperature=0.1).backward()

    run(1)
    return partial(run, batch_size)


def small_vit() -> Backbone:
    spec = BackboneSpec("vit_tiny_patch16_224", VIT.image_size, 1.0, HALF, HALF, {"depth": VIT.blocks})
    return build_backbone(spec).on(torch.device("cpu"))


def test_batches_take_what_they_say() -> None:
    assert shape_of(small_vit(), [new_adaptor_set(small_vit(), VIT.adapted, name="k00016", seed=0)]) == VIT
    for step, said in ((embedding, memory.embedding), (training, memory.training)):
        measured = peak_growth(step, 32)
        assert measured <= 1.2 * said(VIT, 32, "float32")
        assert said(VIT, 32, "float32") <= 3 * measured


def work(name: str, file: Path) -> Callable[[], object]:
    """What runs in the fresh process: all libraries are started by a small problem before."""
    step, _ = STEPS[name]
    small = np.eye(700, dtype=np.float32)
    step(small, np.arange(700))

    def run() -> object:
        features: Any = np.load(file, mmap_mode="c", allow_pickle=False)
        return step(features, np.arange(len(features)))

    return run


@pytest.mark.parametrize("name", list(STEPS))
def test_a_step_takes_what_it_says(name: str, tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(NUM, WIDTH)).astype(np.float32)
    np.save(tmp_path / "features.npy", rows / np.linalg.norm(rows, axis=1, keepdims=True))
    measured, said = peak_growth(partial(work, name), tmp_path / "features.npy"), STEPS[name][1]
    assert measured <= 1.2 * said
    assert said <= 3 * measured  # no bound is so wide that it would refuse what could run


def test_the_need_grows_with_the_images() -> None:
    assert kmeans.memory_needed(10**7, 384, 65536) > 10**7 * 384 * 4
    needs = [neighborhoods.memory_needed(number, number, 384, 50) for number in (10**6, 10**4)]
    assert needs[0] > 10 * needs[1]


def test_a_head_copies_no_embeddings_in_the_order_of_their_ids(tmp_path: Path) -> None:
    points = np.random.default_rng(0).normal(size=(100_000, 64)).astype(np.float32)
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    out = np.lib.format.open_memmap(tmp_path / "out.npy", mode="w+", dtype=np.float32, shape=points.shape)
    tracemalloc.start()
    try:
        fitted = fit_whitening_head(points, np.arange(len(points), dtype=np.uint64))
        made = apply_head(fitted, points, out=out)
        assert tracemalloc.get_traced_memory()[1] < points.nbytes * 0.7
    finally:
        tracemalloc.stop()
    assert made is out
    np.testing.assert_array_equal(out, apply_head(fitted, points))


def test_too_little_memory_is_refused_with_both_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "available_memory", lambda: 3 * 2**30)
    require_memory("clusters/k00256", 3 * 2**30)
    with pytest.raises(NotEnoughMemoryError, match=r"clusters/k00256 needs about 3.5 GiB .* 3.0 GiB are free here"):
        require_memory("clusters/k00256", 7 * 2**29)
    monkeypatch.setattr(machine, "available_memory", lambda: None)
    require_memory("clusters/k00256", 2**60)


def test_the_limit_of_a_job_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm and containers limit a control group, here one above the process's own."""
    group = tmp_path / "groups" / "job" / "step"
    group.mkdir(parents=True)
    (tmp_path / "meminfo").write_text("MemTotal: 9000000 kB\nMemAvailable: 8000000 kB\n")
    (tmp_path / "own").write_text("0::/job/step\n")
    (group / "memory.max").write_text("max\n")
    (group.parent / "memory.max").write_text("1000000\n")
    (group.parent / "memory.current").write_text("700000\n")
    (group.parent / "memory.stat").write_text("anon 5\ninactive_file 30000\nactive_file 20000\n")
    for name, path in (("MEMINFO", "meminfo"), ("OWN_GROUPS", "own"), ("GROUPS", "groups")):
        monkeypatch.setattr(machine, name, tmp_path / path)
    assert available_memory() == 350_000
    (group.parent / "memory.max").write_text("max\n")
    assert available_memory() == 8_000_000 * 1024
    (tmp_path / "meminfo").unlink()
    assert available_memory() is None


def test_a_run_refuses_before_it_works_and_goes_on_where_there_is_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run", [draw_images(tmp_path / "images")], write_weights(tmp_path / "vit.safetensors"))
    run_all(run, until="frozen_views")
    monkeypatch.setattr(machine, "available_memory", lambda: 10 * 2**20)
    with pytest.raises(NotEnoughMemoryError, match="whitening/features needs about 0.. GiB"):
        run_all(run, until="whitening")
    monkeypatch.setattr(machine, "available_memory", lambda: 10 * 2**30)
    run_all(run, until="whitening")
    monkeypatch.setattr(machine, "available_memory", lambda: 10 * 2**20)
    with pytest.raises(NotEnoughMemoryError, match="neighbors needs about 0.. GiB"):
        run_all(run, until="clusters")
    assert not run.artifact("neighbors").home.exists()
    monkeypatch.setattr(machine, "available_memory", lambda: 10 * 2**30)
    assert run_all(run, until="clusters")
    log = (run.artifact("clusters/k00004").home / "log.jsonl").read_text()
    assert '"needed_memory_bytes"' in log


def test_a_batch_larger_than_all_images_needs_no_more_than_these(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"adaptors__batch_size": 10**6, "compute__inference_batch_size": 10**6}
    images, weights = draw_images(tmp_path / "images"), write_weights(tmp_path / "vit.safetensors")
    run = make_run(tmp_path / "run", [images], weights, **changes)
    monkeypatch.setattr(machine, "available_memory", lambda: 2**30)
    assert run_all(run, until="adaptors")
