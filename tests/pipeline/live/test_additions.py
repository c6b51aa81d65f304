"""Images that come to a finished run and go again: found at once, nothing of the run changed, nothing half there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

import grappa
from grappa.pipeline.cli import app
from grappa.pipeline.commands.init import Request, initialize
from grappa.pipeline.commands.search import search
from grappa.pipeline.engine.live import additions, embedding
from grappa.pipeline.engine.status import read_config, states
from grappa.pipeline.store.artifacts import RunFolder
from grappa.pipeline.store.locks import acquire
from tests.helpers.tiny import digests, draw_images, make_run, run_all, with_other_bytes, write_weights


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; and more: 24 new images, a copy of one of them, one of the run's, and a file that is no image."""
    folder = tmp_path_factory.mktemp("grown")
    images = draw_images(folder / "images")
    run_all(make_run(folder / "run", [images], write_weights(folder / "weights.safetensors"), student__num_epochs=1))
    more = draw_images(folder / "more", num_images=2, seed=9)
    shutil.copy(images / "discs" / "class_0" / "0.png", more / "discs" / "class_0" / "known.png")
    shutil.copy(more / "discs" / "class_0" / "0.png", more / "discs" / "class_1" / "twice.png")
    (more / "discs" / "class_0" / "bad.png").write_bytes(b"no image")
    return folder


@pytest.fixture
def run(material: Path, tmp_path: Path) -> RunFolder:
    """A copy of the finished run."""
    shutil.copytree(material / "run", tmp_path / "run")
    return RunFolder.open(tmp_path / "run")


def call(*words: object) -> tuple[int, list[str]]:
    done = CliRunner().invoke(app, [str(word) for word in words])
    return done.exit_code, done.output.strip().splitlines()


def added(run: RunFolder, more: Path) -> list[str]:
    code, lines = call("add", run.root, "--images", more)
    assert code == 0, lines
    return lines


def nearest(run: RunFolder, image: Path) -> dict[str, object]:
    """Return the nearest image to one of the same pixels; that of the same bytes is never found."""
    return search(run.root, with_other_bytes(image, run.root.parent), 1)[0]


def everything(run: RunFolder) -> dict[str, object]:
    """Return what of the run must never change: the bytes of its artifacts, and that they are fresh."""
    kinds = {each.name: each.state.kind for each in states(run, read_config(run), verify=True)}
    return {"kinds": kinds, "digests": digests(run)}


def test_added_images_are_found_and_have_clusters_and_the_run_stays_as_it_was(material: Path, run: RunFolder) -> None:
    before, image = everything(run), material / "more" / "stripes" / "class_1" / "1.png"
    assert nearest(run, image)["similarity"] < 0.99
    lines = added(run, material / "more")
    assert "2 of 27 files are in the collection already, or copies of others: passed over" in lines
    assert "additions/00001: 24 images of 3 domains, 1 rejected" in lines
    assert any(line.startswith("  rejected: discs/class_0/bad.png: not an image") for line in lines)
    assert "additions/index: 84 images can be found, flat (exact)" in lines
    assert lines[-1] == "additions: 24 images added, 0 removed"
    found = nearest(run, image)
    assert found["path"] == "stripes/class_1/1.png" and found["similarity"] > 0.99
    assert everything(run) == before
    assert call("status", run.root)[1][-1] == "additions: 24 images added, 0 removed"


def test_with_nothing_to_do_a_sentence_says_so(run: RunFolder) -> None:
    assert call("add", run.root) == (0, ["nothing to do: no image was added before; give new ones by --images"])


def test_the_collection_as_it_is_now_has_one_row_for_each_image_everywhere(material: Path, run: RunFolder) -> None:
    opened = grappa.open_run(run.root)
    before = opened.images()
    added(run, material / "more")
    pixels = before.index[3]
    assert call("remove", run.root, pixels)[0] == 0
    images, (embeddings, ids) = opened.images(live=True), opened.embeddings(live=True)
    assert list(images.index) == list(ids) and len(ids) == 60 - 1 + 24 and images.index.is_unique
    assert (images["addition"] == 1).sum() == 24 and pixels not in images.index
    assert all(Path(file).is_file() for file in images["file"]) and images["label"].notna().all()
    clusters = opened.assignments(live=True)
    assert list(clusters.index) == list(ids) and clusters["k00008"].between(0, 7).all()
    assert len(opened.embeddings("zero_shot", live=True)[0]) == 83
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-5)
    new = images.index[-1]
    near = opened.neighbors(new, 3, live=True)
    assert len(near) == 3 and new not in near.index
    assert opened.images().equals(before) and len(opened.embeddings()[1]) == 60
    with pytest.raises(ValueError, match="added images have no embeddings of heads/mean, but those of"):
        opened.embeddings("mean", live=True)
    assert set(opened.sample(83, live=True).index) == set(ids)


def test_added_images_get_what_a_run_of_all_images_gives_them(material: Path, run: RunFolder, tmp_path: Path) -> None:
    added(run, material / "more")
    whole = make_run(tmp_path / "whole", [material / "images", material / "more"], material / "weights.safetensors")
    run_all(whole, until="features")
    features = np.load(whole.artifact("features").path / "features.npy")
    rows = list(grappa.open_run(whole.root).images().index)
    here, ids = grappa.open_run(run.root).embeddings("zero_shot", live=True)
    np.testing.assert_allclose(here, features[[rows.index(image_id) for image_id in ids]], atol=2e-2)
    model, opened = grappa.load_model(run.root), grappa.open_run(run.root)
    images, (embeddings, _) = opened.images(live=True), opened.embeddings(live=True)
    from PIL import Image

    one = model(model.preprocess(Image.open(images["file"].iloc[-1])).unsqueeze(0)).numpy()[0]
    assert float(one @ embeddings[-1]) > 0.999


def test_the_same_call_again_adds_nothing(material: Path, run: RunFolder) -> None:
    added(run, material / "more")
    before = sorted(path.name for path in (run.root / "additions").iterdir())
    code, lines = call("add", run.root, "--images", material / "more")
    assert code == 0 and "26 of 27 files are in the collection already" in lines[0] and "nothing was added" in lines
    assert lines[1].startswith("the one new file cannot be used; first: discs/class_0/bad.png: not an image")
    assert call("add", run.root) == (0, ["additions: 24 images added, 0 removed"])
    assert sorted(path.name for path in (run.root / "additions").iterdir()) == before


def test_removed_images_are_not_found_until_they_are_added_again(material: Path, run: RunFolder) -> None:
    image = material / "images" / "discs" / "class_1" / "0.png"
    image_id = str(nearest(run, image)["image_id"])
    code, lines = call("remove", run.root, image)
    assert code == 0 and lines[-1] == "1 image removed; 59 left"
    assert nearest(run, image)["image_id"] != image_id
    for named in (image_id, image):
        told = (0, ["nothing to remove, 1 image had been removed before; 59 left"])
        assert call("remove", run.root, named) == told
    code, lines = call("remove", run.root, image, image.with_name("1.png"))
    assert code == 0 and lines[-1] == "1 image removed, 1 image had been removed before; 58 left"
    code, lines = call("remove", run.root, image.with_name("2.png"), "nobody", "nothing.png")
    told = f"grappa: there is no image 'nobody' (and 1 more) in {run.root}, so nothing was removed; "
    assert code == 1 and lines[-1].startswith(told)
    code, lines = call("add", run.root, "--images", image.parent, "--layout", "flat")
    assert code == 0 and "brought back: 2 images that had been removed" in lines
    assert nearest(run, image)["image_id"] == image_id


def test_an_added_image_that_was_removed_is_known_by_its_file(material: Path, run: RunFolder) -> None:
    added(run, material / "more")
    image = material / "more" / "stripes" / "class_1" / "1.png"
    assert call("remove", run.root, image)[1][-1] == "1 image removed; 83 left"
    assert call("remove", run.root, image) == (0, ["nothing to remove, 1 image had been removed before; 83 left"])


def test_removed_images_are_no_outliers(run: RunFolder, tmp_path: Path) -> None:
    ranked = grappa.open_run(run.root).outliers().index
    assert call("remove", run.root, ranked[0])[0] == 0
    code, lines = call("outliers", run.root, "--out", tmp_path / "outliers.parquet")
    assert code == 0 and lines[0].endswith(ranked[1]) and lines[-1].startswith("59 images, ")
    assert [*pd.read_parquet(tmp_path / "outliers.parquet")["image_id"]] == [*ranked[1:]]
    assert [*grappa.open_run(run.root).outliers().index] == [*ranked]


def test_a_collection_with_fewer_images_than_are_asked_for_gives_all(material: Path, run: RunFolder) -> None:
    kept = grappa.open_run(run.root).images().index[:4]
    assert call("remove", run.root, *grappa.open_run(run.root).images().index[4:])[0] == 0
    code, lines = call("search", run.root, material / "more" / "discs" / "class_0" / "0.png")
    assert code == 0 and {line.split()[-1] for line in lines} == {*kept}


def test_a_table_of_duplicates_names_what_is_removed(material: Path, run: RunFolder, tmp_path: Path) -> None:
    code, lines = call("duplicates", run.root, "--threshold", 0.99, "--out", tmp_path / "pairs.parquet")
    assert code == 0, lines
    groups = pd.read_parquet(tmp_path / "pairs.parquet").groupby("group")
    code, lines = call("remove", run.root, "--table", tmp_path / "pairs.parquet")
    removed = additions.removed_ids(run)
    assert code == 0 and removed and lines[-1].startswith(f"{len(removed)} images removed")
    assert grappa.open_run(run.root).duplicates(threshold=0.99, live=True).empty
    assert all(len({*group["image_id"], *group["other_id"]} - removed) >= 1 for _, group in groups)


def test_additions_of_another_model_are_never_searched_until_they_are_embedded_again(
    material: Path, run: RunFolder
) -> None:
    added(run, material / "more")
    image = material / "more" / "stripes" / "class_1" / "1.png"
    config = read_config(run)
    initialize(run.root, Request((), None, ["model.source=mean"], None), say=lambda line: None)
    run_all(run)
    assert additions.read_additions(run, config).ready == ()
    assert len(grappa.open_run(run.root).images(live=True)) == 60
    code, lines = call("search", run.root, with_other_bytes(image, run.root.parent), "-k", 1)
    assert code == 0 and "24 added images are not searched (input model: content changed)" in lines[0]
    assert f"`grappa add {run.root}`" in lines[0] and "class_1/1.png" not in lines[1].split("  ")[3:]
    code, lines = call("add", run.root)
    assert code == 0 and "additions/00001-vectors: 24 images embedded again" in lines[0]
    code, lines = call("search", run.root, with_other_bytes(image, run.root.parent), "-k", 1)
    assert code == 0 and len(lines) == 1 and "stripes/class_1/1.png" in lines[0]


@pytest.mark.parametrize("step", ["decode_all", "write_vectors", "write_index"])
def test_whatever_step_is_interrupted_nothing_half_is_there_and_the_same_call_goes_on(
    material: Path, run: RunFolder, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    module = {"decode_all": "grappa.images.ingest", "write_vectors": "grappa.pipeline.engine.live.embedding"}
    place = f"{module.get(step, 'grappa.pipeline.engine.live.indexing')}.{step}"

    def broken(*arguments: object, **named: object) -> None:
        raise OSError(5, "Input/output error")

    before = everything(run)
    with monkeypatch.context() as patch:
        patch.setattr(place, broken)
        assert call("add", run.root, "--images", material / "more")[0] == 1
    image = material / "more" / "stripes" / "class_1" / "1.png"
    assert nearest(run, image)["similarity"] < 0.99
    live = grappa.open_run(run.root).images(live=True)
    assert len(live) == len(grappa.open_run(run.root).embeddings(live=True)[1]) == (84 if step == "write_index" else 60)
    assert call("add", run.root, "--images", material / "more")[0] == 0
    assert nearest(run, image)["similarity"] > 0.99
    assert everything(run) == before
    assert not [path.name for path in (run.root / "additions").iterdir() if "partial" in path.name]


def test_a_run_that_learned_the_added_images_has_them_once(material: Path, run: RunFolder) -> None:
    added(run, material / "more")
    call("remove", run.root, nearest(run, material / "more" / "stripes" / "class_1" / "1.png")["image_id"])
    sources = [str(material / "images"), str(material / "more")]
    initialize(run.root, Request(sources, None, [], None), say=lambda line: None)
    run_all(run)
    assert call("add", run.root)[0] == 0
    opened = grappa.open_run(run.root)
    images = opened.images(live=True)
    assert images.index.is_unique and (images["addition"] == 0).all()
    assert len(images) == len(opened.images()) - 1 == len(opened.embeddings(live=True)[1])


def test_an_approximate_index_keeps_its_kind_and_its_recall_is_noted(material: Path, run: RunFolder) -> None:
    before = {each.name: each.state.kind for each in states(run, read_config(run))}
    initialize(run.root, Request((), None, ["index.kind=hnsw"], None), say=lambda line: None)
    stale = {each.name for each in states(run, read_config(run)) if each.state.kind != before[each.name]}
    assert stale == {"index"}
    lines = run_all(run)
    assert lines[-1].startswith("index: 60 images can be found, hnsw (recall@10 ")
    noted = run.artifact("index").manifest()
    assert noted and noted.provenance["resolved"]["kind"] == "hnsw"
    assert noted.provenance["resolved"]["recall_at_10"] > 0.9 and noted.provenance["resolved"]["index_bytes"] > 0
    added(run, material / "more")
    manifest = run.artifact(additions.INDEX).manifest()
    assert manifest and manifest.provenance["kind"] == "hnsw" and manifest.provenance["recall_at_10"] > 0.9
    assert nearest(run, material / "more" / "stripes" / "class_1" / "1.png")["similarity"] > 0.99


def test_an_index_made_before_there_were_kinds_is_fresh(run: RunFolder) -> None:
    manifest = run.artifact("index").manifest()
    assert manifest and set(manifest.fingerprint["config"]) == {"index.rows", "index.ivf_above"}


def test_nothing_is_added_while_model_and_index_are_of_different_models(material: Path, run: RunFolder) -> None:
    added(run, material / "more")
    initialize(run.root, Request((), None, ["model.source=mean"], None), say=lambda line: None)
    opened = grappa.open_run(run.root)
    with pytest.raises(ValueError, match="added images have no embeddings of heads/mean, but those of"):
        opened.embeddings(live=True)
    run_all(run, stage="model")
    code, lines = call("add", run.root)
    assert code == 1 and "the index is of fused; run `grappa run" in lines[-1]
    assert len(opened.embeddings(live=True)[1]) == 60


def test_images_of_another_size_are_not_embedded(material: Path, run: RunFolder) -> None:
    added(run, material / "more")
    initialize(run.root, Request((), None, ["images.cache_size=36"], None), say=lambda line: None)
    code, lines = call("add", run.root)
    assert code == 1 and "additions/00001 was decoded at images.cache_size 40, the run has 36 now" in lines[-1]
    assert len(grappa.open_run(run.root).images(live=True)) == 60


def test_far_images_say_that_adapting_again_is_worth_it(
    material: Path, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = embedding.drift
    monkeypatch.setattr(embedding, "drift", lambda distances, learned: real(distances + 1, learned))
    lines = added(run, material / "more")
    (line,) = [line for line in lines if line.startswith("drift: ")]
    assert line.startswith("drift: 24 of 24 images (100.0%, 95 % interval 86.2% to 100.0%)")
    assert "adapting again with them is worth it" in line


def test_a_damaged_addition_is_refused_and_made_again(material: Path, run: RunFolder) -> None:
    added(run, material / "more")
    file = run.root / "additions" / "00001-vectors" / "embeddings.npy"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"additions/00001-vectors .* is damaged .*repair it by `grappa add "):
        grappa.open_run(run.root).embeddings(live=True)
    assert call("add", run.root)[0] == 0
    assert len(grappa.open_run(run.root).embeddings(live=True)[1]) == 84
    table = run.root / "additions" / "00001" / "images.parquet"
    table.write_bytes(table.read_bytes()[:-1])
    code, lines = call("add", run.root)
    assert code == 1 and f"rm -r {run.root}/additions/00001*" in lines[-1]
    shutil.rmtree(run.root / "additions" / "00001")
    shutil.rmtree(run.root / "additions" / "00001-vectors")
    assert added(run, material / "more")[-1] == "additions: 24 images added, 0 removed"


def test_bad_input_is_one_sentence_and_changes_nothing(material: Path, run: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "one.png").write_bytes(b"x")
    unfinished = make_run(tmp_path / "unfinished", [material / "images"], material / "weights.safetensors")
    (tmp_path / "ids.csv").write_text("name\n1\n")
    every_id = list(grappa.open_run(run.root).images().index)
    cases = [
        (["add", run.root, "--images", tmp_path / "empty"], "holds no files"),
        (["add", run.root, "--images", tmp_path / "bad"], "one.png lies directly in"),
        (
            ["add", run.root, "--images", tmp_path / "bad", "--layout", "flat"],
            "the one new file cannot be used; first: one.png",
        ),
        (["add", run.root, "--images", tmp_path / "nothing"], "no such folder or table"),
        (["add", unfinished.root, "--images", material / "more"], "images is missing in"),
        (["add", tmp_path, "--images", material / "more"], "is not a run folder"),
        (["remove", run.root], "no image is named"),
        (["remove", run.root, "nobody"], "there is no image 'nobody'"),
        (["remove", run.root, *every_id], "at least one must stay, so nothing was removed"),
        (["remove", run.root, "--table", tmp_path / "ids.csv"], "has no column image_id; found name"),
        (["remove", run.root, "--table", tmp_path / "ids.txt"], "is no table"),
        (["remove", run.root, "--table", tmp_path / "gone.csv"], "there is no table"),
    ]
    for words, sentence in cases:
        code, lines = call(*words)
        assert code == 1 and sentence in lines[-1], (words, lines)
    assert len(grappa.open_run(run.root).images(live=True)) == 60
    assert call("status", run.root)[1] == ["44 artifacts: 44 fresh"]


def test_two_processes_do_not_add_at_the_same_time(material: Path, run: RunFolder) -> None:
    (run.root / "additions").mkdir()
    with acquire(run.root / "additions" / "lock", what="x"):
        code, lines = call("add", run.root, "--images", material / "more")
    assert code == 1 and "the additions of" in lines[-1] and "is being written by process" in lines[-1]
    assert not [path for path in (run.root / "additions").iterdir() if path.is_dir()]


def test_the_list_of_removed_images_is_plain_json(run: RunFolder) -> None:
    image_id = grappa.open_run(run.root).images().index[0]
    call("remove", run.root, image_id)
    content = json.loads((run.root / "additions" / "removed" / "removed.json").read_text())
    assert content == {"image_ids": [image_id]}
