"""The whole pipeline on a CPU, offline, in seconds: from files to search, and what must not change its results."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import grappa
from grappa.pipeline import tables
from grappa.pipeline.commands.embed import embed
from grappa.pipeline.commands.export import export
from grappa.pipeline.commands.init import Request, initialize
from grappa.pipeline.commands.search import search
from grappa.pipeline.engine.status import read_config, states
from grappa.pipeline.stages import index as index_stage
from grappa.pipeline.store.artifacts import RunFolder
from grappa.pipeline.store.checkpoints import RowCheckpoint
from grappa.pipeline.store.work import Work
from tests.helpers.tiny import (
    digests,
    draw_images,
    make_run,
    run_all,
    sign_again,
    split_of,
    with_other_bytes,
    write_table,
    write_weights,
)

COLUMNS = "model domain gallery num_queries map map_se r_precision map_at_r recall_at_1 recall_at_1_se recall_at_2"
FREE = ["zero_shot", "zero_shot_whitened", "zero_shot_head"]
ROWS = [*FREE, "k00004", "k00008", "mean", "fused", "fused_raw", "student", "oracle"]


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("material")
    draw_images(folder / "images")
    write_weights(folder / "weights.safetensors")
    images = folder / "images"
    write_table(images, folder / "table.csv", label=lambda path: path.parent.name, split=split_of)
    return folder


@pytest.fixture(scope="module")
def run(material: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A finished run; tests that change it copy it first."""
    made = make_run(tmp_path_factory.mktemp("runs") / "run", [material / "table.csv"], material / "weights.safetensors")
    run_all(made)
    return made


@pytest.fixture
def copy(run: RunFolder, tmp_path: Path) -> RunFolder:
    return RunFolder.open(Path(shutil.copytree(run.root, tmp_path / "copy")))


def _kinds(run: RunFolder) -> dict[str, str]:
    return {each.name: each.state.kind for each in states(run, read_config(run))}


def test_every_artifact_is_in_place_and_a_second_run_does_nothing(run: RunFolder) -> None:
    assert set(_kinds(run).values()) == {"fresh"}
    assert run_all(run) == []
    files = {path.name for path in (run.root / "images").iterdir()}
    assert files == {"images.parquet", "labels.parquet", "rejected.parquet", "pixels", "manifest.json", "log.jsonl"}
    assert {path.suffix for path in (run.root / "images" / "pixels").iterdir()} == {".npy"}
    assert not [path for path in run.root.rglob("*") if {".partial", ".old", ".pkl", ".pt", ".lock"} & {*path.suffixes}]


def test_the_result_table_is_tidy_and_complete(run: RunFolder) -> None:
    metrics = tables.load_metrics(run.root)
    sizes = ["num_possible_queries", "num_images", "num_reciprocity_images"]
    assert list(metrics.columns) == [*COLUMNS.split(), "recall_at_4", "recall_at_8", "reciprocity", *sizes]
    assert (metrics[sizes].to_numpy() == metrics[["num_queries"]].to_numpy()).all(), "all images query"
    assert list(dict.fromkeys(metrics["model"])) == ROWS
    assert set(metrics["gallery"]) == {"domain", "merged"}
    assert set(metrics["domain"]) == {"stripes", "checks", "discs", "_mean"}
    assert metrics["num_queries"].max() == 30
    assert metrics["map"].between(0, 1).all()
    assert len(tables.load_per_query(run.root)) == len(ROWS) * 2 * 30


def test_tables_show_who_is_in_which_cluster(run: RunFolder) -> None:
    table = tables.load_assignments(run.root)
    assert table.index.name == "image_id"
    names = ["path", "domain", "split", "label", "k00004", "k00004_distance", "k00008", "k00008_distance"]
    assert list(table.columns) == names
    assert table["k00004"].dtype == np.int64
    assert table["k00008_distance"].between(0, 2).all()
    sizes = tables.cluster_sizes(run.root)
    assert sizes.groupby("granularity")["num_images"].sum().tolist() == [60, 60]
    assert sizes.groupby("granularity")["num_train"].sum().tolist() == [30, 30]
    mix = tables.domain_mix(run.root)
    np.testing.assert_allclose(mix.groupby(["granularity", "pseudo_label"])["share"].sum(), 1)
    curves = tables.learning_curves(run.root)
    assert set(zip(curves["stage"], curves["instance"], strict=True)) == {
        ("adaptors", "k00004"),
        ("adaptors", "k00008"),
        ("fusion", "neighbors"),
        ("student", "student"),
    }


def test_attention_is_recorded_for_every_image_and_told_by_domain(run: RunFolder) -> None:
    attention = np.load(run.root / "attention" / "neighbors" / "attention.npy")
    assert (attention.shape, attention.dtype) == ((60, 2, 2), np.float32)
    np.testing.assert_allclose(attention.sum(-1), 1, atol=1e-6)
    table = tables.load_attention(run.root)
    assert list(table.columns) == ["domain", "block", "granularity", "num_images", "mean", "std"]
    assert (set(table["granularity"]), set(table["num_images"])) == ({"k00004", "k00008"}, {10})
    images = pd.read_parquet(run.root / "images" / "images.parquet")
    discs = attention[((images["domain"] == "discs") & (images["split"] == "test")).to_numpy()]
    found = table[(table["domain"] == "discs") & (table["granularity"] == "k00008")].sort_values("block")
    np.testing.assert_allclose(found["mean"], discs[:, :, 1].mean(0), rtol=1e-5)
    summary = tables.attention_summary(run.root, rows="all")
    whole = summary[(summary["domain"] == "_mean") & (summary["block"] == -1)].iloc[0]
    assert whole["num_images"] == 60
    assert 0 <= whole["domain_information"] <= whole["image_information"] <= np.log(2)
    with pytest.raises(ValueError, match="rows is 'some'; expected test, train or all"):
        tables.load_attention(run.root, rows="some")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"attention/views is no part of the run .*: its configuration asks for none"):
        tables.attention_summary(run.root, pairs="views")


def test_an_interrupted_attention_pass_goes_on_where_it_stopped(
    copy: RunFolder, material: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"compute__inference_batch_size": 16, "compute__checkpoint_seconds": 0.000001}
    make_run(copy.root, [], material / "weights.safetensors", **changes)
    run_all(copy, stage="attention", force=True)
    undisturbed = digests(copy)["attention/neighbors/attention.npy"]
    real = RowCheckpoint.offer

    def stop(self: RowCheckpoint, num_rows: int, out: Any) -> None:
        real(self, num_rows, out)
        if num_rows == 32:
            raise KeyboardInterrupt

    monkeypatch.setattr(RowCheckpoint, "offer", stop)
    with pytest.raises(KeyboardInterrupt):
        run_all(copy, stage="attention", force=True)
    monkeypatch.undo()
    run_all(copy, stage="attention", force=True)
    log = [json.loads(line) for line in (copy.root / "attention/neighbors/log.jsonl").read_text().splitlines()]
    assert [each["new"] for each in log if "task" in each] == [28]
    assert digests(copy)["attention/neighbors/attention.npy"] == undisturbed


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.1)])
def test_the_stored_embeddings_are_the_models(
    copy: RunFolder, material: Path, precision: str, tolerance: float
) -> None:
    make_run(copy.root, [], material / "weights.safetensors", embeddings__precision=precision)
    run_all(copy, until="model")
    model = grappa.load_model(copy.root)
    images = pd.read_parquet(copy.root / "images" / "images.parquet")
    stored = np.load(copy.root / "heads" / "fused" / "embeddings.npy")
    chosen = [0, 17, 41]
    inputs = [model.preprocess(Image.open(Path("/") / images["path"][row])) for row in chosen]
    np.testing.assert_allclose(model(torch.stack(inputs)).numpy(), stored[chosen], atol=tolerance)


def test_the_student_can_be_what_is_deployed_indexed_and_searched(
    copy: RunFolder, material: Path, tmp_path: Path
) -> None:
    make_run(copy.root, [], material / "weights.safetensors", model__source="student")
    assert {name for name, kind in _kinds(copy).items() if kind == "stale"} == {"model", "index"}
    picture = with_other_bytes(material / "images" / "discs" / "class_2" / "0.png", tmp_path)
    lines = run_all(copy, stage="model")
    assert lines[0].startswith("model: student: 1 adaptor set")
    with pytest.raises(ValueError, match=r"is student, the index is of fused; run `grappa run "):
        search(copy.root, picture, 3)
    run_all(copy)
    stored = np.load(copy.root / "heads" / "student" / "embeddings.npy")
    images = pd.read_parquet(copy.root / "images" / "images.parquet")
    row = int(np.flatnonzero(images["path"].str.endswith("discs/class_2/0.png"))[0])
    found = search(copy.root, picture, 3)
    assert found[0]["image_id"] == images["image_id"][row]
    export(copy.root, tmp_path / "model")
    model = grappa.load_model(tmp_path / "model")
    with Image.open(picture) as opened, torch.inference_mode():
        embedding = model(model.preprocess(opened)[None])[0].numpy()
    assert float(embedding @ stored[row]) > 0.99  # a head makes more of the rounding of bfloat16


def test_without_heads_the_embeddings_pass_unchanged(copy: RunFolder, material: Path) -> None:
    make_run(copy.root, [], material / "weights.safetensors", heads__kind="none")
    run_all(copy)
    metrics = tables.load_metrics(copy.root)
    assert list(dict.fromkeys(metrics["model"])) == [row for row in ROWS if row not in ("zero_shot_head", "fused_raw")]
    for row in ("k00004", "mean", "fused", "student"):
        head = (copy.root / "heads" / row / "embeddings.npy").read_bytes()
        assert head == (copy.root / "embeddings" / row / "embeddings.npy").read_bytes()
    assert json.loads((copy.root / "heads" / "fused" / "head.json").read_text()) == {"kind": "none"}
    assert grappa.load_model(copy.root).head.form() == {"kind": "none"}


def test_a_head_is_recorded_and_makes_the_rows_what_they_are(run: RunFolder) -> None:
    fitted = json.loads((run.root / "heads" / "fused" / "head.json").read_text())
    assert set(fitted) == {"kind", "num_centroids", "temperature", "neighborhood_weight", "perplexity"}
    assert (fitted["kind"], fitted["num_centroids"]) == ("whitened_neighborhood", 10)
    np.testing.assert_allclose(fitted["perplexity"], 5.5, rtol=1e-6)
    changed = np.load(run.root / "heads" / "zero_shot" / "embeddings.npy")
    assert (changed.shape, changed.dtype) == ((60, 32), np.float32)
    np.testing.assert_allclose(np.linalg.norm(changed, axis=1), 1, atol=1e-5)
    assert not np.allclose(changed, np.load(run.root / "embeddings" / "zero_shot" / "embeddings.npy"), atol=0.1)


def test_a_head_learns_on_train_rows_only(copy: RunFolder) -> None:
    folder = copy.root / "embeddings" / "fused"
    before, split = (
        np.load(folder / "embeddings.npy"),
        pd.read_parquet(copy.root / "images" / "images.parquet")["split"],
    )
    before[split == "test"] = before[split == "test"][::-1]
    np.save(folder / "embeddings.npy", before, allow_pickle=False)
    sign_again(folder)
    head = digests(copy)["heads/fused/head.safetensors"]
    run_all(copy, stage="heads", instance="fused", force=True)
    assert digests(copy)["heads/fused/head.safetensors"] == head


def test_search_finds_a_copy_with_other_bytes_first(run: RunFolder, material: Path, tmp_path: Path) -> None:
    image = material / "images" / "discs" / "class_3" / "2.png"
    found = search(run.root, with_other_bytes(image, tmp_path), 3)
    assert found[0]["path"].endswith("discs/class_3/2.png")
    assert found[0]["file"] == str(image), "the file is absolute"
    assert found[0]["domain"] == "discs"
    assert found[0]["similarity"] > 0.999
    assert found[0]["similarity"] >= found[1]["similarity"] >= found[2]["similarity"]


def test_an_image_of_the_run_is_not_its_own_nearest_one(run: RunFolder, material: Path, tmp_path: Path) -> None:
    image = material / "images" / "discs" / "class_3" / "2.png"
    found = search(run.root, image, 3)
    assert len(found) == 3
    others = search(run.root, with_other_bytes(image, tmp_path), 4)
    assert [each["image_id"] for each in found] == [each["image_id"] for each in others[1:]]
    everyone = len(pd.read_parquet(run.root / "images" / "images.parquet"))
    assert len(search(run.root, image, everyone)) == everyone - 1


def test_search_looks_at_the_image_before_it_loads_a_model(run: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "no.jpg").write_bytes(b"no image")
    code = "import sys; from grappa.pipeline.cli import main; sys.argv[0] = 'grappa'\n"
    code += "try: main()\nfinally: print(*({'torch', 'timm', 'faiss'} & set(sys.modules)))"
    for name, sentence in (("missing.jpg", "No such file"), ("no.jpg", "not an image in JPEG")):
        command = [sys.executable, "-c", code, "search", str(run.root), str(tmp_path / name)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 1 and sentence in done.stderr and done.stdout.split() == [], done


def test_the_exported_model_stands_alone_and_embeds_the_same(run: RunFolder, material: Path, tmp_path: Path) -> None:
    export(run.root, tmp_path / "model")
    names = ["README.md", "model.json", "weights.safetensors"]
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == names
    assert grappa.load_model(tmp_path / "model").embedding_dim == 32
    embed(run.root, material / "images", tmp_path / "from_run")
    embed(tmp_path / "model", material / "images", tmp_path / "from_model")
    first, second = (np.load(tmp_path / name / "embeddings.npy") for name in ("from_run", "from_model"))
    np.testing.assert_array_equal(first, second)
    ids = pd.read_parquet(tmp_path / "from_run" / "ids.parquet")
    assert len(ids) == len(first) == 60
    with pytest.raises(ValueError, match="exists already"):
        export(run.root, tmp_path / "model")


def test_shuffled_rows_and_renamed_files_change_nothing_but_names(
    run: RunFolder, material: Path, tmp_path: Path
) -> None:
    names = sorted((material / "images").rglob("*.png"))
    lines = ["path,domain,label,split"]
    for number, path in enumerate(random.Random(3).sample(names, len(names))):
        renamed = tmp_path / "renamed" / f"{number:03d} ö.png"
        renamed.parent.mkdir(exist_ok=True)
        shutil.copy(path, renamed)
        lines.append(f"{renamed},{path.parts[-3]},{path.parent.name},{split_of(path)}")
    (tmp_path / "shuffled.csv").write_text("\n".join(lines))
    other = make_run(tmp_path / "other", [tmp_path / "shuffled.csv"], material / "weights.safetensors")
    run_all(other)
    assert tables.load_metrics(other.root).equals(tables.load_metrics(run.root))
    mine, theirs = digests(run), digests(other)
    for name in ("features/features.npy", "clusters/k00008/assignments.parquet", "heads/fused/embeddings.npy"):
        assert mine[name] == theirs[name], name


def test_one_value_changed_makes_stale_exactly_what_reads_it(copy: RunFolder, material: Path) -> None:
    make_run(copy.root, [], material / "weights.safetensors", fusion__learning_rate=0.002)
    stale = {name for name, kind in _kinds(copy).items() if kind == "stale"}
    rows = {f"{stage}/{row}" for stage in ("embeddings", "views", "heads") for row in ("fused", "student")}
    ends = {"verdict", "model", "evaluation", "index", "attention/neighbors"}
    asked = {f"retrieval/{row}" for row in ("fused", "fused_raw", "student")}
    assert stale == {"fusion/neighbors", "student", *rows, *asked, *ends}
    before = digests(copy)
    lines = run_all(copy, stage="fusion")
    assert [line.split(":")[0] for line in lines] == ["fusion/neighbors"]
    after = digests(copy)
    assert {name for name in before if before[name] != after[name]} == {
        "fusion/neighbors/fusion.safetensors",
        "fusion/neighbors/metrics.jsonl",
    }


def test_another_granularity_leaves_the_others_fresh(copy: RunFolder, material: Path) -> None:
    make_run(copy.root, [], material / "weights.safetensors", clusters__num_clusters="[4, 6, 8]")
    kinds = _kinds(copy)
    assert kinds["clusters/k00006"] == kinds["adaptors/k00006"] == "missing"
    for name in ("clusters/k00004", "adaptors/k00008", "embeddings/k00004", "features"):
        assert kinds[name] == "fresh"
    assert kinds["fusion/neighbors"] == "stale"


def test_a_corrected_label_reruns_the_evaluation_only(copy: RunFolder, material: Path, tmp_path: Path) -> None:
    table = write_table(
        material / "images", tmp_path / "t.csv", label=lambda path: f"{path.parent.name}x", split=split_of
    )
    make_run(copy.root, [table], material / "weights.safetensors")
    lines = run_all(copy)
    assert {line.partition(":")[0].partition("/")[0] for line in lines} == {"images", "retrieval", "evaluation"}


def test_search_refuses_a_model_and_an_index_of_different_generations(copy: RunFolder, material: Path) -> None:
    make_run(copy.root, [], material / "weights.safetensors", heads__perplexity=4.0)
    image = material / "images" / "discs" / "class_3" / "2.png"
    assert search(copy.root, image, 1), "an edited setting alone leaves the whole former result usable"
    run_all(copy, until="model")
    with pytest.raises(ValueError, match="do not belong together: heads/fused was made again in between"):
        search(copy.root, image, 1)
    run_all(copy)
    assert search(copy.root, image, 1)


def test_assignments_of_other_images_are_refused(copy: RunFolder, material: Path, tmp_path: Path) -> None:
    table = write_table(material / "images", tmp_path / "t.csv", split=lambda path: "train")
    make_run(copy.root, [table], material / "weights.safetensors")
    run_all(copy, until="images")
    with pytest.raises(ValueError, match="images was made again in between"):
        tables.load_assignments(copy.root)


def test_an_interrupted_reuse_never_writes_into_the_other_run(
    run: RunFolder, material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = make_run(tmp_path / "other", [material / "table.csv"], material / "weights.safetensors")

    def crash(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Work, "publish", crash)
    with pytest.raises(KeyboardInterrupt):
        initialize(other.root, Request([], None, [], run.root), say=lambda line: None)
    monkeypatch.undo()
    assert list(other.root.glob("*.partial")), "the linked files lie there unpublished"
    run_all(other)
    assert all(each.state.kind == "fresh" for each in states(run, read_config(run), verify=True))
    assert digests(other) == digests(run)


def test_inputs_that_change_while_they_are_read_are_never_published(copy: RunFolder, material: Path) -> None:
    make_run(copy.root, [], material / "weights.safetensors", index__rows="test")
    artifact = copy.artifact("heads/fused")
    real = index_stage.run

    def run_and_change(context: Any) -> str:
        sentence = real(context)
        manifest = json.loads((artifact.path / "manifest.json").read_text())
        manifest["outputs"]["embeddings.npy"]["sha256"] = "0" * 64
        (artifact.path / "manifest.json").write_text(json.dumps(manifest))
        return sentence

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_stage, "run", run_and_change)
        with pytest.raises(ValueError, match="input heads/fused: content changed while it was made"):
            run_all(copy, stage="index")


def test_verify_finds_an_image_with_other_content_of_the_same_size(material: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(material / "images", tmp_path / "images"))
    made = make_run(tmp_path / "made", [folder], material / "weights.safetensors")
    run_all(made, until="images")
    victim = folder / "discs" / "class_0" / "0.png"
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    assert _kinds(made)["images"] == "fresh"
    found = {each.name: each.state for each in states(made, read_config(made), verify=True)}
    assert "discs/class_0/0.png: other content than was decoded" in found["images"].reasons[0]


def test_views_as_partners_add_a_row(copy: RunFolder, material: Path) -> None:
    make_run(copy.root, [], material / "weights.safetensors", fusion__pairs="[neighbors, views]")
    assert _kinds(copy)["fusion/neighbors"] == "fresh"
    run_all(copy)
    assert "fused_views" in set(tables.load_metrics(copy.root)["model"])


def test_two_seeds_share_what_does_not_read_the_seed(run: RunFolder, material: Path, tmp_path: Path) -> None:
    other = tmp_path / "seed1"
    make_run(other, [material / "table.csv"], material / "weights.safetensors", fusion__seed=1)
    initialize(other, Request([], None, [], run.root), say=lambda line: None)
    kinds = _kinds(RunFolder.open(other))
    assert kinds["adaptors/k00004"] == kinds["embeddings/mean"] == "fresh"
    assert kinds["fusion/neighbors"] == "missing"


KILLER = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import tests.conftest
from pathlib import Path
from grappa.pipeline.store.artifacts import RunFolder
from grappa.pipeline.store.checkpoints import FileCheckpoint
from tests.helpers.tiny import run_all

real, left = FileCheckpoint.save, int(sys.argv[2])
def save(self, *arguments):
    global left
    real(self, *arguments)
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
FileCheckpoint.save = save
run_all(RunFolder.open(Path(sys.argv[1])))
"""


@pytest.mark.parametrize("num_saves", [3, 29])
def test_kill_9_in_mid_training_and_the_same_command_ends_bit_identical(
    run: RunFolder, material: Path, tmp_path: Path, num_saves: int
) -> None:
    changes = {"compute__checkpoint_seconds": 0.000001}
    other = make_run(tmp_path / "other", [material / "table.csv"], material / "weights.safetensors", **changes)
    script = KILLER.format(tests=str(Path(__file__).parents[2]))
    done = subprocess.run(
        [sys.executable, "-c", script, str(other.root), str(num_saves)], capture_output=True, text=True
    )
    assert done.returncode == -9, done.stderr
    assert list(other.root.glob("*/*.partial.*/checkpoint.safetensors"))
    run_all(other)
    assert digests(other) == digests(run)
    logs = [other.root / name / "log.jsonl" for name in ("adaptors/k00004", "adaptors/k00008", "fusion/neighbors")]
    assert any(json.loads(path.read_text().splitlines()[-1])["resumed"] for path in logs)


def test_embedding_a_plain_folder_lists_what_it_cannot_use(run: RunFolder, material: Path, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    shutil.copy(material / "images" / "discs" / "class_0" / "0.png", tmp_path / "new" / "good.png")
    (tmp_path / "new" / "bad.jpg").write_bytes(b"no image")
    (tmp_path / "new" / "notes.txt").write_bytes(b"no image")
    sentence = embed(run.root, tmp_path / "new", tmp_path / "out")
    assert "1 embeddings of 32 dimensions, 1 files rejected" in sentence
    assert f" in {tmp_path / 'out'}, 1 file (.txt 1) passed over; first of the rejected: bad.jpg: not an" in sentence
    assert pd.read_parquet(tmp_path / "out" / "ids.parquet")["path"].tolist() == ["good.png"]
    rejected = pd.read_parquet(tmp_path / "out" / "rejected.parquet")
    assert rejected["path"].tolist() == ["bad.jpg"]
    assert "not an image" in rejected["reason"][0]
    (tmp_path / "new" / "good.png").unlink()
    with pytest.raises(ValueError, match=r"none of the 1 files can be used; first: bad.jpg"):
        embed(run.root, tmp_path / "new", tmp_path / "none")
    assert not list(tmp_path.glob(".none*")), "nothing half-written stays"
