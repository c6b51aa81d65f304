"""`grappa init`: new runs, changed runs, artifacts reused, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from grappa.pipeline.commands.init import Request, initialize, resolve_num_clusters
from grappa.pipeline.config.schema import Config
from grappa.pipeline.config.yaml_file import ConfigError, load_config
from grappa.pipeline.engine.sources import published_listing
from grappa.pipeline.engine.status import read_config, states
from grappa.pipeline.graph.stages import STAGES
from grappa.pipeline.store.artifacts import RunFolder, RunFolderError
from tests.helpers.fake_stages import FakeStages, fake_stages


class Desk:
    """A folder of listed files (nothing is decoded here) and a run to be."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.root, self.images = folder, folder / "run", folder / "images"
        self.said: list[str] = []
        for domain, count in {"birds": 6, "cars": 10}.items():
            for number in range(count):
                self.add(f"{domain}/class/{number}.png")

    def add(self, path: str) -> None:
        file = self.images / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(path.encode())

    def init(self, root: Path | None = None, **request: Any) -> Config:
        self.said.clear()
        return initialize(root or self.root, Request(**request), say=self.said.append)

    def new(self, *assignments: str) -> Config:
        return self.init(images=[str(self.images)], assignments=assignments)

    def listing(self) -> pd.DataFrame:
        listing = published_listing(RunFolder.open(self.root))
        assert listing is not None
        return listing

    def states(self) -> dict[str, str]:
        return {each.name: str(each.state) for each in states(RunFolder.open(self.root), self.config)}

    @property
    def config(self) -> Config:
        return load_config(self.root / "config.yaml")

    @property
    def digest(self) -> str:
        manifest = RunFolder.open(self.root).artifact("sources").manifest()
        assert manifest
        return manifest.outputs["sources.parquet"]["sha256"]


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    return Desk(tmp_path)


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


def test_a_hub_out_of_reach_is_said_with_the_way_out(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    def warnings() -> list[str]:
        return [line for line in desk.said if line.startswith("warning: backbone.weights names no file")]

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    desk.new()
    assert warnings()[0].endswith("HF_HUB_OFFLINE forbids it; give a file by --set backbone.weights=FILE")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://localhost:1")
    monkeypatch.setattr("urllib.request.getproxies", dict)
    desk.init()
    assert "but localhost cannot be reached from here" in warnings()[0]
    monkeypatch.setattr("urllib.request.getproxies", lambda: {"https": "http://proxy"})
    desk.init()
    assert not warnings()


def test_weights_named_on_the_hub_are_kept_as_they_are_named(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(desk.folder / "cache"))
    config = desk.new("backbone.weights=hf-hub:somebody/some-model")
    assert config.backbone.weights == "hf-hub:somebody/some-model"
    (line,) = (line for line in desk.said if "come from the hub" in line)
    assert line.startswith("warning: backbone.weights is hf-hub:somebody/some-model")
    assert line.endswith("HF_HUB_OFFLINE forbids it; give a file by --set backbone.weights=FILE")


def test_weights_may_be_a_folder_or_lie_in_the_home_folder(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(desk.folder))
    (desk.folder / "model").mkdir()
    (desk.folder / "model" / "model.safetensors").write_bytes(b"")
    for given in ("~/model", f"local-dir:{desk.folder / 'model'}"):
        assert desk.new(f"backbone.weights={given}").backbone.weights == str(desk.folder / "model")
    (desk.folder / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"backbone\.weights: .*empty holds no weight file"):
        desk.init(assignments=["backbone.weights=~/empty/"])


def test_a_name_of_the_hub_given_as_a_file_is_answered_by_how_to_write_it(desk: Desk) -> None:
    with pytest.raises(ConfigError, match="or hf-hub:facebook/dinov2-small for a model of the hub"):
        desk.new("backbone.weights=facebook/dinov2-small")


def test_what_the_hubs_cache_holds_needs_no_hub(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = desk.folder / "cache"
    (cache / "models--timm--vit_small_patch16_224.dino" / "snapshots" / "abc").mkdir(parents=True)
    (cache / "models--timm--vit_small_patch16_224.dino" / "snapshots" / "abc" / "model.safetensors").touch()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    desk.new()
    assert not any("come from the hub" in line for line in desk.said)


def test_a_backbone_that_cannot_be_one_is_refused(desk: Desk) -> None:
    with pytest.raises(
        ConfigError, match=r"backbone\.name: timm has no model called 'resnet-50'; did you mean resnet50"
    ):
        desk.new("backbone.name=resnet-50")
    assert not desk.root.exists()


@pytest.mark.parametrize(
    ("assignments", "sentence"),
    [
        (["backbone.image_size=230"], "image_size is 230, no multiple of the 16 pixels .* set it to 224 or 240"),
        (["backbone.options={patch_size: 8}", "backbone.image_size=100"], "set it to 96 or 104"),
        (["backbone.options={num_classes: 10}"], "option num_classes cannot be set"),
        (["backbone.options={global_pool: avg}"], "option global_pool cannot be set"),
        (["backbone.options={in_chans: 1}"], "option in_chans cannot be set"),
        (["backbone.options={tempo: 1}"], "has no option 'tempo'"),
        (["backbone.name=volo_d5_512.sail_in1k"], "set backbone.crop_fraction=1"),
        (["backbone.name=vit_base_patch16_sapiens2.fb"], "1024 x 768 pixels, not square"),
    ],
)
def test_an_input_that_does_not_fit_the_backbone_is_refused(desk: Desk, assignments: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        desk.new(*assignments)
    assert not desk.root.exists()


def test_what_a_run_has_is_not_judged_again(desk: Desk) -> None:
    desk.new()
    path = desk.root / "config.yaml"
    path.write_text(path.read_text().replace("image_size: null", "image_size: 230"))
    assert desk.init(assignments=["fusion.seed=1"]).backbone.image_size == 230
    with pytest.raises(ConfigError, match="set it to 224 or 240"):
        desk.init(assignments=["backbone.crop_fraction=1"])


@pytest.mark.parametrize(
    ("assignments", "side"),
    [
        ([], 249),
        (["backbone.crop_fraction=0.875"], 256),
        (["backbone.image_size=96", "backbone.crop_fraction=1"], 96),
        (["backbone.name=vit_base_patch14_dinov2.lvd142m"], 518),
        (["backbone.name=resnet50.a1_in1k"], 236),
    ],
)
def test_the_pixel_cache_fits_what_the_backbone_sees(desk: Desk, assignments: list[str], side: int) -> None:
    assert desk.new(*assignments).images.cache_size == side
    assert any(f"the pixel cache keeps {side} px of an image's shorter side" in line for line in desk.said)
    assert not any("enlarged images" in line for line in desk.said)


def test_a_cache_that_is_too_small_for_the_backbone_is_a_warning(desk: Desk) -> None:
    desk.new("images.cache_size=256")
    assert not any("enlarged images" in line for line in desk.said)
    desk.init(assignments=["backbone.name=vit_small_patch14_dinov2.lvd142m"])
    assert any("518 px input, 1369 patches, 5.3 times those at 224 px; the pixel" in line for line in desk.said)
    assert any(line.startswith("warning: images.cache_size is 256, but the backbone sees 518") for line in desk.said)
    assert desk.config.images.cache_size == 256
    desk.init(assignments=["images.cache_size=auto"])
    assert desk.config.images.cache_size == 518 and not any("enlarged images" in line for line in desk.said)


def test_decoded_images_that_are_large_enough_are_kept(desk: Desk) -> None:
    desk.new("images.cache_size=256")  # as it was once in every run
    assert desk.init(config="grappa").images.cache_size == 256
    assert desk.init(assignments=["images.cache_size=auto"]).images.cache_size == 256
    assert desk.init(desk.folder / "new", images=[str(desk.images)], other=desk.root, config="grappa").images == (
        desk.config.images
    )
    assert desk.init(config="dinov2").images.cache_size == 224
    assert desk.init(config="grappa").images.cache_size == 249


def test_a_cache_that_is_still_auto_asks_for_init(desk: Desk) -> None:
    desk.new()
    path = desk.root / "config.yaml"
    path.write_text(path.read_text().replace("cache_size: 249", "cache_size: auto"))
    with pytest.raises(ConfigError, match=r"images\.cache_size is still `auto`; `grappa init .* resolves it"):
        read_config(RunFolder.open(desk.root))
    assert desk.init().images.cache_size == 249


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


def made(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> FakeStages:
    """Make a complete run at ``desk.root`` with fake stages."""
    fakes = fake_stages(desk.folder / "spare", monkeypatch)
    desk.new(f"backbone.weights={desk.folder / 'weights.safetensors'}", "clusters.num_clusters=[2, 4]")
    fakes.root, fakes.run = desk.root, RunFolder.open(desk.root)
    fakes.settings = desk.config.model_dump(mode="json")
    fakes.execute()
    return fakes


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


def test_a_listing_with_a_flipped_byte_is_listed_anew(desk: Desk) -> None:
    """Its rows may still be read as before: the damaged bytes must not get a digest that makes them right."""
    desk.new()
    before, path = desk.digest, desk.root / "sources" / "sources.parquet"
    content = path.read_bytes()
    for place in range(0, len(content), 97):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        desk.init()
        assert (desk.digest, path.read_bytes()) == (before, content)


def test_one_image_in_a_domain_is_a_warning(desk: Desk) -> None:
    desk.add("planes/class/0.png")
    desk.new()
    assert any(line.startswith("warning: domain planes has one image only") for line in desk.said)


def test_many_domains_are_named_in_one_line(desk: Desk) -> None:
    rows = [f"images/birds/class/{n}.png,d{n:03d}" for n in range(300)]
    for number in range(6, 300):
        desk.add(f"birds/class/{number}.png")
    (desk.folder / "table.csv").write_text("\n".join(["path,domain", *rows]))
    desk.init(images=[str(desk.folder / "table.csv")])
    assert desk.said[0].endswith("d010 1, d011 1, and 288 more")
    warnings = [line for line in desk.said if line.startswith("warning: ") and "image" in line]
    assert warnings == [
        "warning: 300 domains have one image only, such as d000: a query there has nothing to find",
    ]


def test_the_layout_is_recognised_said_and_kept(desk: Desk) -> None:
    config = desk.new()
    assert config.images.layout == "domain/class"
    assert desk.said[1].startswith(f"{desk.images} is read as DOMAIN/CLASS/image, 2 classes (--layout domain/class); ")
    for number in range(6):
        desk.add(f"test/class/{number}.png")
    desk.init()
    assert any(line.startswith("warning: images of test are learned from; if it is a split") for line in desk.said)
    assert not any("is read as" in line for line in desk.said)
    assert desk.init(layout="flat").images.layout == "flat"
    assert desk.said[0] == "22 images of 1 domain, no split: images 22"


def test_images_of_a_test_folder_are_not_learned_from(desk: Desk) -> None:
    root = desk.folder / "split"
    for name in ("train/robin", "train/wren", "val/robin", "test/wren"):
        for number in range(4):
            desk.add(f"../split/{name}/{number}.png")
    config = desk.init(images=[str(root)])
    assert config.images.layout == "split/class"
    assert desk.said[0] == "16 images of 1 domain, 8 train and 8 test: split 16"
    assert config.clusters.num_clusters == (2,)
    assert not any("are learned from" in line for line in desk.said)
    for layout in ("domain/class", "class", "flat"):
        desk.init(layout=layout)
        assert any(line.startswith("warning: images of test are learned from") for line in desk.said), layout
    rows = [f"{name}/{number}.png,birds" for name in ("train/robin", "test/wren") for number in range(4)]
    (root / "table.csv").write_text("\n".join(["path,domain", *rows]))
    desk.init(desk.folder / "other", images=[str(root / "table.csv")])
    assert any(line.startswith("warning: images of test are learned from") for line in desk.said)


def test_domains_are_given_their_folders(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(desk.folder)
    config = desk.init(domains=["vögel=images/birds", "autos=images/cars"])
    assert config.images.domains == (f"vögel={desk.images}/birds", f"autos={desk.images}/cars")
    assert desk.said[0] == "16 images of 2 domains, no split: autos 10, vögel 6"
    assert set(desk.listing()["label"]) == {"class"}
    with pytest.raises(ConfigError, match=r"--domain: images.domains: found 'birds'; give NAME=DIR"):
        desk.init(domains=["birds"])


def test_an_edited_layout_asks_for_init(desk: Desk) -> None:
    desk.new()
    path = desk.root / "config.yaml"
    path.write_text(path.read_text().replace("layout: domain/class", "layout: flat"))
    assert desk.states()["images"].startswith("missing")
    desk.init()
    assert desk.said[0] == "16 images of 1 domain, no split: images 16"


def test_a_run_from_before_layouts_is_read_as_it_was(desk: Desk) -> None:
    for number in range(6):
        desk.add(f"d{number}/0.png")
    for name in ("birds", "cars"):
        (desk.images / name).rename(desk.folder / name)
    desk.new("images.layout=domain/class")
    before = desk.digest
    path = desk.root / "config.yaml"
    path.write_text("".join(line for line in path.read_text().splitlines(True) if "layout:" not in line))
    desk.init()
    assert (desk.digest, desk.config.images.layout) == (before, "domain/class")


def test_missing_files_are_counted_and_more_than_a_run_allows_are_refused(desk: Desk) -> None:
    rows = [f"images/cars/class/{n}.png,cars" for n in range(10)] + ["images\\cars\\class\\1.png,cars"]
    table = desk.folder / "table.csv"
    table.write_text("\n".join(["path,domain", *rows]))
    with pytest.raises(ValueError, match=r"^1 of 11 files are missing, .* \(it has backslashes.*allows 5%"):
        desk.init(images=[str(table)])
    assert not desk.root.exists()
    desk.init(images=[str(table)], assignments=["images.max_rejected=0.2"])
    assert any(line.startswith("warning: 1 of 11 files are missing") for line in desk.said)


def test_a_run_within_its_images_is_none_of_them(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.root = desk.images / "runs" / "mine"
    made(desk, monkeypatch)
    desk.init(assignments=["fusion.seed=1"])
    assert "0 images added, 0 removed" in desk.said
    assert "passed over: 1 folder (runs/mine 1)" in desk.said
    assert desk.states()["images"] == "fresh"


def test_more_clusters_than_half_the_train_images_are_refused(desk: Desk) -> None:
    with pytest.raises(ConfigError, match="9 clusters are more than half of the 16 train images; give at most 8"):
        desk.new("clusters.num_clusters=[2, 9]")
    assert not desk.root.exists(), "everything is checked before anything is written"
    with pytest.raises(ConfigError, match="found 3 train images, expected at least 4"):
        resolve_num_clusters(Config(), 3)


def test_a_run_needs_images(desk: Desk) -> None:
    with pytest.raises(ConfigError, match="no images given; name a folder"):
        desk.init()


def test_an_empty_folder_and_a_missing_one_are_refused(desk: Desk) -> None:
    (desk.folder / "empty").mkdir()
    for name in ("empty", "nowhere"):
        with pytest.raises(ValueError, match=name):
            desk.init(images=[str(desk.folder / name)])
    assert not desk.root.exists()


def test_a_table_without_path_is_refused(desk: Desk) -> None:
    (desk.folder / "table.csv").write_text("file,domain\na.png,birds\n")
    with pytest.raises(ValueError, match="no column `path`"):
        desk.init(images=[str(desk.folder / "table.csv")])


def test_weights_that_are_not_there_are_refused(desk: Desk) -> None:
    with pytest.raises(ConfigError, match=r"backbone\.weights: no such file .*nowhere\.safetensors"):
        desk.new("backbone.weights=/nowhere.safetensors")


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


def test_names_with_odd_bytes_quotes_and_length_work(desk: Desk) -> None:
    odd = desk.folder / os.fsdecode(b"caf\xe9 'it\"s' # {x}: " + b"l" * 200)
    (odd / "birds").mkdir(parents=True)
    for number in range(4):
        (odd / "birds" / os.fsdecode(b"\xff%d.png" % number)).write_bytes(b"%d" % number)
    config = desk.init(images=[str(odd)])
    assert config.images.sources == (str(odd),)
    assert desk.config == config
    desk.init()
    assert "0 images added, 0 removed" in desk.said


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


@pytest.mark.parametrize("assignments", [[], ["clusters.num_clusters=[4, 8]"]])
def test_few_images_are_said_and_many_are_not(desk: Desk, assignments: list[str]) -> None:
    def warnings() -> list[str]:
        desk.said.clear()
        desk.init(images=[str(desk.images)], assignments=assignments)
        return [line for line in desk.said if "are few" in line]

    (before,) = warnings()
    assert before.startswith("warning: 16 different train images are few (below 300)")
    for number in range(300):
        desk.add(f"cars/more-{number}.png")
    assert warnings() == []
