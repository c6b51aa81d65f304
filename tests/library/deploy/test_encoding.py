"""``GrappaModel.encode``: what it takes, what it says of what it cannot take, and that its bits are the pipeline's."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import grappa
from grappa.model import GrappaModel, ItemError, save_model
from grappa.pipeline.commands.embed import embed
from tests.helpers.tiny import draw_images, tiny_backbone, tiny_set


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> GrappaModel:
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, tiny_backbone(), {"student": tiny_set(1)}, None, cache_size=40)
    return grappa.load_model(folder)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return sorted(draw_images(tmp_path_factory.mktemp("photos"), num_classes=2, num_images=2).rglob("*.png"))


def test_every_kind_of_item_gives_the_same_embedding(model: GrappaModel, photos: list[Path]) -> None:
    image = Image.open(photos[0])
    array = np.asarray(image)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    items = [photos[0], str(photos[0]), image, array, tensor, model.preprocess(photos[0])]
    found = model.encode(items)
    assert found.shape == (6, model.embedding_dim) and found.dtype == np.float32
    single = np.concatenate([model.encode([each]) for each in items])
    np.testing.assert_array_equal(single, single[:1].repeat(6, 0))
    np.testing.assert_allclose(found, single, atol=1e-6)  # rows of one batch need not have equal bits
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(found[0], model(model.preprocess(image)[None])[0].numpy(), atol=1e-5)


def test_the_bits_are_those_of_grappa_embed(model: GrappaModel, photos: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_model(folder, tiny_backbone(), {"student": tiny_set(1)}, None, cache_size=40)
    embed(folder, photos[0].parents[2], tmp_path / "out")
    written = np.load(tmp_path / "out" / "embeddings.npy", allow_pickle=False)
    np.testing.assert_array_equal(grappa.load_model(folder).encode(photos), written)


def test_any_iterable_is_taken_in_batches_in_its_order(model: GrappaModel, photos: list[Path]) -> None:
    seen: list[tuple[int, int | None]] = []
    found = model.encode((each for each in photos), batch_size=5, progress=lambda *done: seen.append(done))
    assert seen == [(5, None), (10, None), (12, None)]
    np.testing.assert_allclose(found, model.encode(photos), atol=1e-6)
    np.testing.assert_array_equal(
        model.encode(np.stack([np.asarray(Image.open(each)) for each in photos[:3]])).shape, (3, 32)
    )


def test_nothing_gives_no_rows_and_one_item_gives_one(model: GrappaModel, photos: list[Path]) -> None:
    assert model.encode([]).shape == (0, 32)
    assert model.preprocess([]).shape == (0, 3, 32, 32)
    assert model.encode(photos[0]).shape == model.encode(np.asarray(Image.open(photos[0]))).shape == (1, 32)
    assert model.preprocess(photos[0]).shape == (3, 32, 32)
    assert model.preprocess(photos[:2]).shape == (2, 3, 32, 32)


def _bad(tmp_path: Path) -> Iterator[tuple[object, str]]:
    (tmp_path / "text.jpg").write_text("no image")
    Image.new("RGB", (40, 40)).save(tmp_path / "cut.png")
    whole = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    yield tmp_path / "text.jpg", r"item 1 \(.*text.jpg\): not an image"
    yield tmp_path / "cut.png", r"item 1 \(.*cut.png\): truncated or broken image"
    yield tmp_path / "none.jpg", r"item 1 \(.*none.jpg\): missing"
    yield tmp_path, "item 1 .*: (missing|not a regular file)"
    yield "a\0b.jpg", "item 1 .*: "
    yield np.zeros((4, 4), np.uint8), r"item 1: an array of shape \(4, 4\), uint8; expected a path"
    yield np.zeros((4, 4, 3)), r"item 1: an array of shape \(4, 4, 3\), float64"
    yield np.zeros((0, 4, 3), np.uint8), r"item 1: an array of shape \(0, 4, 3\)"
    yield torch.zeros(3, 5, 5), r"item 1: a floating-point tensor of shape \(3, 5, 5\); expected \(3, 32, 32\)"
    yield torch.full((3, 32, 32), float("nan")), "item 1: a tensor that holds NaN"
    yield Image.new("F", (4, 4)), "item 1: samples of 32 bits"
    yield 7, r"item 1: 7 \(a int\); expected a path"
    yield None, "item 1: None"


def test_what_is_no_image_is_an_error_that_names_it_or_a_masked_row(
    model: GrappaModel, photos: list[Path], tmp_path: Path
) -> None:
    for bad, reason in _bad(tmp_path):
        items = [photos[0], bad, photos[1]]
        with pytest.raises(ItemError, match=reason):
            model.encode(items)
        with pytest.warns(UserWarning, match=f"1 of 3 items cannot be used; first: {reason}"):
            found, mask = model.encode(items, errors="mask")
        assert mask.tolist() == [True, False, True] and np.isnan(found[1]).all()
        np.testing.assert_array_equal(found[mask], model.encode([photos[0], photos[1]]))
        with pytest.raises(ItemError, match=reason):
            model.preprocess(items)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model.encode(photos[:2], errors="mask")[1].all()


def test_an_image_of_too_many_pixels_is_not_decoded(model: GrappaModel, photos: list[Path]) -> None:
    for item in (photos[0], Image.open(photos[0])):
        with pytest.raises(ItemError, match="52 x 44 pixels, more than the limit of 100"):
            model.encode([item], max_pixels=100)


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"batch_size": 1.5}, {"errors": "skip"}])
def test_an_option_of_no_meaning_is_refused(model: GrappaModel, options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="expected a whole number of 1 or more, and raise or mask"):
        model.encode([], **options)  # type: ignore[call-overload]


@pytest.mark.parametrize("device", ["abacus", "meta", "cuda"])
def test_a_device_that_is_not_there_is_refused_in_one_sentence(model: GrappaModel, device: str) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ValueError, match=f"the device is '{device}', which torch cannot use here .*; give cpu$"):
        model.encode([], device=device)


def test_numbers_of_numpy_and_what_is_only_indexed_are_taken(model: GrappaModel, photos: list[Path]) -> None:
    class Photos:
        def __getitem__(self, place: int) -> Path:
            return photos[place]

    found = model.encode(Photos(), batch_size=np.int64(2))  # type: ignore[call-overload]
    assert np.array_equal(found, model.encode(photos, batch_size=2))


def test_what_is_no_list_of_images_is_named(model: GrappaModel) -> None:
    with pytest.raises(ItemError, match="found int, expected images"):
        model.encode(5)  # type: ignore[call-overload]
