"""`images.cache`: whole runs with a raw cache, one of JPEGs and none; what is read from them, and what `auto` is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image
from sklearn.metrics import adjusted_rand_score
from typer.testing import CliRunner

from grappa.images.files import ImagesChangedError
from grappa.pipeline.cli import app
from grappa.pipeline.commands.init import Request, initialize
from grappa.pipeline.commands.model_input import MOST_RAW_BYTES, settle_cache
from grappa.pipeline.commands.search import search
from grappa.pipeline.config.schema import Config, identity_settings
from grappa.pipeline.config.yaml_file import ConfigError, load_config
from grappa.pipeline.engine.status import read_config, states
from grappa.pipeline.opening import published_pixels
from grappa.pipeline.pages.explore.thumbnails import NoPictureError, Thumbnails
from grappa.pipeline.pages.report.pictures import Pictures
from grappa.pipeline.store import work
from grappa.pipeline.store.artifacts import RunFolder
from tests.helpers.tiny import digests, draw_images, make_run, run_all, with_other_bytes, write_weights

FORMS = ("raw", "jpeg", "none")
COSINE, SAME_CLUSTERS = 0.99, 0.9  # of JPEG against raw: the least cosine of an image's features; adjusted Rand index


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("forms")
    draw_images(folder / "images", num_images=3)
    draw_images(folder / "more", num_classes=1, num_images=2, seed=9)
    write_weights(folder / "weights.safetensors")
    return folder


@pytest.fixture(scope="module")
def runs(material: Path) -> dict[str, RunFolder]:
    """A finished run of each form, with trainings that read the images' views and the object views."""
    found = {}
    for form in FORMS:
        found[form] = make_run(
            material / form,
            [material / "images"],
            material / "weights.safetensors",
            images__cache=form,
            objects__provider="backbone",
            adaptors__object_weight=0.5,
            adaptors__num_epochs=1,
            student__object_share=0.5,
        )
        run_all(found[form])
    return found


@pytest.fixture
def copied(runs: dict[str, RunFolder], material: Path, tmp_path: Path) -> RunFolder:
    """A copy of the run without a cache, and of its images, which moved: the run knows their new place."""
    shutil.copytree(runs["none"].root, tmp_path / "run")
    shutil.copytree(material / "images", tmp_path / "moved")
    initialize(tmp_path / "run", Request([str(tmp_path / "moved")]), say=lambda line: None)
    return RunFolder.open(tmp_path / "run")


def features(run: RunFolder, stage: str = "features") -> np.ndarray:
    return np.load(run.root / stage / "features.npy")


def test_without_a_cache_all_results_have_the_bytes_of_a_raw_one(runs: dict[str, RunFolder]) -> None:
    raw, none = digests(runs["raw"]), digests(runs["none"])
    held = {name for name in {*raw, *none} if "/pixels/" in name or name.endswith("row_digests.npy")}
    assert {name: raw[name] for name in raw if name not in held} == {
        name: none[name] for name in none if name not in held
    }
    assert {name for name in none if "/pixels/" in name} == {
        f"{stage}/pixels/{file}" for stage in ("images", "objects") for file in ("originals.parquet", "originals.json")
    }


def test_from_jpeg_the_images_are_the_same_and_clusters_and_features_nearly(runs: dict[str, RunFolder]) -> None:
    raw, jpeg = runs["raw"], runs["jpeg"]
    for name in ("images/images.parquet", "images/labels.parquet", "images/rejected.parquet"):
        assert (raw.root / name).read_bytes() == (jpeg.root / name).read_bytes()
    assert float((features(raw) * features(jpeg)).sum(1).min()) >= COSINE
    views = (features(raw, "object_features") * features(jpeg, "object_features")).sum(1)
    assert float(np.median(views)) >= COSINE  # a box that the backbone sees elsewhere gives another view
    for name in ("k00004", "k00008"):
        labels = [pd.read_parquet(each.root / "clusters" / name / "assignments.parquet") for each in (raw, jpeg)]
        column = labels[0].columns[1]
        assert adjusted_rand_score(labels[0][column], labels[1][column]) >= SAME_CLUSTERS
    index = np.load(jpeg.root / "images/pixels/index.npy")
    assert index.shape == (36, 5)


@pytest.mark.parametrize("form", FORMS)
def test_added_images_and_thumbnails_are_read_from_each_form(
    runs: dict[str, RunFolder], material: Path, tmp_path: Path, form: str
) -> None:
    run = RunFolder.open(Path(shutil.copytree(runs[form].root, tmp_path / "run")))
    done = CliRunner().invoke(app, ["add", str(run.root), "--images", str(material / "more")])
    assert done.exit_code == 0, done.output
    image = material / "more" / "stripes" / "class_0" / "1.png"
    nearest = search(run.root, with_other_bytes(image, tmp_path), 1)[0]
    assert nearest["path"] == "stripes/class_0/1.png" and nearest["similarity"] > 0.98
    (tmp_path / "page").mkdir()
    pictures = Pictures(run, tmp_path / "page")
    pictures.check([3])
    with Image.open(tmp_path / "page" / pictures.image(3)) as picture:
        assert picture.format == "JPEG" and picture.height == 40
    assert Thumbnails(published_pixels(run)).small(3)[:2] == b"\xff\xd8"


def test_originals_that_moved_are_read_where_they_are_now(copied: RunFolder, material: Path, tmp_path: Path) -> None:
    before = digests(copied)
    (copied.root / "features").rename(tmp_path / "away")
    run_all(copied, until="features")
    assert digests(copied) == before
    images = pd.read_parquet(copied.root / "images" / "images.parquet")
    victim = tmp_path / "moved" / images["path"][5]
    shutil.copy(tmp_path / "moved" / images["path"][6], victim)
    shutil.rmtree(copied.root / "features")
    with pytest.raises(ImagesChangedError, match=rf"moved/.*{victim.name} has other bytes than were decoded"):
        run_all(copied, until="features")
    with pytest.raises(NoPictureError, match="has other bytes than were decoded"):
        Thumbnails(published_pixels(copied)).whole(5)


# ---------------------------------------------------------------- identity


def test_a_raw_run_has_the_fingerprints_of_runs_before_the_setting(runs: dict[str, RunFolder], tmp_path: Path) -> None:
    run = RunFolder.open(Path(shutil.copytree(runs["raw"].root, tmp_path / "run")))
    recipe = json.loads((run.root / "images" / "manifest.json").read_text())["recipe"]
    assert sorted(recipe["config"]) == ["images.cache_size", "images.max_pixels", "images.shard_size"]
    text = run.config_path.read_text()
    kept = [line for line in text.splitlines() if not line.startswith("  cache:")]
    assert len(kept) == len(text.splitlines()) - 1
    run.config_path.write_text("\n".join(kept))
    assert read_config(run).images.form == "raw"
    assert {each.state.kind for each in states(run, read_config(run), verify=True)} == {"fresh"}


def test_another_form_makes_the_images_stale(runs: dict[str, RunFolder], tmp_path: Path) -> None:
    run = RunFolder.open(Path(shutil.copytree(runs["raw"].root, tmp_path / "run")))
    initialize(run.root, Request(assignments=["images.cache=jpeg"]), say=lambda line: None)
    found = {each.name: each.state for each in states(run, read_config(run))}
    assert found["images"].kind == "stale" and "images.cache" in str(found["images"].reasons)
    assert found["objects"].kind == "stale"


@pytest.mark.parametrize("value", ["auto", "raw", "jpeg", "none"])
def test_only_raw_is_left_out_of_fingerprints(value: str) -> None:
    config = Config.model_validate({"images": {"cache": value}})
    for names in (("images",), ("images.cache",)):
        assert identity_settings(config, names).get("images.cache") == (None if value == "raw" else value)


# ---------------------------------------------------------------- auto


def sized(**images: object) -> Config:
    return Config.model_validate({"images": {"cache_size": 250, **images}})


def test_auto_is_raw_until_the_cache_is_large_and_an_existing_form_stays() -> None:
    fitting = int(MOST_RAW_BYTES / (250**2 * 4))
    assert settle_cache(sized(), fitting, None).images.form == "raw"
    assert settle_cache(sized(), fitting + 1, None).images.form == "jpeg"
    assert settle_cache(sized(), 10 * fitting, sized(cache="raw")).images.form == "raw"
    assert settle_cache(sized(), 10, sized(cache="jpeg")).images.form == "jpeg"
    assert settle_cache(sized(cache="none"), 10, sized(cache="jpeg")).images.form == "none"


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ("auto", "keeps 40 px of an image's shorter side, about 0 MB or less (images.cache is raw)"),
        (
            "jpeg",
            "40 px of an image's shorter side as JPEG, about 0 MB or less (images.cache is jpeg; raw: 0 MB)",
        ),
        ("none", "no pixels are kept (images.cache is none): the 36 originals are decoded at each reading"),
    ],
)
def test_init_says_which_form_it_is_and_what_it_takes(material: Path, tmp_path: Path, form: str, said: str) -> None:
    lines: list[str] = []
    request = [f"images.cache={form}", "images.cache_size=40", f"backbone.weights={material / 'weights.safetensors'}"]
    initialize(tmp_path / "run", Request([str(material / "images")], None, request), say=lines.append)
    assert any(said in line for line in lines), lines
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["images"]["cache"]
    assert written == ("raw" if form == "auto" else form)


def test_a_form_that_is_not_settled_is_refused(runs: dict[str, RunFolder], tmp_path: Path) -> None:
    run = RunFolder.open(Path(shutil.copytree(runs["raw"].root, tmp_path / "run")))
    run.config_path.write_text(run.config_path.read_text().replace("  cache: raw", "  cache: auto"))
    assert load_config(run.config_path).images.cache == "auto"
    with pytest.raises(ConfigError, match="images.cache is still `auto`; `grappa init .*` resolves it"):
        read_config(run)


# ---------------------------------------------------------------- publishing


def test_publishing_reads_no_shard_that_was_written_now(
    runs: dict[str, RunFolder], material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run", [material / "images"], material / "weights.safetensors", images__cache="jpeg")
    read: list[str] = []
    original = work.read_digest

    def recorded(path: Path) -> tuple[int, str]:
        read.append(path.name)
        return original(path)

    monkeypatch.setattr(work, "read_digest", recorded)
    run_all(run, stage="images")
    assert sorted(read) == ["images.parquet", "index.npy", "labels.parquet", "rejected.parquet"]
    assert not run.artifact("images").check(verify=True)
    found = {name: digest for name, digest in digests(run).items() if name.startswith("images/")}
    assert found.items() <= digests(runs["jpeg"]).items()


def test_a_shard_that_changed_after_it_was_written_is_read(tmp_path: Path) -> None:
    artifact = RunFolder.create(tmp_path / "run").artifact("images")
    recipe = {"stage": "images", "instance": None, "version": 1, "config": {}, "inputs": {}}
    with work.open_work(artifact, recipe) as making:
        file = making.path / "00000.npy"
        file.write_bytes(b"what was written")
        making.written(file, {"bytes": 16, "sha256": "0" * 64})
        file.write_bytes(b"what was written later")
        manifest = making.publish({})
    assert manifest.outputs["00000.npy"]["bytes"] == 22
    assert not artifact.check(verify=True)
