"""Statistics of the granularity attention: numbers worked out by hand, and the bounds they keep."""

from __future__ import annotations

import numpy as np
import pytest

from grappa.metrics.attention import attention_by_domain, entropy, summarize_attention

LN2 = float(np.log(2))
DOMAINS = np.array(["birds", "birds", "cars", "cars"], dtype=object)


def _blocks(*blocks: list[list[float]]) -> np.ndarray:
    """(N, L, G) from one (N, G) list a block."""
    return np.stack([np.array(block, dtype=np.float32) for block in blocks], axis=1)


BY_DOMAIN = [[1, 0], [1, 0], [0, 1], [0, 1]]
BY_IMAGE = [[1, 0], [0, 1], [1, 0], [0, 1]]
EQUAL = [[0.5, 0.5]] * 4


def test_entropy_of_even_and_of_one_hot_weights() -> None:
    np.testing.assert_allclose(entropy(np.array([[0.5, 0.5], [1.0, 0.0]])), [LN2, 0.0])


def test_attention_by_domain_has_means_and_deviations() -> None:
    table = attention_by_domain(_blocks(BY_DOMAIN, BY_IMAGE), DOMAINS, ["k00004", "k00008"])
    assert list(table.columns) == ["domain", "block", "granularity", "num_images", "mean", "std"]
    found = table.set_index(["domain", "block", "granularity"])
    assert found.loc[("birds", 0, "k00004"), ["num_images", "mean", "std"]].tolist() == [2, 1, 0]
    assert found.loc[("cars", 0, "k00004"), "mean"] == 0
    assert found.loc[("cars", 1, "k00008"), ["mean", "std"]].tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("block", "eta", "image", "domain"),
    [(BY_DOMAIN, 1.0, LN2, LN2), (BY_IMAGE, 0.0, LN2, 0.0), (EQUAL, np.nan, 0.0, 0.0)],
)
def test_what_the_attention_depends_on(block: list[list[float]], eta: float, image: float, domain: float) -> None:
    row = summarize_attention(_blocks(block), DOMAINS).set_index(["domain", "block"]).loc[("_mean", 0)]
    np.testing.assert_allclose(row["eta_squared"], eta)
    np.testing.assert_allclose(row["image_information"], image, atol=1e-12)
    np.testing.assert_allclose(row["domain_information"], domain, atol=1e-12)
    assert row["entropy"] == pytest.approx(LN2 if block is EQUAL else 0)
    assert row["entropy_share"] == pytest.approx(1 if block is EQUAL else 0)


def test_means_over_blocks_and_domains() -> None:
    table = summarize_attention(_blocks(BY_DOMAIN, BY_IMAGE), DOMAINS).set_index(["domain", "block"])
    assert list(table.index.get_level_values("block").unique()) == [0, 1, -1]
    whole = table.loc[("_mean", -1)]
    # Each block has all its variance (0.25 a granularity) in one of the two kinds.
    assert (whole["variance"], whole["domain_variance"], whole["eta_squared"]) == (0.125, 0.125, 0.5)
    assert whole["domain_information"] == pytest.approx(LN2 / 2)
    assert whole["num_images"] == 4
    assert table.loc[("birds", -1), "num_images"] == 2


def test_every_domain_counts_the_same() -> None:
    domains = np.array(["birds"] * 99 + ["cars"], dtype=object)
    attention = _blocks([[1, 0]] * 99 + [[0, 1]])
    row = summarize_attention(attention, domains).set_index(["domain", "block"]).loc[("_mean", 0)]
    assert row["domain_information"] == pytest.approx(LN2)


def test_the_domain_never_tells_more_than_the_image() -> None:
    rng = np.random.default_rng(0)
    attention = rng.dirichlet(np.ones(4), size=(200, 3)).astype(np.float32)
    domains = rng.choice(["a", "b", "c"], 200).astype(object)
    everything = summarize_attention(attention, domains)
    assert (everything["domain_information"] <= everything["image_information"]).all()
    table = everything.set_index("domain").loc["_mean"]
    # The two ways to write a mutual information agree.
    means = np.stack([attention[domains == each, 0].mean(0) for each in "abc"]).mean(0)
    expected = entropy(means) - np.mean([entropy(attention[domains == each, 0]).mean() for each in "abc"])
    assert table["image_information"].iloc[0] == pytest.approx(expected, abs=1e-6)
    assert (table["domain_information"] > 0).all()
    assert (table["domain_information"] < table["image_information"] / 10).all(), "drawn without regard to the domain"
    assert (table["eta_squared"] < 0.05).all()


def test_arrays_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"attention is \(4, 1, 2\), expected \(3, blocks, granularities\)"):
        summarize_attention(_blocks(BY_DOMAIN), DOMAINS[:3])
    with pytest.raises(ValueError, match=r"expected \(4, blocks, 1\)"):
        attention_by_domain(_blocks(BY_DOMAIN), DOMAINS, ["k00004"])
    with pytest.raises(ValueError, match="does not sum to 1"):
        summarize_attention(2 * _blocks(BY_DOMAIN), DOMAINS)
