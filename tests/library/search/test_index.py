from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from grappa.search.index import SearchIndex, recall
from grappa.search.index_kinds import Kind, index_bytes, kind_of


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def points(number: int, seed: int = 0, width: int = 12) -> np.ndarray:
    return unit(np.random.default_rng(seed).normal(size=(number, width)))


def names(number: int) -> list[str]:
    return [f"{i * 7919:016x}" for i in range(number)]


def test_equals_the_exhaustive_search() -> None:
    embeddings, queries = points(500), points(20, seed=1)
    ids, similarities = SearchIndex.build(embeddings, names(500)).search(queries, 10)
    products = queries @ embeddings.T
    order = np.argsort(-products, axis=1)[:, :10]
    assert ids.tolist() == [[names(500)[i] for i in row] for row in order]
    np.testing.assert_allclose(similarities, np.take_along_axis(products, order, 1), atol=1e-6)


@pytest.mark.parametrize("ivf_above", [1000, 10])
def test_ids_survive_saving_and_loading(tmp_path: Path, ivf_above: int) -> None:
    index = SearchIndex.build(points(200), names(200), ivf_above=ivf_above)
    index.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ids.parquet", "index.faiss"]
    loaded = SearchIndex.load(tmp_path)
    assert loaded.ids.tolist() == names(200) and len(loaded) == 200
    before, after = index.search(points(5, seed=1), 7), loaded.search(points(5, seed=1), 7)
    assert before[0].tolist() == after[0].tolist()
    np.testing.assert_array_equal(before[1], after[1])


def test_an_inverted_file_finds_nearly_all_and_always_k() -> None:
    random = np.random.default_rng(0)
    centers = random.normal(size=(60, 12))
    embeddings = unit(centers[random.integers(0, 60, 3000)] + 0.4 * random.normal(size=(3000, 12)))
    exact = SearchIndex.build(embeddings, names(3000)).search(embeddings[:100], 10)[0]
    index = SearchIndex.build(embeddings, names(3000), ivf_above=2999)
    found = index.search(embeddings[:100], 10)[0]
    assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(exact, found, strict=True)]) > 0.9
    everything, similarities = index.search(embeddings[:2], 3000)
    assert all(set(row) == set(names(3000)) for row in everything)
    assert (np.diff(similarities, axis=1) <= 1e-6).all()


def test_load_refuses_missing_truncated_and_disagreeing_files(tmp_path: Path) -> None:
    SearchIndex.build(points(200), names(200)).save(tmp_path)
    index_bytes, ids_bytes = (tmp_path / "index.faiss").read_bytes(), (tmp_path / "ids.parquet").read_bytes()
    for size in (0, 3, 40, len(index_bytes) - 1):
        (tmp_path / "index.faiss").write_bytes(index_bytes[:size])
        with pytest.raises(ValueError, match=r"index\.faiss is truncated"):
            SearchIndex.load(tmp_path)
    (tmp_path / "index.faiss").write_bytes(index_bytes + b"x")
    with pytest.raises(ValueError, match="more than one index"):
        SearchIndex.load(tmp_path)
    (tmp_path / "index.faiss").write_bytes(index_bytes)
    for size in (0, len(ids_bytes) // 2):
        (tmp_path / "ids.parquet").write_bytes(ids_bytes[:size])
        with pytest.raises(ValueError, match=r"ids\.parquet is truncated"):
            SearchIndex.load(tmp_path)
    pd.DataFrame({"name": names(200)}).to_parquet(tmp_path / "ids.parquet")
    with pytest.raises(ValueError, match="has no column image_id"):
        SearchIndex.load(tmp_path)
    pd.DataFrame({"image_id": names(199)}).to_parquet(tmp_path / "ids.parquet")
    with pytest.raises(ValueError, match=r"holds 200 images and ids\.parquet 199"):
        SearchIndex.load(tmp_path)
    (tmp_path / "ids.parquet").unlink()
    with pytest.raises(ValueError, match="missing"):
        SearchIndex.load(tmp_path)


def test_refuses_what_makes_no_sense() -> None:
    index = SearchIndex.build(points(20), names(20))
    for k in (0, 21):
        with pytest.raises(ValueError, match="allows 1 to 20"):
            index.search(points(2), k)
    with pytest.raises(ValueError, match="embed with its model"):
        index.search(points(2, width=5), 3)
    with pytest.raises(ValueError, match="1 different ids for 20"):
        SearchIndex.build(points(20), ["same"] * 20)
    with pytest.raises(ValueError, match="not of length 1"):
        SearchIndex.build(2 * points(20), names(20))


def grouped(number: int, width: int = 16) -> np.ndarray:
    """Points around 60 centers, as photographs lie."""
    random = np.random.default_rng(0)
    centers = random.normal(size=(60, width))
    return unit(centers[random.integers(0, 60, number)] + 0.4 * random.normal(size=(number, width)))


@pytest.mark.parametrize(("kind", "least"), [("flat", 1.0), ("ivf", 0.9), ("hnsw", 0.95), ("ivfpq", 0.5)])
def test_each_kind_finds_most_and_says_how_much_it_finds_and_takes(tmp_path: Path, kind: Kind, least: float) -> None:
    embeddings = grouped(3000)
    index = SearchIndex.build(embeddings, names(3000), kind=kind)
    assert kind_of(index.faiss_index) == kind
    assert least <= recall(index, embeddings, names(3000)) <= 1
    index.save(tmp_path)
    size = (tmp_path / "index.faiss").stat().st_size
    assert index_bytes(kind, 3000, 16) == pytest.approx(size, rel=0.05)
    loaded = SearchIndex.load(tmp_path)
    assert kind_of(loaded.faiss_index) == kind
    assert loaded.search(embeddings[:20], 10)[0].tolist() == index.search(embeddings[:20], 10)[0].tolist()


@pytest.mark.parametrize("kind", ["flat", "ivf", "hnsw", "ivfpq"])
def test_the_same_vectors_give_the_same_bytes(tmp_path: Path, kind: Kind) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        SearchIndex.build(grouped(1000), names(1000), kind=kind).save(tmp_path / name)
    assert (tmp_path / "one" / "index.faiss").read_bytes() == (tmp_path / "two" / "index.faiss").read_bytes()


@pytest.mark.parametrize("kind", ["flat", "ivf", "hnsw", "ivfpq"])
def test_an_index_grows_and_hides_images(tmp_path: Path, kind: Kind) -> None:
    embeddings, ids = grouped(1000), names(1000)
    index = SearchIndex.build(embeddings[:900], ids[:900], kind=kind).grown(embeddings[900:], ids[900:])
    assert len(index) == 1000
    (first, *_), _ = index.search(embeddings[950:951], 5)
    assert ids[950] in first
    hidden = index.without([*ids[:400], "unknown"])
    assert len(hidden) == 600
    hidden.save(tmp_path)
    loaded = SearchIndex.load(tmp_path)
    assert len(loaded) == 600
    for each in (hidden, loaded):
        found, _ = each.search(embeddings[:50], 20)
        assert not set(found.ravel()) & set(ids[:400])
        everything, _ = each.search(embeddings[:2], 600)
        assert all(set(row) == set(ids[400:]) for row in everything)
    with pytest.raises(ValueError, match="allows 1 to 600"):
        hidden.search(embeddings[:1], 601)
    assert len(hidden.without([])) == 1000
    with pytest.raises(ValueError, match="is in the index already"):
        index.grown(embeddings[:1], ids[:1])


def test_auto_is_flat_up_to_a_number_of_images() -> None:
    assert kind_of(SearchIndex.build(points(100), names(100), ivf_above=100).faiss_index) == "flat"
    assert kind_of(SearchIndex.build(points(101), names(101), ivf_above=100).faiss_index) == "ivf"
    assert kind_of(SearchIndex.build(points(101), names(101), kind="flat", ivf_above=100).faiss_index) == "flat"


def test_codes_need_images_to_learn_from() -> None:
    with pytest.raises(ValueError, match=r"needs as many images, found 255; choose index\.kind=flat"):
        SearchIndex.build(points(255), names(255), kind="ivfpq")


def test_the_recall_of_an_index_that_misses_is_below_1() -> None:
    embeddings = grouped(500)
    index = SearchIndex.build(embeddings, names(500)).without(names(500)[::2])
    assert 0.3 < recall(index, embeddings[1::2], names(500)[1::2]) <= 1
    assert recall(SearchIndex.build(embeddings[:1], names(1)), embeddings[:1], names(1)) == 1
    wrong = SearchIndex.build(embeddings[::-1].copy(), names(500))
    assert recall(wrong, embeddings, names(500)) < 0.2


def test_packages_that_bring_faiss_and_torch_together_change_nothing() -> None:
    """Where this module was imported, by whatever package, faiss's search takes no parameters."""
    importlib.import_module("faiss.contrib.torch_utils")
    embeddings, ids = points(50), names(50)
    found, _ = SearchIndex.build(embeddings, ids).without([ids[7]]).search(embeddings[:8], 2)
    assert found[0, 0] == ids[0] and ids[7] not in found
