"""`grappa init` and the images: layouts, domains, tables, missing files, odd names."""

from __future__ import annotations

import os

import pytest

from grappa.images.table import list_images
from grappa.pipeline.config.yaml_file import ConfigError
from tests.pipeline.commands.desk import Desk, made


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


def test_an_empty_name_is_not_the_working_folder(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(desk.images)
    with pytest.raises(ValueError, match="an empty name of images; give a folder, a table"):
        desk.init(images=[""])
    with pytest.raises(ValueError, match="an empty name of images"):
        list_images([""])
    assert not desk.root.exists()


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
    with pytest.raises(ValueError, match=r"^1 of 11 files is missing, .* in /.* \(it has backslashes.*allows 5%"):
        desk.init(images=[str(table)])
    assert not desk.root.exists()
    desk.init(images=[str(table)], assignments=["images.max_rejected=0.2"])
    assert any(line.startswith("warning: 1 of 11 files is missing") for line in desk.said)


def test_a_run_within_its_images_is_none_of_them(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.root = desk.images / "runs" / "mine"
    made(desk, monkeypatch)
    desk.init(assignments=["fusion.seed=1"])
    assert "0 images added, 0 removed" in desk.said
    assert "passed over: 1 folder (runs/mine 1)" in desk.said
    assert desk.states()["images"] == "fresh"


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
