"""Object views from the original files: the right part, the right rows, going on after a stop, what is gone."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from grappa.images.caching.uncached import Originals
from grappa.images.files import ImagesChangedError
from grappa.images.ingest import decode_all
from grappa.images.pixels import PixelCache
from grappa.images.table import list_images
from grappa.objects.boxes import object_view
from grappa.objects.views import Framing, write_object_views

FRAMING = Framing(enlargement=1.1, max_aspect=4 / 3, cache_size=16)
NONE = (math.nan,) * 4
ROTATED = 6  # EXIF: the camera lay on its side


class Material:
    """Seven images, the first of them stored on its side, their table and pixel cache, and a box for some."""

    def __init__(self, folder: Path) -> None:
        self.folder, source = folder, folder / "source"
        (source / "d").mkdir(parents=True)
        for number in range(7):
            pixels = np.random.default_rng(number).integers(0, 256, (60, 80, 3), dtype=np.uint8)
            exif = Image.Exif()
            exif[274] = ROTATED if number == 0 else 1
            Image.fromarray(pixels).save(source / "d" / f"{number}.png", exif=exif)
        listing = list_images([source])
        self.roots = list(listing.attrs["roots"])
        self.images, _, _ = decode_all(
            listing, self.roots, folder / "pixels", cache_size=16, max_pixels=10_000, shard_size=3
        )
        self.cache = PixelCache.open(folder / "pixels")
        self.boxes = np.array([(5.0, 6.0, 30.0, 40.0) if row % 3 else NONE for row in range(7)])
        sideways = self.row("0.png")
        assert self.images.loc[sideways, ["height", "width"]].tolist() == [80, 60]
        self.boxes[sideways] = (10, 50, 40, 80)

    def row(self, name: str) -> int:
        return int(self.images.index[self.images["path"].str.endswith(name)][0])

    def write(self, name: str, **changes: Any) -> PixelCache:
        how: dict[str, Any] = {"framing": FRAMING, "max_pixels": 10_000, "shard_size": 3, "num_workers": 2}
        folder = self.folder / name
        how["manifests"] = self.folder / f"{name}.manifests"
        write_object_views(self.images, self.boxes, self.roots, self.cache, folder, **{**how, **changes})
        return PixelCache.open(folder)

    def original(self, row: int) -> np.ndarray[Any, Any]:
        image = Image.open(self.folder / "source" / self.images["path"][row])
        return np.asarray(image.transpose(Image.Transpose.ROTATE_270) if row == self.row("0.png") else image)


@pytest.fixture
def material(tmp_path: Path) -> Material:
    return Material(tmp_path)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_each_row_is_the_part_around_its_box_of_the_oriented_original_or_its_own_pixels(material: Material) -> None:
    views = material.write("views")
    assert len(views) == 7
    for row, box in enumerate(material.boxes):
        if math.isnan(box[0]):
            np.testing.assert_array_equal(views.image(row), material.cache.image(row))
            continue
        wanted = Image.fromarray(object_view(material.original(row), box))
        scale = 16 / min(wanted.size)
        wanted = wanted.resize((round(wanted.width * scale), round(wanted.height * scale)), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(views.image(row), np.asarray(wanted))


def test_a_small_view_is_not_enlarged(material: Material) -> None:
    material.boxes[:] = (4, 4, 10, 12)
    assert {material.write("views").image(row).shape for row in range(7)} == {(9, 7, 3)}


def test_a_stopped_pass_goes_on_at_the_first_shard_that_is_not_whole(
    material: Material, monkeypatch: pytest.MonkeyPatch
) -> None:
    material.write("undisturbed", num_workers=1)
    full = Originals.full

    def stop(originals: Originals, row: int) -> Any:
        if row == 4:
            raise KeyboardInterrupt
        return full(originals, row)

    with monkeypatch.context() as patch:
        patch.setattr(Originals, "full", stop)
        with pytest.raises(KeyboardInterrupt):
            material.write("views", num_workers=1)
    assert [path.name for path in (material.folder / "views").iterdir()] == ["00000.npy"]
    counts: list[int] = []
    material.write("views", progress=counts.append)
    assert sum(counts) == 7
    assert contents(material.folder / "views") == contents(material.folder / "undisturbed")


def test_other_boxes_cut_again(material: Material) -> None:
    material.write("views")
    before = contents(material.folder / "views")
    material.boxes[1] = (20, 20, 50, 50)
    material.write("views")
    after = contents(material.folder / "views")
    assert {name for name in after if after[name] != before[name]} == {"00000.npy", "index.npy"}


def test_an_original_that_is_gone_changed_or_unreadable_is_named_with_the_way_out(material: Material) -> None:
    victim = material.folder / "source" / material.images["path"][1]
    data = victim.read_bytes()
    victim.write_bytes(data + b"more")
    with pytest.raises(ImagesChangedError, match=rf"{victim.name} has other bytes than were decoded: bring it back"):
        material.write("views")
    victim.unlink()
    with pytest.raises(ImagesChangedError, match=rf"{victim.name} cannot be read now \(No such file .*grappa init RUN"):
        material.write("views")
    os.rename(material.folder / "source", material.folder / "moved")
    with pytest.raises(ImagesChangedError, match="if the images moved, say where"):
        material.write("views")
    (material.folder / "moved" / material.images["path"][1]).write_bytes(data)
    material.roots = [str(material.folder / "moved")]
    assert len(material.write("views")) == 7


def test_images_without_a_box_need_no_original(material: Material) -> None:
    material.boxes[:] = np.nan
    os.rename(material.folder / "source", material.folder / "moved")
    assert len(material.write("views")) == 7
