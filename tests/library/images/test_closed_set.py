"""The closed-set protocol: half of each class held out, whatever else is in the listing."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from grappa.images.closed_set import closed_set
from grappa.images.table import ImageTableError
from grappa.pipeline.config.yaml_file import ConfigError
from grappa.pipeline.engine.sources import published_listing
from tests.helpers.tiny import draw_images, make_run, write_table, write_weights


def _listing(**columns: object) -> pd.DataFrame:
    names = [f"{label}{number}.jpg" for label in "abc" for number in range(5)]
    values = {"path": names, "domain": "birds", "label": [name[0] for name in names], "split": None}
    listing = pd.DataFrame({**values, **columns})
    listing.attrs = {"roots": ["here"]}
    return listing


def test_the_smaller_half_of_each_class_is_held_out() -> None:
    found = closed_set(_listing(), seed=0)
    assert (
        found.groupby("label")["split"].apply(lambda part: sorted(part)).tolist() == [["test"] * 2 + ["train"] * 3] * 3
    )
    assert found.attrs == {"roots": ["here"]}
    assert (closed_set(_listing(), seed=1)["split"] != found["split"]).any()


def test_the_halves_do_not_depend_on_the_order_of_the_rows() -> None:
    listing = _listing()
    mixed = listing.sample(frac=1, random_state=0)
    mixed.attrs = listing.attrs
    one, other = (closed_set(each, seed=0).set_index("path")["split"] for each in (listing, mixed))
    assert one.equals(other.reindex(one.index))


def test_given_test_images_are_left_out_and_unlabelled_ones_stay_train() -> None:
    labels = ["a"] * 5 + [None] * 5 + ["c"] * 5
    found = closed_set(_listing(label=labels, split=["train"] * 10 + ["test"] * 5), seed=0)
    assert len(found) == 10
    assert set(found.loc[found["label"].isna(), "split"]) == {"train"}


def test_the_same_label_in_two_domains_is_two_classes() -> None:
    found = closed_set(_listing(label="x", domain=["birds"] * 8 + ["cars"] * 7), seed=0)
    assert found[found["split"] == "test"]["domain"].value_counts().to_dict() == {"birds": 4, "cars": 3}


@pytest.mark.parametrize("label", [None, [f"own{i}" for i in range(15)]])
def test_without_two_images_of_a_class_it_is_refused(label: object) -> None:
    with pytest.raises(ImageTableError, match="no class has two labelled train images; give labels"):
        closed_set(_listing(label=label), seed=0)


def test_a_run_is_split_so_and_back(tmp_path: Path) -> None:
    draw_images(tmp_path / "images")
    weights = write_weights(tmp_path / "weights.safetensors")
    table = write_table(
        tmp_path / "images",
        tmp_path / "table.csv",
        label=lambda path: path.parent.name,
        split=lambda path: "train" if path.parent.name < "class_2" else "test",
    )
    sizes = {}
    for protocol in ("closed_set", "as_given"):
        run = make_run(tmp_path / "run", [table], weights, images__protocol=protocol)
        listing = published_listing(run)
        assert listing is not None
        sizes[protocol] = listing["split"].value_counts().to_dict()
    assert sizes == {"closed_set": {"train": 18, "test": 12}, "as_given": {"train": 30, "test": 30}}
    with pytest.raises(ConfigError, match="protocol"):
        make_run(tmp_path / "run", [table], weights, images__protocol="closed")
