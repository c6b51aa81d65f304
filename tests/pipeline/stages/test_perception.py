"""Runs that learn from object views: sets, students, clusters and rows on what lies in the table's boxes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from grappa.objects.backgrounds import Backgrounds
from grappa.pipeline import tables
from grappa.pipeline.config.yaml_file import ConfigError
from grappa.pipeline.engine.status import read_config, states
from grappa.pipeline.store.artifacts import RunFolder
from tests.helpers.tiny import digests, draw_images, make_run, run_all, split_of, tiny_cache, write_table, write_weights

BOX = {"box_x0": "10", "box_y0": "6", "box_x1": "40", "box_y1": "36"}
LEARNED = {
    "adaptors__object_weight": 1.0,
    "adaptors__transfer_weight": 1.0,
    "adaptors__background_weight": 0.5,
    "objects__provider": "columns",
}


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn images; every second one has a box."""
    folder = tmp_path_factory.mktemp("material")
    draw_images(folder / "images")
    write_weights(folder / "weights.safetensors")
    boxes = {name: lambda path, value=value: value if int(path.stem) % 2 == 0 else "" for name, value in BOX.items()}
    label = {"label": lambda path: path.parent.name, "split": split_of}
    write_table(folder / "images", folder / "table.csv", **label, **boxes)
    return folder


def _make(folder: Path, material: Path, **changes: object) -> RunFolder:
    return make_run(folder, [material / "table.csv"], material / "weights.safetensors", **changes)


@pytest.fixture(scope="module")
def plain(material: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    made = _make(tmp_path_factory.mktemp("runs") / "plain", material)
    run_all(made, until="student")
    return digests(made)


@pytest.fixture(scope="module")
def run(material: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    made = _make(
        tmp_path_factory.mktemp("runs") / "run",
        material,
        **LEARNED,
        clusters__view="objects",
        student__object_share=0.5,
        evaluation__extra_rows="[zero_shot_objects, adapted_objects]",
    )
    run_all(made)
    return made


def test_a_run_with_object_views_is_whole(run: RunFolder) -> None:
    assert {each.state.kind for each in states(run, read_config(run)) if each.name.split("/")[0] != "attention"} == {
        "fresh"
    }
    curves = tables.learning_curves(run.root)
    told = {name for name in ("object_accuracy", "transfer") if name in set(curves.get("metric", curves.columns))}
    assert told == {"object_accuracy", "transfer"}
    models = set(tables.load_metrics(run.root)["model"])
    assert {"zero_shot_objects", "fused_objects"} <= models
    embeddings = {row: np.load(run.root / "embeddings" / row / "embeddings.npy") for row in ("fused", "fused_objects")}
    boxed = pd.read_parquet(run.root / "objects" / "objects.parquet")["accepted"].to_numpy()
    same = np.isclose(embeddings["fused"], embeddings["fused_objects"], atol=1e-2).all(axis=1)
    assert 0 < boxed.sum() < len(boxed)
    assert same[~boxed].all(), "without an accepted box the object view is the image"
    assert not same[boxed].all()


def test_each_weight_changes_what_reads_it_and_no_more(material: Path, tmp_path: Path, plain: dict[str, str]) -> None:
    ways = {
        "object": {"adaptors__object_weight": 1.0},
        "transfer": {"adaptors__transfer_weight": 1.0},
        "background": {"adaptors__background_weight": 1.0},
        "share": {"student__object_share": 1.0},
        "clusters": {"clusters__view": "objects"},
    }
    first = {"share": "student/student.safetensors", "clusters": "clusters/k00004/assignments.parquet"}
    for name, change in ways.items():
        made = _make(tmp_path / name, material, objects__provider="columns", **change)
        changed = first.get(name, "adaptors/k00004/adaptors.safetensors")
        run_all(made, until=changed.split("/")[0])
        found = digests(made)
        assert found[changed] != plain[changed], name
        before = [key for key in plain if key.split("/")[0] in ("images", "features", "neighbors")]
        assert all(found[key] == plain[key] for key in before), name


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"adaptors__object_weight": 1.0}, "adaptors.object_weight"),
        ({"student__object_share": 0.5}, "student.object_share"),
        ({"clusters__view": "objects"}, "clusters.view=objects"),
        ({"evaluation__extra_rows": "[adapted_objects]"}, "the model adapted_objects"),
    ],
)
def test_object_views_from_nobody_are_refused(
    change: dict[str, object], what: str, material: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        ConfigError, match=f"^--set: {what} needs object views, but objects.provider is none; set it to"
    ):
        _make(tmp_path / "run", material, **change)


def test_backgrounds_are_the_images_with_their_boxes_painted_over(tmp_path: Path) -> None:
    cache = tiny_cache(tmp_path / "pixels", 3)
    boxes = np.array([[20.0, 16.0, 60.0, 48.0], [np.nan] * 4, [0.0, 0.0, 96.0, 80.0]])
    views = Backgrounds(cache, boxes, np.array([[80, 96]] * 3))
    assert views.known.tolist() == [True, False, True]
    assert len(views) == 3
    painted, whole = views.image(0), cache.image(0)
    inside = np.zeros(whole.shape[:2], dtype=bool)
    inside[8:24, 10:30] = True
    assert (painted[inside] == painted[8, 10]).all()
    assert np.array_equal(painted[~inside], whole[~inside])
    assert np.array_equal(views.image(1), cache.image(1))
    assert (views.image(2) == views.image(2)[0, 0]).all()
    assert Image.fromarray(painted).size == (48, 40)
