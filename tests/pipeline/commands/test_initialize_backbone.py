"""`grappa init` and the backbone: its weights, its input, and the pixel cache that fits it."""

from __future__ import annotations

from pathlib import Path

import pytest

from grappa.pipeline.config.yaml_file import ConfigError
from grappa.pipeline.engine.status import read_config
from grappa.pipeline.store.artifacts import RunFolder
from tests.pipeline.commands.desk import Desk, made


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


def test_a_cached_model_that_does_not_do_is_said_with_the_reason(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = desk.folder / "cache" / "models--somebody--some-model"
    (cache / "snapshots" / "abc").mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache.parent))
    for name in ("a.safetensors", "b.safetensors"):
        (cache / "snapshots" / "abc" / name).touch()
    desk.new("backbone.weights=hf-hub:somebody/some-model")
    (line,) = (line for line in desk.said if "come from the hub" in line)
    assert "HF_HUB_OFFLINE forbids it (its cache, " in line
    assert "holds several weight files (a.safetensors, b.safetensors)" in line
    (cache / "snapshots" / "abc" / "b.safetensors").unlink()
    desk.init()
    assert not any("come from the hub" in line for line in desk.said)


def test_weights_may_be_a_folder_or_lie_in_the_home_folder(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(desk.folder))
    (desk.folder / "model").mkdir()
    (desk.folder / "model" / "model.safetensors").write_bytes(b"")
    for given in ("~/model", f"local-dir:{desk.folder / 'model'}"):
        assert desk.new(f"backbone.weights={given}").backbone.weights == str(desk.folder / "model")
    (desk.folder / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"backbone\.weights: .*empty holds no weight file"):
        desk.init(assignments=["backbone.weights=~/empty/"])


@pytest.mark.parametrize("place", ["weights.safetensors", "folder"])
def test_weights_that_are_gone_leave_a_finished_run_fresh_and_are_said(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def warnings() -> list[str]:
        return [line for line in desk.said if line.startswith("warning: ") and "weight" in line]

    fakes, given = made(desk, monkeypatch), desk.folder / place
    file = given if given.suffix else given / "model.safetensors"
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(place.encode())
    desk.init(assignments=[f"backbone.weights={given}"])
    fakes.settings = desk.config.model_dump(mode="json")
    fakes.execute()
    assert not warnings()
    file.unlink()
    assert set(desk.states().values()) == {"fresh"}
    desk.init()
    (line,) = warnings()
    what = "which is no file" if given.suffix else "holds no weight file, expected model.safetensors"
    assert str(given) in line and what in line and "; the run has a copy, so it is needed only" in line
    assert desk.said[-1] == "all is fresh"
    desk.init(assignments=["backbone.mean=[0.5, 0.5, 0.5]"])
    (line,) = warnings()
    assert what in line and "has a copy" not in line


def test_weights_that_may_not_be_read_any_more_are_said(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    made(desk, monkeypatch)

    def files_of(weights: str) -> list[Path]:
        raise PermissionError(13, "Permission denied", weights)

    monkeypatch.setattr("grappa.pipeline.engine.externals.files_of", files_of)
    desk.init()
    assert any("Permission denied" in line and "the run has a copy" in line for line in desk.said)
    assert desk.said[-1] == "all is fresh"


def test_other_weights_in_a_folder_are_others(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    fakes, given = made(desk, monkeypatch), desk.folder / "folder"
    given.mkdir()
    (given / "a.pth").write_bytes(b"weights")
    desk.init(assignments=[f"backbone.weights={given}"])
    fakes.settings = desk.config.model_dump(mode="json")
    fakes.execute()
    (given / "a.pth").unlink()
    for name in ("b.pth", "c.pth"):
        (given / name).write_bytes(b"weights")
    assert "stale: backbone.weights: " in desk.states()["backbone"]


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


def test_weights_that_are_not_there_are_refused(desk: Desk) -> None:
    with pytest.raises(ConfigError, match=r"backbone\.weights: no such file .*nowhere\.safetensors"):
        desk.new("backbone.weights=/nowhere.safetensors")
