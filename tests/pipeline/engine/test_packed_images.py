"""A run on images in tars and in a Parquet file: the same images and clusters as from their files, and what is said."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest

from grappa.pipeline.commands.embed import embed
from grappa.pipeline.engine.sources import changed_files
from grappa.pipeline.store.artifacts import RunFolder
from tests.helpers.shards import write_images, write_tar
from tests.helpers.tiny import draw_images, make_run, run_all, write_weights

FORMS = ("files", "tars", "parquet")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunFolder]:
    desk = tmp_path_factory.mktemp("desk")
    weights, root = write_weights(desk / "weights.safetensors"), draw_images(desk / "files", num_images=3)
    named = {str(file.relative_to(root)): file.read_bytes() for file in sorted(root.rglob("*.png"))}
    for shard in range(2):
        write_tar(desk / "tars" / f"{shard:05d}.tar", dict(list(named.items())[shard::2]))
    above = [name.split("/") for name in named]
    write_images(
        desk / "parquet" / "images.parquet",
        list(named.values()),
        [f"class_{number}" for number in range(4)],
        domain=[each[0] for each in above],
        label=pa.array([int(each[1][-1]) for each in above]),
    )
    found = {}
    for form in FORMS:
        found[form] = make_run(desk / f"run_{form}", [desk / form], weights)
        run_all(found[form], until="clusters")
    return found


def table(run: RunFolder, name: str, file: str) -> pd.DataFrame:
    return pd.read_parquet(run.artifact(name).home / file)


@pytest.mark.parametrize("form", FORMS[1:])
def test_the_form_of_the_images_changes_no_id_and_no_cluster(runs: dict[str, RunFolder], form: str) -> None:
    for name, file, columns in (
        ("images", "images.parquet", ["image_id", "sha256", "domain", "height", "width"]),
        ("images", "labels.parquet", ["image_id", "label"]),
        ("clusters/k00004", "assignments.parquet", ["image_id", "pseudo_label"]),
        ("clusters/k00008", "assignments.parquet", ["image_id", "pseudo_label"]),
    ):
        expected, found = table(runs["files"], name, file), table(runs[form], name, file)
        columns = [each for each in columns if each in expected]
        assert len(columns) > 1
        pd.testing.assert_frame_equal(found[columns], expected[columns])


def test_a_run_on_packed_images_is_read_again_and_compared(runs: dict[str, RunFolder]) -> None:
    for form in FORMS:
        assert changed_files(runs[form]) == []
    tar = Path(table(runs["tars"], "sources", "sources.parquet")["path"][0].partition("::")[0])
    assert tar == Path("00000.tar")
    file = runs["tars"].root.parent / "tars" / tar
    data = file.read_bytes()
    file.write_bytes(data[:600] + bytes([data[600] ^ 1]) + data[601:])
    changed = changed_files(runs["tars"])
    file.write_bytes(data)
    assert len(changed) == 1 and changed[0].endswith("other content than was decoded")
    assert "sources.parquet" in {path.name for path in runs["files"].artifact("sources").home.iterdir()}
    assert "offset" not in table(runs["files"], "sources", "sources.parquet")
    assert "offset" not in table(runs["files"], "images", "images.parquet")


def test_embedding_packed_images_is_refused_in_one_sentence(
    runs: dict[str, RunFolder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grappa.pipeline.commands.embed.load_model", lambda _: None)
    with pytest.raises(ValueError, match=r"00000.tar::.* is no local file: `grappa embed` reads local files only"):
        embed(runs["tars"].root, runs["tars"].root.parent / "tars", tmp_path / "out")
