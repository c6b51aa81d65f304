"""`grappa init`: new runs, changed runs, artifacts reused, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from grappa.pipeline.commands.init import resolve_num_clusters
from grappa.pipeline.config.schema import Config
from grappa.pipeline.config.yaml_file import ConfigError
from grappa.pipeline.engine.status import states
from grappa.pipeline.graph.stages import STAGES
from grappa.pipeline.store.artifacts import RunFolder, RunFolderError
from tests.pipeline.commands.desk import Desk, made


def test_a_new_run_has_a_listing_and_an_explicit_configuration(desk: Desk) -> None:
    config = desk.new()
    assert config == desk.config
    assert config.clusters.num_clusters == (2, 3)
    assert config.images.sources == (str(desk.images),)
    assert len(desk.listing()) == 16
    assert desk.said[0] == "16 images of 2 domains, no split: birds 6, cars 10"
    assert desk.said[-1].startswith("44 artifacts: 44 missing; next: grappa run ")


def test_relative_paths_become_absolute(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(desk.folder)
    (desk.folder / "vit.safetensors").write_bytes(b"")
    config = desk.init(images=["images"], assignments=["backbone.weights=vit.safetensors"])
    assert config.images.sources == (str(desk.images),)
    assert config.backbone.weights == str(desk.folder / "vit.safetensors")


def test_only_train_rows_count_for_the_number_of_clusters(desk: Desk) -> None:
    table = desk.folder / "table.csv"
    rows = [f"images/cars/class/{n}.png,cars,{'test' if n < 4 else 'train' if n < 9 else ''}" for n in range(10)]
    table.write_text("\n".join(["path,domain,split", *rows]))
    config = desk.init(images=[str(table)])
    assert config.clusters.num_clusters == (2,)
    assert desk.said[0] == "10 images of 1 domain, 6 train (1 without a split) and 4 test: cars 10"


@pytest.mark.parametrize("again", ["copy of {}", "much longer copy of {}"])
def test_copies_count_once_for_the_number_of_clusters(desk: Desk, again: str) -> None:
    alone = desk.new().clusters.num_clusters
    for file in sorted((desk.images / "birds/class").glob("*.png")):
        for number in range(9):
            (file.parent / (again.format(number) + file.name)).write_bytes(file.read_bytes())
    assert desk.init(desk.folder / "other", images=[str(desk.images)]).clusters.num_clusters == alone
    assert desk.said[0].startswith("70 images")
    with pytest.raises(ConfigError, match="only 16 of 70 train images differ, the others are copies; give at least 18"):
        desk.init(assignments=["clusters.num_clusters=[9]"])


def test_init_again_keeps_everything_and_finds_new_images(desk: Desk) -> None:
    desk.new("clusters.num_clusters=[2, 4]", "fusion.seed=3")
    before = desk.digest
    desk.init()
    assert desk.digest == before
    assert "0 images added, 0 removed" in desk.said
    desk.add("birds/class/new.png")
    (desk.images / "cars/class/0.png").unlink()
    desk.init()
    assert "1 images added, 1 removed" in desk.said
    assert desk.digest != before
    assert desk.config.clusters.num_clusters == (2, 4) and desk.config.fusion.seed == 3


def test_set_changes_one_value_on_top_of_the_edited_file(desk: Desk) -> None:
    desk.new()
    path = desk.root / "config.yaml"
    path.write_text(path.read_text().replace("num_iterations: 20", "num_iterations: 7"))
    config = desk.init(assignments=["clusters.seed=5"])
    assert (config.clusters.num_iterations, config.clusters.seed) == (7, 5)


def test_a_preset_lies_under_the_assignments(desk: Desk) -> None:
    config = desk.init(images=[str(desk.images)], config="small", assignments=["images.cache_size=99"])
    assert config.backbone.image_size == 128
    assert config.images.cache_size == 99


def test_a_preset_replaces_the_other_one_as_a_whole(desk: Desk) -> None:
    weights = desk.folder / "vit.safetensors"
    weights.write_bytes(b"")
    given = [f"backbone.weights={weights}", "fusion.seed=3", "images.max_rejected=0.5"]
    desk.init(images=[str(desk.images)], config="small", assignments=given)
    found = desk.init(config="grappa")
    other = desk.init(desk.folder / "other", images=[str(desk.images)], config="grappa")
    assert found.images.max_rejected == 0.5 and found.images.sources == other.images.sources
    assert found.model_dump(exclude={"images"}) == other.model_dump(exclude={"images"})
    assert found.images.cache_size == other.images.cache_size


def test_what_a_preset_changes_is_said(desk: Desk) -> None:
    desk.init(images=[str(desk.images)], config="small", assignments=["fusion.seed=3"])
    desk.init(config="small")
    assert "changed by the preset: fusion.seed 3 -> 0" in desk.said
    desk.init(config="small")
    assert not any("changed by the preset" in line for line in desk.said)
    desk.init(assignments=[f"{name}.seed=3" for name in "fusion student heads views clusters evaluation".split()])
    desk.init(config="small_dva")
    (line,) = (line for line in desk.said if line.startswith("changed by the preset: "))
    assert "objects.provider none -> backbone" in line and " more" in line


def test_a_preset_of_the_same_backbone_keeps_the_file_of_its_weights(desk: Desk) -> None:
    weights = desk.folder / "vit.safetensors"
    weights.write_bytes(b"")
    desk.init(images=[str(desk.images)], config="small", assignments=[f"backbone.weights={weights}"])
    own = desk.folder / "own.yaml"
    own.write_text("backbone: {name: vit_tiny_patch16_224, image_size: 96}\n")
    assert desk.init(config=str(own)).backbone.weights == str(weights)
    own.write_text("backbone: {name: vit_tiny_patch16_224, options: {depth: 4}}\n")
    assert desk.init(config=str(own)).backbone.weights is None


def test_a_file_replaces_what_a_preset_said(desk: Desk) -> None:
    desk.init(images=[str(desk.images)], config="small")
    own = desk.folder / "own.yaml"
    own.write_text("fusion: {seed: 5}\n")
    config = desk.init(config=str(own))
    settled = {"images", "clusters", "neighbors", "fusion"}
    assert config.model_dump(exclude=settled) == Config().model_dump(exclude=settled)
    assert config.fusion.seed == 5


def test_auto_is_resolved_again_when_asked(desk: Desk) -> None:
    desk.new("clusters.num_clusters=[2]")
    assert desk.init().clusters.num_clusters == (2,)
    assert desk.init(assignments=["clusters.num_clusters=auto"]).clusters.num_clusters == (2, 3)


def test_a_bound_of_automatic_granularities_is_said_where_it_changes_them(desk: Desk) -> None:
    def said() -> list[str]:
        return [line for line in desk.said if "clusters.max_clusters" in line]

    assert desk.new().clusters.num_clusters == (2, 3) and not said()
    again = ["clusters.num_clusters=auto", "clusters.max_clusters=2"]
    assert desk.init(assignments=again).clusters.num_clusters == (2,)
    (line,) = said()
    assert line.startswith("the finest granularity has 2 clusters, without the bound clusters.max_clusters=2 it would ")
    assert line.endswith(
        "have 3; for another bound: --set clusters.num_clusters=auto --set clusters.max_clusters=NUMBER"
    )
    assert desk.init().clusters.num_clusters == (2,) and not said(), "numbers that are settled stay"
    assert desk.init(assignments=["clusters.num_clusters=[2, 3]"]).clusters.num_clusters == (2, 3) and not said()
    assert desk.init(assignments=["clusters.num_clusters=auto", "clusters.max_clusters=null"]) and not said()
    assert desk.config.clusters.num_clusters == (2, 3)


def test_a_moved_root_changes_the_provenance_only(desk: Desk) -> None:
    desk.new()
    before = desk.digest
    moved = desk.images.rename(desk.folder / "moved")
    desk.init(images=[str(moved)])
    assert desk.digest == before
    assert "0 images added, 0 removed" in desk.said
    manifest = RunFolder.open(desk.root).artifact("sources").manifest()
    assert manifest and manifest.provenance["roots"] == [str(moved)]
    assert desk.config.images.sources == (str(moved),)


def test_it_says_what_becomes_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(tmp_path)
    fakes = made(desk, monkeypatch)
    desk.init(assignments=["fusion.seed=1"])
    assert "fusion/neighbors is stale: config fusion.seed: 0 -> 1" in desk.said
    (following,) = (line for line in desk.said if "follow" in line)
    assert following.startswith(
        "15 artifacts follow (`grappa status --long` names all): student, embeddings 2, views 2"
    )
    assert not any(line.startswith("index") for line in desk.said)
    assert fakes.root == desk.root


def test_artifacts_with_the_same_fingerprint_are_taken_over(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    made(desk, monkeypatch)
    other = desk.folder / "other"
    config = desk.init(other, other=desk.root, assignments=["fusion.seed=1"])
    assert config.clusters.num_clusters == (2, 4)
    taken = next(line for line in desk.said if line.startswith("reused"))
    assert "adaptors/k00004" in taken and "embeddings/mean" in taken and "fusion" not in taken
    found = {each.name: str(each.state) for each in states(RunFolder.open(other), config, verify=True)}
    assert {name for name, state in found.items() if state != "fresh"} == {
        *("fusion/neighbors", "student", "embeddings/fused", "embeddings/student", "heads/fused", "heads/student"),
        *("views/fused", "views/student", "verdict", "model", "evaluation", "index", "attention/neighbors"),
        *("retrieval/fused", "retrieval/fused_raw", "retrieval/student"),
    }
    manifest = RunFolder.open(other).artifact("features").manifest()
    assert manifest and manifest.provenance["taken_from"] == str(desk.root / "features")
    assert os.path.samefile(other / "features/features.npy", desk.root / "features/features.npy")


def test_nothing_stale_is_taken_over(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    made(desk, monkeypatch)
    desk.init(assignments=["clusters.seed=1"])
    other = desk.folder / "other"
    desk.init(other, other=desk.root)
    taken = next(line for line in desk.said if line.startswith("reused"))
    assert "features" in taken and "clusters" not in taken and "adaptors" not in taken


def test_what_is_stale_there_but_wanted_here_is_taken_over(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    made(desk, monkeypatch)
    desk.init(assignments=["clusters.seed=1"])
    other = desk.folder / "other"
    config = desk.init(other, other=desk.root, assignments=["clusters.seed=0"])
    assert {str(each.state) for each in states(RunFolder.open(other), config, verify=True)} == {"fresh"}


def test_a_preset_named_beside_from_begins_with_the_defaults(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    made(desk, monkeypatch)
    config = desk.init(desk.folder / "other", other=desk.root, config="small")
    assert config.images.sources == (str(desk.images),)
    assert config.clusters.num_clusters == (2, 3)


def test_more_clusters_than_half_the_train_images_are_refused(desk: Desk) -> None:
    with pytest.raises(ConfigError, match="9 clusters are more than half of the 16 train images; give at most 8"):
        desk.new("clusters.num_clusters=[2, 9]")
    assert not desk.root.exists(), "everything is checked before anything is written"
    with pytest.raises(ConfigError, match="found 3 train images, expected at least 4"):
        resolve_num_clusters(Config(), 3)


def test_a_run_needs_images(desk: Desk) -> None:
    with pytest.raises(ConfigError, match="no images given; name a folder"):
        desk.init()


def test_a_folder_with_other_files_is_no_place_for_a_run(desk: Desk) -> None:
    desk.root.mkdir()
    (desk.root / "thesis.tex").write_text("precious")
    with pytest.raises(RunFolderError, match="holds other files"):
        desk.new()
    assert [path.name for path in desk.root.iterdir()] == ["thesis.tex"]


def test_a_run_of_a_newer_version_is_refused(desk: Desk) -> None:
    desk.new()
    (desk.root / "run.json").write_text('{"format": 99}')
    with pytest.raises(RunFolderError, match="update grappa"):
        desk.init()


def test_an_error_in_the_file_names_the_file_and_changes_nothing(desk: Desk) -> None:
    desk.new()
    path = desk.root / "config.yaml"
    path.write_text(path.read_text().replace("num_iterations", "num_iteration"))
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=r"config\.yaml: unknown key clusters\.num_iteration: did you mean"):
        desk.init(assignments=["fusion.seed=1"])
    assert path.read_bytes() == before
    with pytest.raises(ConfigError, match="^--set: unknown key"):
        desk.init(desk.folder / "other", images=[str(desk.images)], assignments=["fusion.sed=1"])


def test_a_crash_in_the_middle_of_init_is_mended_by_init(desk: Desk) -> None:
    desk.new()
    (desk.root / "config.yaml").unlink()
    config = desk.new("fusion.seed=1")
    assert config == desk.config and config.fusion.seed == 1


def test_labels_are_no_part_of_what_is_trained_on() -> None:
    """Only the evaluation reads labels.parquet."""
    config = Config.model_validate({"clusters": {"num_clusters": [2]}})
    readers = {
        stage.name
        for stage in STAGES
        for instance in stage.instances(config)
        for each in stage.inputs(config, instance)
        if "labels.parquet" in each.files
    }
    assert readers == {"retrieval", "evaluation"}
