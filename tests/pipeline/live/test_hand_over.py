"""A collection for other tools: one Parquet file with the vectors, a data set for FiftyOne, folders of links."""

from __future__ import annotations

import base64
import io
import json
import os
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

import grappa
from grappa.pipeline.cli import app
from grappa.pipeline.commands import hand_over
from grappa.pipeline.store.artifacts import RunFolder
from tests.helpers.tiny import draw_images, make_run, run_all, write_weights


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = tmp_path_factory.mktemp("handed")
    images = draw_images(folder / "images", num_classes=2)
    made = make_run(folder / "run", [images], write_weights(folder / "weights.safetensors"), model__source="zero_shot")
    run_all(made)
    return made


def call(*words: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(word) for word in words])
    return done.exit_code, done.output


def test_the_table_has_the_images_with_clusters_and_vectors(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hand_over, "BLOCK_ROWS", 7)
    code, output = call("vectors", run.root, "--out", tmp_path / "all.parquet")
    assert code == 0 and output.startswith("wrote 30 vectors of 32 dimensions by zero_shot to ")
    table, opened = pq.read_table(tmp_path / "all.parquet"), grappa.open_run(run.root)
    names = ["image_id", "file", "path", "domain", "split", "label", "k00004", "k00008", "embedding"]
    assert table.column_names == names and str(table.schema.field("embedding").type).startswith("fixed_size_list<")
    found = table.to_pandas()
    np.testing.assert_array_equal(np.stack(found["embedding"].to_list()), opened.embeddings()[0])
    assert found["image_id"].tolist() == opened.images().index.tolist()
    assert found["k00004"].tolist() == opened.assignments()["k00004"].tolist()
    assert all(Path(file).is_file() for file in found["file"])


def test_a_data_set_for_fiftyone_has_every_image_with_its_neighbours(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hand_over, "BLOCK_ROWS", 7)
    code, output = call("vectors", run.root, "--format", "fiftyone", "--out", tmp_path / "all")
    assert code == 0 and output.startswith("wrote 30 samples for FiftyOne, vectors by zero_shot, to ")
    data_set = json.loads((tmp_path / "all" / "metadata.json").read_bytes())
    samples = json.loads((tmp_path / "all" / "samples.json").read_bytes())["samples"]
    opened = grappa.open_run(run.root)
    images, vectors, clusters = opened.images(), opened.embeddings()[0], opened.assignments()
    fields = {field["name"]: field["ftype"].rpartition(".")[2] for field in data_set["sample_fields"]}
    assert set(samples[0]) - {"_id"} <= set(fields) and fields["embedding"] == "VectorField"
    assert [sample["image_id"] for sample in samples] == [*images.index]
    numbers = {sample["_id"]["$oid"]: row for row, sample in enumerate(samples)}
    assert len(numbers) == 30 and all(len(number) == 24 for number in numbers)
    for row, sample in enumerate(samples):
        packed = base64.b64decode(sample["embedding"]["$binary"]["base64"])
        np.testing.assert_array_equal(np.load(io.BytesIO(zlib.decompress(packed)), allow_pickle=False), vectors[row])
        wanted = opened.neighbors(images.index[row], 10)
        assert [images.index[numbers[each]] for each in sample["neighbors"]] == [*wanted.index]
        np.testing.assert_allclose(sample["similarities"], wanted["similarity"], atol=1e-5)
        assert Path(sample["filepath"]).is_file() and sample["domain"] == images["domain"].iloc[row]
        assert sample["label"]["label"] == images["label"].iloc[row]
        assert sample["k00004"]["label"] == str(clusters["k00004"].iloc[row])
    call("vectors", run.root, "--format", "fiftyone", "--out", tmp_path / "again")
    assert (tmp_path / "again" / "samples.json").read_bytes() == (tmp_path / "all" / "samples.json").read_bytes()


def test_fiftyone_loads_the_data_set(run: RunFolder, tmp_path: Path) -> None:
    fiftyone = pytest.importorskip("fiftyone", reason="the package fiftyone is not installed")
    assert call("vectors", run.root, "--format", "fiftyone", "--out", tmp_path / "all")[0] == 0
    try:
        fiftyone.list_datasets()
    except (OSError, fiftyone.core.config.FiftyOneConfigError) as error:
        pytest.skip(f"FiftyOne has no database here ({str(error).splitlines()[0]})")
    loaded = fiftyone.Dataset.from_dir(str(tmp_path / "all"), dataset_type=fiftyone.types.FiftyOneDataset)
    try:
        opened = grappa.open_run(run.root)
        assert len(loaded) == 30 and loaded.media_type == "image"
        assert set(loaded.distinct("domain")) == set(opened.images()["domain"])
        assert loaded.count_values("k00004.label") == {
            str(cluster): number for cluster, number in opened.assignments()["k00004"].value_counts().items() if number
        }
        for row, sample in enumerate(loaded):
            np.testing.assert_array_equal(sample["embedding"], opened.embeddings()[0][row])
            assert Path(sample.filepath).is_file() and sample["label"].label == opened.images()["label"].iloc[row]
            nearest = loaded.select(sample["neighbors"], ordered=True).values("image_id")
            assert nearest == [*opened.neighbors(sample["image_id"], 10).index]
        loaded.add_sample(fiftyone.Sample(filepath="/new.png", domain="new"))  # the fields are those of any data set
        assert loaded.match(fiftyone.ViewField("label.label") == "class_0").count() == 15
    finally:
        loaded.delete()


def test_links_lead_to_the_images_of_each_cluster(run: RunFolder, tmp_path: Path) -> None:
    code, output = call("links", run.root, tmp_path / "clusters", "--granularity", "k00004")
    assert code == 0 and output.startswith("linked 30 images by k00004 in ")
    opened = grappa.open_run(run.root)
    images, clusters = opened.images(), opened.assignments()
    for folder in (tmp_path / "clusters").iterdir():
        members = clusters[clusters["k00004"] == int(folder.name)].sort_values("k00004_distance")
        linked = [str(link.resolve()) for link in sorted(folder.iterdir())]
        assert sorted(linked) == sorted(images["file"][members.index])
        assert clusters.loc[images.index[images["file"] == linked[0]][0], "k00004_distance"] == members.iloc[0, -3]
    assert sum(1 for _ in (tmp_path / "clusters").rglob("*.png")) == 30
    assert call("links", run.root, tmp_path / "all")[0] == 0
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == ["k00004", "k00008"]


def test_new_images_can_be_embedded_into_one_table(run: RunFolder, tmp_path: Path) -> None:
    draw_images(tmp_path / "new", num_classes=1, num_images=2, seed=3)
    for out in ("folder", "table.parquet"):
        code, output = call("embed", run.root, "--images", tmp_path / "new", "--out", tmp_path / out)
        assert code == 0, output
    table = pd.read_parquet(tmp_path / "table.parquet")
    assert [*table.columns] == ["path", "domain", "embedding"] and len(table) == 6
    np.testing.assert_array_equal(np.stack(table["embedding"]), np.load(tmp_path / "folder" / "embeddings.npy"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "new", "table.parquet"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["vectors", "--out", "x.csv"], "give a name that ends in .parquet"),
        (["vectors", "--out", "x", "--format", "fiftyone", "--model", "nobody"], "there are no embeddings of a model"),
        (["vectors", "--out", "x.parquet", "--format", "fiftyone"], "is to be a folder for FiftyOne; give another"),
        (["vectors", "--out", ".", "--format", "fiftyone"], "exists already; give a new name"),
        (["vectors", "--out", "x.parquet", "--model", "nobody"], "there are no embeddings of a model 'nobody'"),
        (["links", "x", "--granularity", "k7"], "there is no granularity 'k7'; the run has k00004, k00008"),
    ],
)
def test_bad_input_is_one_sentence(run: RunFolder, tmp_path: Path, words: list[str], sentence: str) -> None:
    filled = [words[0], run.root, *(str(tmp_path / word) if word.startswith("x") else word for word in words[1:])]
    code, output = call(*filled)
    assert code == 1 and sentence in output and len(output.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_names_that_parquet_cannot_hold_are_one_sentence_and_links_lead_to_them(tmp_path: Path) -> None:
    images = draw_images(tmp_path / "images", num_classes=2)
    odd = os.path.join(os.fsencode(images), b"discs", b"class_0", b"\xff =1+1\n<b>.png")
    os.rename(images / "discs" / "class_0" / "0.png", odd)
    made = make_run(
        tmp_path / "run", [images], write_weights(tmp_path / "weights.safetensors"), model__source="zero_shot"
    )
    run_all(made, until="clusters")
    run_all(made, stage="embeddings", instance="zero_shot")
    for words in (["vectors", "--model", "zero_shot"], ["sample", "-n", "30"]):
        code, output = call(words[0], made.root, *words[1:], "--out", tmp_path / "out.parquet")
        sentence = "is no UTF-8 name, which Parquet cannot hold; rename the file"
        assert code == 1 and sentence in output and "\\udcff" in output
        assert len(output.strip().splitlines()) == 1
    with pytest.raises(ValueError, match=r"udcff.* is no UTF-8 name, which JSON cannot hold; rename the file"):
        hand_over.check_text(os.fsdecode(odd))
    assert call("duplicates", made.root, "--out", tmp_path / "pairs.parquet")[0] == 0
    assert call("links", made.root, tmp_path / "clusters", "--granularity", "k00004")[0] == 0
    linked = {os.path.realpath(os.fsencode(link)) for link in (tmp_path / "clusters").rglob("*.png")}
    assert odd in linked and len(linked) == 30
    assert not (tmp_path / "out.parquet").exists()
