"""Whoever reads a finished run refuses a damaged file in a sentence that names the artifact and the command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import grappa
from grappa.pipeline.commands.embed import embed
from grappa.pipeline.commands.export import export
from grappa.pipeline.commands.search import search
from grappa.pipeline.pages.report.page import write_report
from grappa.pipeline.store.artifacts import RunFolder
from grappa.pipeline.store.digests import forget_digests
from grappa.pipeline.tables import load_sweep
from tests.helpers.tiny import draw_images, make_run, run_all, split_of, write_table, write_weights

Reader = Callable[[RunFolder, Path], object]
READ: list[tuple[str, Reader]] = [
    ("model/weights.safetensors", lambda run, images: search(run.root, images / "discs/class_3/2.png", 1)),
    ("index/index.faiss", lambda run, images: search(run.root, images / "discs/class_3/2.png", 1)),
    ("images/images.parquet", lambda run, images: search(run.root, images / "discs/class_3/2.png", 1)),
    ("model/model.json", lambda run, images: export(run.root, images.parent / "exported")),
    ("model/weights.safetensors", lambda run, images: export(run.root, images.parent / "exported")),
    ("model/weights.safetensors", lambda run, images: grappa.load_model(run.root)),
    ("model/weights.safetensors", lambda run, images: embed(run.root, images, images.parent / "embedded")),
    ("evaluation/metrics.csv", lambda run, images: write_report(run.root, images.parent / "report.html")),
    ("images/labels.parquet", lambda run, images: write_report(run.root, images.parent / "report.html")),
    ("images/pixels/00000.npy", lambda run, images: write_report(run.root, images.parent / "report.html")),
    ("images/pixels/index.npy", lambda run, images: write_report(run.root, images.parent / "report.html")),
    ("embeddings/zero_shot/embeddings.npy", lambda run, images: write_report(run.root, images.parent / "report.html")),
    ("fusion/neighbors/metrics.jsonl", lambda run, images: write_report(run.root, images.parent / "report.html")),
    ("images/images.parquet", lambda run, images: grappa.open_run(run.root).images()),
    ("images/rejected.parquet", lambda run, images: grappa.open_run(run.root).rejected()),
    ("clusters/k00004/assignments.parquet", lambda run, images: grappa.open_run(run.root).assignments()),
    ("clusters/k00008/centroids.npy", lambda run, images: grappa.open_run(run.root).centroids("k00008")),
    ("adaptors/k00004/metrics.jsonl", lambda run, images: grappa.open_run(run.root).learning_curves()),
    ("evaluation/metrics.csv", lambda run, images: grappa.open_run(run.root).metrics()),
    ("evaluation/per_query.parquet", lambda run, images: grappa.open_run(run.root).per_query()),
    ("heads/fused/embeddings.npy", lambda run, images: grappa.open_run(run.root).embeddings("fused")),
    ("attention/neighbors/attention.npy", lambda run, images: grappa.open_run(run.root).attention()),
]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_images(tmp_path_factory.mktemp("material") / "images")


@pytest.fixture(scope="module")
def run(images: Path) -> RunFolder:
    table = write_table(images, images.parent / "table.csv", label=lambda path: path.parent.name, split=split_of)
    made = make_run(images.parent / "run", [table], write_weights(images.parent / "weights.safetensors"))
    run_all(made)
    return made


@pytest.mark.parametrize(("file", "read"), READ)
@pytest.mark.parametrize("damage", ["flipped", "cut", "no outputs", "no manifest"])
def test_a_damaged_file_is_refused_with_artifact_and_command(
    run: RunFolder, images: Path, file: str, read: Reader, damage: str
) -> None:
    path, before = run.root / file, {entry.name for entry in images.parent.iterdir()}
    name = next(
        each for each in (file.rpartition("/")[0], file.split("/")[0]) if (run.root / each / "manifest.json").exists()
    )
    manifest = run.root / name / "manifest.json"
    content, record = path.read_bytes(), manifest.read_bytes()
    try:
        if damage == "no outputs":
            manifest.write_text(json.dumps({**json.loads(record), "outputs": {}}))
        elif damage == "no manifest":
            manifest.unlink()
        else:
            middle = len(content) // 2
            rest = content[middle + 1 :] if damage == "flipped" else b""
            path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + rest)
        forget_digests()  # as in a new process
        with pytest.raises(ValueError, match=f"^{name} in .* is damaged .*; repair it by `grappa run .* --verify`$"):
            read(run, images)
        assert {entry.name for entry in images.parent.iterdir()} == before, "nothing half-written is left"
    finally:
        path.write_bytes(content)
        manifest.write_bytes(record)


def test_files_are_hashed_once_for_each_time_stamp(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = grappa.open_run(run.root)
    opened.metrics()
    monkeypatch.setattr("grappa.pipeline.store.digests.file_digest", None)
    opened.metrics()


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"artifact,job_id\na,b,c,d\n", b"[[[["])
def test_damaged_tables_of_jobs_and_sweeps_name_the_command_that_writes_them_again(
    run: RunFolder, tmp_path: Path, content: bytes
) -> None:
    jobs = run.root / "jobs"
    jobs.mkdir(exist_ok=True)
    (jobs / "jobs.csv").write_bytes(content)
    with pytest.raises(ValueError, match=r"jobs.csv is damaged .*; write it again by `grappa status "):
        grappa.open_run(run.root).jobs()
    (tmp_path / "sweep.parquet").write_bytes(content)
    with pytest.raises(ValueError, match=r"sweep.parquet is damaged .*; write it again by `grappa sweep "):
        load_sweep(tmp_path)
