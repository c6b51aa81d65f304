"""The public API: a run made by `grappa.run`, opened by `grappa.open_run`, its model opened by `grappa.load_model`."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from sklearn.metrics import adjusted_mutual_info_score

import grappa
from grappa.pipeline import tables
from grappa.pipeline.commands import notebook
from grappa.pipeline.commands.export import export
from grappa.pipeline.config.yaml_file import merged, parse_assignments, parse_settings
from grappa.pipeline.engine.status import states
from grappa.pipeline.graph.node import Node
from grappa.pipeline.graph.stages import nodes
from grappa.pipeline.open_run import ASKING, read_metrics
from grappa.pipeline.store.artifacts import RunFolder
from tests.helpers.tiny import draw_images, settings, sign_again, split_of, write_table, write_weights

CATEGORICAL = {
    "images": ["domain", "split", "label"],
    "rejected": ["domain"],
    "assignments": ["domain", "split", "label"],
    "cluster_sizes": ["granularity"],
    "domain_mix": ["granularity", "domain"],
    "cluster_metrics": ["granularity", "domain"],
    "learning_curves": ["stage", "instance"],
    "metrics": ["model", "domain", "gallery"],
    "per_query": ["model", "domain", "gallery"],
    "attention": ["domain", "granularity"],
    "attention_summary": ["domain"],
}
NAMES = {
    "assignments": "load_assignments",
    "metrics": "load_metrics",
    "per_query": "load_per_query",
    "rejected": "load_rejected",
    "attention": "load_attention",
}


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, of which one cannot be decoded, their table and the weights of the tiny backbone."""
    folder = tmp_path_factory.mktemp("material")
    draw_images(folder / "images")
    write_weights(folder / "weights.safetensors")
    (folder / "images" / "discs" / "class_3" / "broken.png").write_bytes(b"no image")
    write_table(folder / "images", folder / "table.csv", label=lambda path: path.parent.name, split=split_of)
    return folder


@pytest.fixture(scope="module")
def run(material: Path, tmp_path_factory: pytest.TempPathFactory) -> grappa.Run:
    """A finished run, made as a notebook makes it."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    changes = settings(material / "weights.safetensors", images__max_rejected=0.1, embeddings__precision="float32")
    return grappa.run(folder, images=material / "table.csv", settings=changes, progress=False)


def test_a_notebook_makes_a_run_and_goes_on_with_it(run: grappa.Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert {each.state.kind for each in states(RunFolder.open(run.root), run.config)} == {"fresh"}
    assert capsys.readouterr().out == ""
    assert grappa.run(run.root) == run
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("--force runs them again")
    assert [line for line in lines if line.startswith("fused ")]


def test_a_notebook_changes_a_setting_and_runs_some_stages(
    run: grappa.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(run.root, tmp_path / "copy"))
    changed = grappa.run(copy, settings={"clusters": {"num_iterations": np.int64(3)}}, until="clusters")
    assert changed.config.clusters.num_iterations == 3
    lines = capsys.readouterr().out.splitlines()
    made = [line.partition(":")[0] for line in lines if line.startswith("clusters/") and " stale: " not in line]
    assert made == ["clusters/k00004", "clusters/k00008"]
    assert "clusters/k00004, clusters/k00008 are stale: config clusters.num_iterations: 20 -> 3" in lines


def test_only_one_process_makes_or_changes_a_run(
    run: grappa.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="by several processes at once; make it by one process first"):
        grappa.run(tmp_path / "new", images=tmp_path)
    with pytest.raises(ValueError, match="by several processes at once"):
        grappa.run(run.root, settings={"fusion.seed": 7})
    assert not (tmp_path / "new").exists() and run.config.fusion.seed == 0


def test_every_public_name_is_there_and_explained() -> None:
    for name in grappa.__all__:
        assert getattr(grappa, name).__doc__, name
    assert grappa.run is notebook.run


def test_settings_are_a_mapping_or_texts() -> None:
    nested = {"backbone": {"weights": Path("a b.pt")}, "clusters.num_clusters": (4, 8), "images.max_rejected": 0.5}
    expected = {
        "backbone": {"weights": "a b.pt"},
        "clusters": {"num_clusters": [4, 8]},
        "images": {"max_rejected": 0.5},
    }
    assert parse_assignments(notebook.assignments(nested)) == expected
    assert notebook.assignments(["clusters.seed=1"]) == ("clusters.seed=1",)
    assert parse_assignments(notebook.assignments({"backbone.weights": None})) == {"backbone": {"weights": None}}
    with pytest.raises(ValueError, match="give a dict, or a list of section.key=value texts"):
        notebook.assignments("clusters.seed=1")


def test_wrong_use_is_a_sentence(run: grappa.Run, material: Path, tmp_path: Path) -> None:
    images = [material / "images"]
    for arguments, sentence in (
        ({}, "no images given"),
        ({"images": images, "settings": {"clusters.sead": 1}}, "did you mean clusters.seed"),
        ({"images": images, "config": "nothing"}, "no such file"),
        ({"images": tmp_path / "nowhere"}, "no such folder or table"),
    ):
        with pytest.raises(ValueError, match=sentence):
            grappa.run(tmp_path / "run", progress=False, **arguments)
    with pytest.raises(ValueError, match="no stage is called 'indexes'"):
        grappa.run(run.root, until="indexes")
    with pytest.raises(ValueError, match="is not a run folder"):
        grappa.open_run(tmp_path)


def test_images_can_be_opened(run: grappa.Run) -> None:
    images = run.images()
    assert list(images.columns[:7]) == ["file", "path", "domain", "split", "label", "height", "width"]
    for file, height, width in zip(images["file"], images["height"], images["width"], strict=True):
        assert os.path.isabs(file)
        with Image.open(file) as image:
            assert image.size == (width, height)
    assert len(images) == 60
    assert images["label"].iloc[0] in images["file"].iloc[0]
    assert run.rejected()["path"].str.endswith("broken.png").tolist() == [True]


def test_images_listed_anew_are_not_mixed_up_with_the_old_ones(run: grappa.Run, material: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run.root, tmp_path / "copy"))
    shutil.copytree(material / "images", tmp_path / "more")
    more = [material / "table.csv", tmp_path / "more"]
    changed = grappa.run(copy, images=more, settings=["images.max_rejected=0.1"], until="backbone", progress=False)
    with pytest.raises(ValueError, match="images, sources in .* do not belong together"):
        changed.images()


def test_what_few_texts_fill_is_categorical(run: grappa.Run) -> None:
    for method, columns in CATEGORICAL.items():
        table = getattr(run, method)()
        others = [name for name in table.columns if isinstance(table[name].dtype, pd.CategoricalDtype)]
        assert sorted(others) == sorted(columns), method
        if method != "images":
            pd.testing.assert_frame_equal(table, getattr(tables, NAMES.get(method, method))(run.root))
    assert list(run.metrics()["domain"].cat.categories) == ["_mean", "checks", "discs", "stripes"]
    assert list(run.cluster_sizes()["granularity"].cat.categories) == ["k00004", "k00008"]


def test_a_block_is_a_number(run: grappa.Run) -> None:
    for table in (run.attention(), run.attention_summary()):
        assert table["block"].dtype == np.int64
    assert run.attention_summary()["block"].unique().tolist() == [0, 1, -1]


def test_embeddings_are_those_that_are_evaluated(run: grappa.Run) -> None:
    embeddings, ids = run.embeddings()
    assert (embeddings.shape, embeddings.dtype) == ((60, 32), np.float32)
    assert ids.tolist() == run.images().index.tolist()
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-5)
    assert run.deployed == "fused"
    np.testing.assert_array_equal(embeddings, np.load(run.root / "heads" / "fused" / "embeddings.npy"))
    raw = np.load(run.root / "embeddings" / "fused" / "embeddings.npy")
    np.testing.assert_array_equal(run.embeddings("fused", head=False)[0], raw)
    np.testing.assert_array_equal(run.embeddings("fused_raw")[0], raw)
    for model in run.metrics()["model"].cat.categories.drop("oracle"):
        assert run.embeddings(model)[0].shape == (60, 32)
    with pytest.raises(ValueError, match="no embeddings of a model 'oracle'; the run has zero_shot, "):
        run.embeddings("oracle")


def test_neighbors_are_the_nearest_images(run: grappa.Run) -> None:
    embeddings, ids = run.embeddings("student")
    similarities = embeddings @ embeddings[7]
    similarities[7] = -np.inf
    found = run.neighbors(ids[7], 5, model="student")
    order = np.argsort(-similarities)[:5]
    np.testing.assert_allclose(found["similarity"], similarities[order], rtol=1e-5)
    assert ids[7] not in found.index
    assert len(run.neighbors(ids[7], 1000)) == 59
    assert {"path", "domain", "file", "similarity"} <= set(found.columns)
    assert all(Path(file).is_file() for file in found["file"])
    with pytest.raises(ValueError, match="there is no image 'nothing'"):
        run.neighbors("nothing")
    with pytest.raises(ValueError, match="k is -1; ask for at least one image"):
        run.neighbors(ids[7], -1)


def test_an_image_belongs_to_its_nearest_centroid(run: grappa.Run) -> None:
    centroids = run.centroids("k00008")
    features = np.load(run.root / "features" / "features.npy")
    assert (centroids.shape, centroids.dtype) == ((8, 32), np.float32)
    assert (features @ centroids.T).argmax(1).tolist() == run.assignments()["k00008"].tolist()
    with pytest.raises(ValueError, match="no granularity 'k00009'; the run has k00004, k00008"):
        run.centroids("k00009")


def test_clusters_are_compared_with_the_labels_of_the_train_images(run: grappa.Run, tmp_path: Path) -> None:
    table, found = run.assignments(), run.cluster_metrics().set_index(["granularity", "domain"])
    assert list(found.index.unique("domain")) == ["checks", "discs", "stripes", "_mean"]
    train = table[table["split"] == "train"]
    for granularity in ("k00004", "k00008"):
        for domain, own in train.groupby("domain", observed=True):
            row, clusters = found.loc[(granularity, domain)], own.groupby(granularity)["label"]
            assert (row["num_images"], row["num_clusters"]) == (10, len(clusters))
            assert row["purity"] == pytest.approx(clusters.agg(lambda labels: labels.value_counts().max()).sum() / 10)
            assert row["ami"] == pytest.approx(adjusted_mutual_info_score(own["label"], own[granularity]))
        assert found.loc[(granularity, "_mean"), "num_images"] == 30
    assert found["ami"].max() > 0.2 and found["purity"].between(0.5, 1).all()
    copy = Path(shutil.copytree(run.root, tmp_path / "copy"))
    (copy / "evaluation" / "clusters.csv").unlink()
    sign_again(copy / "evaluation")
    with pytest.raises(ValueError, match=r"an older version made the evaluation; run `grappa run .* --until evaluat"):
        grappa.open_run(copy).cluster_metrics()


def test_what_is_not_made_yet_names_the_command(material: Path, tmp_path: Path) -> None:
    made = grappa.run(
        tmp_path / "run",
        images=material / "table.csv",
        settings=settings(material / "weights.safetensors", images__max_rejected=0.1),
        until="backbone",
        progress=False,
    )
    for call in (made.images, made.metrics, made.embeddings, made.assignments, lambda: grappa.load_model(made.root)):
        with pytest.raises(ValueError, match=r"is missing in .*; run `grappa run .* --until"):
            call()
    with pytest.raises(ValueError, match="no job was submitted; do it by `grappa submit"):
        made.jobs()
    with pytest.raises(ValueError, match=r"objects is no part .* --set objects.provider=backbone`, then"):
        made.objects()
    with pytest.raises(ValueError, match=r"attention/views is no part of the run "):
        made.attention(pairs="views")


@pytest.mark.parametrize("name", ASKING)
def test_the_setting_that_an_error_names_brings_what_is_asked_for(name: str) -> None:
    numbers = {"clusters": {"num_clusters": [2]}}
    without = parse_settings({**numbers, "model": {"source": "single"}}, "the test")
    assert Node.parse(name) not in nodes(without)
    given = merged(numbers, parse_assignments([ASKING[name]]))
    assert Node.parse(name) in nodes(parse_settings(given, "the test"))


def test_a_run_folder_without_anything_is_a_sentence_too(tmp_path: Path) -> None:
    empty = grappa.open_run(RunFolder.create(tmp_path / "run").root)
    for call in (empty.images, empty.rejected, empty.objects, empty.metrics, empty.attention):
        with pytest.raises(ValueError, match=r"is missing in .*; run `grappa run .* --until"):
            call()


def test_the_model_of_a_run_is_the_exported_one(run: grappa.Run, tmp_path: Path) -> None:
    export(run.root, tmp_path / "model")
    images = run.images()
    of_run, exported = grappa.load_model(run.root), grappa.load_model(tmp_path / "model")
    with Image.open(images["file"].iloc[0]) as image:
        batch = exported.preprocess(image).unsqueeze(0)
    with torch.inference_mode():
        embedding = of_run(batch)
        torch.testing.assert_close(embedding, exported(batch), rtol=0, atol=0)
    np.testing.assert_allclose(embedding[0].numpy(), run.embeddings()[0][0], atol=1e-4)


def test_a_domain_may_be_called_na(tmp_path: Path) -> None:
    text = "model,domain,gallery,map\nfused,NA,domain,0.5\nfused,7,domain,\nfused,_mean,domain,0.5\n"
    (tmp_path / "metrics.csv").write_text(text)
    table = read_metrics(tmp_path / "metrics.csv")
    assert table["domain"].tolist() == ["NA", "7", "_mean"]
    assert table["map"].isna().tolist() == [False, True, False]
