from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

import grappa.pipeline.demo
from grappa.pipeline.demo import digits, objects, textures
from grappa.pipeline.demo.dataset import DOMAINS, Domain, draw_image, split_of, write_demo_images

every_domain = pytest.mark.parametrize("domain", DOMAINS, ids=lambda domain: domain.name)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demo_images(tmp_path_factory.mktemp("images"), num_images_per_class=2)


def rows_of(table: Path) -> list[dict[str, str]]:
    with table.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def contents(table: Path) -> dict[str, bytes]:
    return {row["path"]: (table.parent / row["path"]).read_bytes() for row in rows_of(table)}


def test_the_table_lists_every_image_with_its_class_and_split(table: Path) -> None:
    rows = rows_of(table)
    assert list(rows[0]) == ["path", "domain", "label", "split"]
    assert {row["path"] for row in rows} == {str(p.relative_to(table.parent)) for p in table.parent.rglob("*.png")}
    assert set(Counter((row["domain"], row["label"]) for row in rows).values()) == {2}
    assert Counter(row["domain"] for row in rows) == {domain.name: 48 for domain in DOMAINS}


def test_half_the_classes_train_and_the_others_test(table: Path) -> None:
    splits = {(row["domain"], row["label"], row["split"]) for row in rows_of(table)}
    assert len(splits) == len({(domain, label) for domain, label, _ in splits})  # no class on both sides
    assert set(Counter((domain, split) for domain, _, split in splits).values()) == {12}


def test_images_are_small_rgb_pictures_that_differ(table: Path) -> None:
    for path in (table.parent / row["path"] for row in rows_of(table)):
        with Image.open(path) as image:
            assert (image.size, image.mode) == ((64, 64), "RGB")
            assert np.asarray(image).std() > 3
    files = contents(table)
    assert len(set(files.values())) == len(files)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(table: Path, tmp_path: Path) -> None:
    again = write_demo_images(tmp_path / "again", num_images_per_class=2)
    assert again.read_bytes() == table.read_bytes()
    assert contents(again) == contents(table)
    domain, label = DOMAINS[0], DOMAINS[0].demo_classes[0]
    drawn = [draw_image(domain, label, 0, purpose=p, seed=s) for p, s in (("demo", 0), ("demo", 1), ("pretraining", 0))]
    assert not any(np.array_equal(drawn[a], drawn[b]) for a, b in ((0, 1), (0, 2), (1, 2)))


def test_an_image_depends_on_its_own_name_only(table: Path) -> None:
    domain = DOMAINS[2]
    label = domain.demo_classes[5]
    alone = draw_image(domain, label, 1, purpose="demo", seed=0)
    with Image.open(table.parent / domain.name / label / "001.png") as image:
        assert np.array_equal(np.asarray(image), alone)


def test_a_class_of_one_image_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 2"):
        write_demo_images(tmp_path, num_images_per_class=1)


@every_domain
def test_pretraining_classes_are_no_demo_classes(domain: Domain) -> None:
    assert len(domain.demo_classes) == len(set(domain.demo_classes)) >= 20
    assert len(domain.pretraining_classes) == len(set(domain.pretraining_classes)) > 2 * len(domain.demo_classes)
    assert not set(domain.demo_classes) & set(domain.pretraining_classes)
    assert {split_of(domain, label) for label in domain.demo_classes} == {"train", "test"}


@every_domain
def test_every_pretraining_class_can_be_drawn(domain: Domain) -> None:
    for label in domain.pretraining_classes[::7]:
        image = draw_image(domain, label, 0, purpose="pretraining", seed=1)
        assert image.shape == (64, 64, 3)
        assert image.dtype == np.uint8


def test_pretraining_digits_are_other_handwriting() -> None:
    ours, theirs = digits.DEMO_CLASSES[0], digits.PRETRAINING_CLASSES[0]
    for digit in range(10):
        demo = {sample.tobytes() for sample in digits.samples(digit, ours)}
        assert len(demo) > 50
        assert not demo & {sample.tobytes() for sample in digits.samples(digit, theirs)}


def test_pretraining_textures_and_objects_are_made_otherwise() -> None:
    demo = {textures.parameters(label) for label in textures.DEMO_CLASSES}
    assert not demo & {textures.parameters(label) for label in textures.PRETRAINING_CLASSES}
    made = {objects.parts(label) for label in (*objects.DEMO_CLASSES, *objects.PRETRAINING_CLASSES)}
    assert len(made) == len(objects.DEMO_CLASSES) + len(objects.PRETRAINING_CLASSES)


def test_renderings_of_a_thing_share_its_identity_only() -> None:
    domain, label = DOMAINS[0], DOMAINS[0].pretraining_classes[0]
    drawn = [draw_image(domain, label, 0, purpose="pretraining", seed=1, rendering=number) for number in (0, 0, 1)]
    first, again, second = drawn
    assert np.array_equal(first, again)
    assert not np.array_equal(first, second)


def test_pretraining_learns_and_saves(tmp_path: Path) -> None:
    from grappa.pipeline.demo import pretrain

    settings = pretrain.Pretraining(num_things_per_domain=8, num_renderings=2, num_steps=2, batch_size=8)
    losses: list[float] = []
    backbone = pretrain.pretrain(settings, lambda step, loss, backbone: losses.append(loss))
    pretrain.save(backbone, tmp_path / "vit.safetensors", settings=settings, seconds=1.0, final_loss=losses[-1])
    assert np.isfinite(losses).all()
    assert len(losses) == 2
    assert json.loads((tmp_path / "vit.json").read_text(encoding="utf-8"))["settings"]["num_steps"] == 2
    with safe_open(tmp_path / "vit.safetensors", "pt") as file:
        assert set(file.keys()) == set(pretrain.create_vit().model.state_dict())


def test_the_loss_is_small_when_partners_match_and_large_when_they_do_not() -> None:
    import torch

    from grappa.pipeline.demo.pretrain import nt_xent

    views = torch.eye(8)
    assert nt_xent(views, views, temperature=0.1) < 0.01
    assert nt_xent(views, views.roll(1, dims=0), temperature=0.1) > 5


def test_the_shipped_weights_are_small_and_fit_the_preset() -> None:
    from grappa.backbone.frozen import load_backbone
    from grappa.pipeline.config.yaml_file import parse_settings, preset_path, read_settings

    weights = Path(grappa.pipeline.demo.__file__).parent / "vit_demo.safetensors"
    assert weights.stat().st_size <= 6_000_000
    preset = parse_settings(read_settings(preset_path("demo")), "demo").backbone
    backbone = load_backbone(preset.name, weights=weights, image_size=preset.image_size, options=preset.options)
    record = json.loads(weights.with_suffix(".json").read_text(encoding="utf-8"))
    assert record["options"] == dict(preset.options)
    assert sum(value.numel() for value in backbone.parameters()) > 1_000_000
