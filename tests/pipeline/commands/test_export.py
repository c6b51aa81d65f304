"""`grappa export`: the folder's model card, its provenance, and that a changed byte is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

import grappa
from grappa.model import ModelError
from grappa.pipeline.cli import app
from grappa.pipeline.commands.card import _base_model, _without_paths
from grappa.pipeline.commands.export import export
from grappa.pipeline.commands.search import onnx_notice, search
from grappa.pipeline.config.schema import Backbone, Config
from grappa.pipeline.config.section import Place
from grappa.pipeline.config.yaml_file import dump_config
from grappa.pipeline.store.artifacts import RunFolder
from tests.helpers.tiny import draw_images, make_run, run_all, split_of, write_table, write_weights


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("material")


@pytest.fixture(scope="module")
def run(material: Path) -> RunFolder:
    images = draw_images(material / "images")
    labels = {"label": lambda path: path.parent.name, "split": split_of}
    table = write_table(images, material / "images.csv", **labels)
    made = make_run(material / "run", [table], write_weights(material / "weights.safetensors"))
    run_all(made)
    return made


@pytest.fixture(scope="module")
def folder(run: RunFolder, material: Path) -> Path:
    export(run.root, material / "model")
    return material / "model"


def front_matter(folder: Path) -> dict[str, object]:
    _, head, _ = (folder / "README.md").read_text().split("---\n", 2)
    found: dict[str, object] = yaml.safe_load(head)
    return found


def test_the_card_has_what_the_hub_reads_and_people_ask(folder: Path, run: RunFolder, material: Path) -> None:
    card = (folder / "README.md").read_text()
    head = front_matter(folder)
    assert head["library_name"] == "grappa" and head["pipeline_tag"] == "image-feature-extraction"
    assert "license" not in head and "base_model" not in head  # the weights are a file: nothing is known of them
    assert "licence of the base model (weights: the file weights.safetensors) is not known" in card
    assert "checks 10, discs 10, stripes 10" in card and "30 images of 3 domain(s)" in card  # the train images
    assert "| domain | gain | over |" in card and "95 % interval" in card and "**fused**" not in card
    assert "## Did adaptation help?" in card and "num_clusters:" in card
    assert str(material) not in card and str(material) not in (folder / "model.json").read_text()


def test_the_same_run_gives_the_same_bytes(folder: Path, run: RunFolder, tmp_path: Path) -> None:
    export(run.root, tmp_path / "again")
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


@pytest.mark.parametrize(
    ("settings", "repository", "licence"),
    [
        ({"name": "vit_small_patch14_dinov2.lvd142m"}, "timm/vit_small_patch14_dinov2.lvd142m", "apache-2.0"),
        ({"name": "vit_small_patch16_dinov3.lvd1689m"}, "timm/vit_small_patch16_dinov3.lvd1689m", "dinov3-license"),
        ({"weights": "hf-hub:somebody/some-model@v1"}, "somebody/some-model", ""),
        ({"weights": "/home/me/secret/w.bin"}, "", ""),
    ],
)
def test_base_model_and_licence_are_what_is_known(settings: dict[str, str], repository: str, licence: str) -> None:
    found = _base_model(Config(backbone=Backbone(**settings)))
    assert (found.repository, found.licence) == (repository, licence)
    assert "secret" not in found.weights


def test_model_json_says_where_the_model_came_from(folder: Path, run: RunFolder) -> None:
    record = json.loads((folder / "model.json").read_text())
    assert set(record["provenance"]) >= {"grappa", "commit", "base_model", "base_license", "verdict"}
    assert record["provenance"]["model"] == "fused" and record["provenance"]["images"]["discs"] == 10
    assert len(record["weights_sha256"]) == 64 and record["weights_sha256"] in (folder / "README.md").read_text()


def test_a_changed_byte_of_the_weights_is_refused(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    data = bytearray((copy / "weights.safetensors").read_bytes())
    data[-5] ^= 1
    (copy / "weights.safetensors").write_bytes(data)
    with pytest.raises(ModelError, match="is not the file that was exported: its sha256 begins with"):
        grappa.load_model(copy)


@pytest.mark.parametrize(
    ("name", "value"), [("weights_sha256", "abc"), ("weights_sha256", 7), ("provenance", []), ("more", 1)]
)
def test_values_of_no_meaning_are_refused(folder: Path, tmp_path: Path, name: str, value: object) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    record = json.loads((copy / "model.json").read_text()) | {name: value}
    (copy / "model.json").write_text(json.dumps(record))
    with pytest.raises(ModelError, match="keys" if name == "more" else name):
        grappa.load_model(copy)


def test_folders_without_digest_and_provenance_still_open(folder: Path, run: RunFolder, tmp_path: Path) -> None:
    former = tmp_path / "former"
    former.mkdir()
    for name in ("model.json", "weights.safetensors"):  # the run's own artifact is as folders were before
        shutil.copyfile(run.root / "model" / name, former / name)
    assert "provenance" not in json.loads((former / "model.json").read_text())
    image = np.zeros((40, 40, 3), np.uint8)
    np.testing.assert_array_equal(grappa.load_model(former).encode([image]), grappa.load_model(folder).encode([image]))


def test_without_an_evaluation_the_card_says_so(run: RunFolder, tmp_path: Path) -> None:
    copy = shutil.copytree(run.root, tmp_path / "run", symlinks=True)
    shutil.rmtree(copy / "evaluation")
    done = CliRunner().invoke(app, ["export", str(copy), str(tmp_path / "model")])
    assert done.exit_code == 0 and "no numbers on the card: evaluation is missing" in " ".join(done.output.split())
    card = (tmp_path / "model" / "README.md").read_text()
    assert "None: the run had no labelled test images, or no evaluation of this very model." in card
    assert str(tmp_path) not in card


def test_without_results_of_single_queries_the_card_leaves_intervals_out(run: RunFolder, tmp_path: Path) -> None:
    copy = shutil.copytree(run.root, tmp_path / "run", symlinks=True)
    (copy / "evaluation" / "per_query.parquet").unlink()
    done = CliRunner().invoke(app, ["export", str(copy), str(tmp_path / "model")])
    assert done.exit_code == 0, done.output
    assert "no gains and intervals on the card: evaluation/per_query.parquet is gone" in " ".join(done.output.split())
    card = (tmp_path / "model" / "README.md").read_text()
    assert "| `fused` |" in card or "| fused |" in card
    assert "Gains and intervals are not told" in card and "95 % interval (" not in card
    assert str(tmp_path) not in card
    (copy / "evaluation" / "metrics.csv").write_text("model\n")
    done = CliRunner().invoke(app, ["export", str(copy), str(tmp_path / "other")])
    assert done.exit_code == 1 and "is damaged (metrics.csv: 6 bytes" in " ".join(done.output.split())


def test_settings_on_the_card_name_no_folder_of_this_machine() -> None:
    sources = ["/home/me/photos", "https://me:word@host/a.tar?key=secret"]
    settings = {
        "images": {"sources": sources, "domains": ["birds=/home/me/birds"]},
        "objects": {"provider": "grounding_dino", "model": "/home/me/detector"},
        "backbone": {"weights": "/home/me/w.bin"},
    }
    text = dump_config(_without_paths(Config.model_validate(settings)))
    assert not any(each in text for each in ("/home", "secret", "word@")) and "a.tar" in text
    assert "birds=birds" in text and "model: detector" in text


def test_no_setting_that_is_a_path_is_on_the_card_as_it_is() -> None:
    given = {
        name: {field: "/home/me/x"}
        for name, section in Config()
        for field, info in type(section).model_fields.items()
        if info.annotation == Place | None
    }
    assert given.keys() == {"backbone", "clusters", "objects"}
    assert "/home" not in dump_config(_without_paths(Config.model_validate(given)))


def test_numbers_of_a_former_head_are_not_on_the_card(run: RunFolder, material: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run.root, tmp_path / "run", symlinks=True)
    run_all(make_run(copy, [], material / "weights.safetensors", heads__deviation_power=0.3), until="model")
    done = CliRunner().invoke(app, ["export", str(copy), str(tmp_path / "model")])
    said = " ".join(done.output.split())
    assert done.exit_code == 0 and "no numbers on the card" in said and "heads/fused was made again in between" in said


def test_onnx_comes_with_its_preprocessing_and_a_card(run: RunFolder, folder: Path, tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} (extra onnx) is not installed")
    done = CliRunner().invoke(app, ["export", str(run.root), str(tmp_path / "model"), "--format", "onnx"])
    said = " ".join(done.output.split())
    assert done.exit_code == 0 and "differs from torch by" in said and "ms an image alone" in said and " MB" in said
    names = sorted(path.name for path in (tmp_path / "model").iterdir())
    assert names == ["README.md", "model.onnx", "preprocessing.json"]
    assert "onnx" in str(front_matter(tmp_path / "model")["tags"])
    assert "InferenceSession" in (tmp_path / "model" / "README.md").read_text()


SEARCHED = """
import json, sys
from pathlib import Path
from grappa.pipeline.commands.search import search
print(json.dumps(search(Path(sys.argv[1]), Path(sys.argv[2]), 5)))
print(sorted({"torch", "timm", "pandas"} & set(sys.modules)))
"""


def test_search_takes_the_onnx_file_of_the_run_and_no_torch(run: RunFolder, material: Path, tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} (extra onnx) is not installed")
    image, copy = next((material / "images" / "discs").rglob("*.png")), tmp_path / "run"
    shutil.copytree(run.root, copy)
    wanted = search(copy, image, 5)
    assert onnx_notice(copy) == ""
    export(copy, copy / "onnx", format="onnx")
    assert onnx_notice(copy) == ""
    done = subprocess.run([sys.executable, "-c", SEARCHED, copy, image], capture_output=True, text=True, check=True)
    found, loaded = done.stdout.splitlines()
    assert loaded == "[]"
    for one, other in zip(json.loads(found), wanted, strict=True):
        assert one["similarity"] == pytest.approx(other["similarity"], abs=1e-4)
        assert {**one, "similarity": 0} == {**other, "similarity": 0}
    (copy / "onnx" / "model.onnx").write_bytes(b"another graph")
    assert "is not used (model.onnx is not the file that was exported)" in onnx_notice(copy)
    assert search(copy, image, 5) == wanted


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--format", "torchscript"], "torch has given it up for torch.export"),
        (["--format", "tflite"], "the format is 'tflite'; expected safetensors or onnx"),
        (["--half"], "--half is for --format onnx"),
    ],
)
def test_other_formats_are_refused_in_a_sentence(
    run: RunFolder, tmp_path: Path, options: list[str], sentence: str
) -> None:
    done = CliRunner().invoke(app, ["export", str(run.root), str(tmp_path / "model"), *options])
    assert done.exit_code != 0 and sentence in " ".join(done.output.split())
    assert list(tmp_path.iterdir()) == []
