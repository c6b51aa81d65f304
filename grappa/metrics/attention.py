"""What a fusion's granularity attention depends on: the image, and the domain it comes from.

Shapes: N images, L blocks, G pseudo-granularities, M domains.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

MEAN, MEAN_BLOCK = "_mean", -1  # the domain and the block of rows that hold means
Floats = NDArray[np.floating]


def entropy(attention: Floats) -> NDArray[np.float64]:
    """Return the entropy over the last dimension in nats, 0 .. log G, of weights that sum to 1 over it."""
    weights = np.asarray(attention, dtype=np.float64)
    return -(weights * np.log(np.maximum(weights, 1e-30))).sum(-1)


def attention_by_domain(
    attention: NDArray[np.float32], domains: NDArray[np.object_], granularities: Sequence[str]
) -> pd.DataFrame:
    """Return the mean and the spread of each domain's attention, one row a (domain, block, granularity).

    attention (N, L, G) sums to 1 over G, domains (N,), granularities: G names. Columns: domain, block (0 .. L - 1),
    granularity, num_images, mean (sums to 1 over granularities), std (across the domain's images).
    """
    _check(attention, domains, granularities)
    parts = []
    for domain in sorted(set(domains)):
        own = np.asarray(attention[domains == domain], dtype=np.float64)
        index = pd.MultiIndex.from_product([[domain], range(own.shape[1]), granularities])
        values = {"num_images": len(own), "mean": own.mean(0).ravel(), "std": own.std(0).ravel()}
        parts.append(pd.DataFrame(values, index=index.set_names(["domain", "block", "granularity"])).reset_index())
    return pd.concat(parts, ignore_index=True)


def summarize_attention(attention: NDArray[np.float32], domains: NDArray[np.object_]) -> pd.DataFrame:
    """Return how peaked the attention is and whether it differs by image and by domain, one row a (domain, block).

    attention (N, L, G) sums to 1 over G, domains (N,). Rows of the block -1 are means over blocks, rows of the
    domain "_mean" means over domains, each domain counting the same; ``block`` (int64) is 0 .. L - 1, then -1.

    Columns, with a an image's attention, m_d a domain's mean of a, m the mean of m_d over domains:
        num_images
        entropy: mean over images of H(a), nats; entropy_share: the same as a share of log G (NaN where G = 1).
        variance: of a across the domain's images, mean over G.
        domain_variance: (m_d - m)^2, mean over G.
        eta_squared: domain_variance / (domain_variance + variance), the share of all variance that lies between
            domains; NaN where the attention never varies. Of domains alike, about M / N remains by chance.
        image_information: mean over images of KL(a || m), nats; its mean over domains, H(m) - entropy, is the mutual
            information between image and granularity.
        domain_information: KL(m_d || m), the part of it that the domain tells; its mean over domains is H(m) - mean
            H(m_d), the mutual information between domain and granularity.
    """
    _check(attention, domains)
    names = sorted(set(domains))
    parts = [_block(attention[:, block], domains, names).assign(block=block) for block in range(attention.shape[1])]
    table = pd.concat(parts)
    over_blocks = (
        table.drop(columns="block").groupby("domain", sort=False).mean().reset_index().assign(block=MEAN_BLOCK)
    )
    table = pd.concat([table, over_blocks], ignore_index=True)
    with np.errstate(invalid="ignore"):
        table["eta_squared"] = table["domain_variance"] / (table["domain_variance"] + table["variance"])
        table["entropy_share"] = table["entropy"] / np.log(attention.shape[2])
    columns = ["domain", "block", "num_images", "entropy", "entropy_share", "variance", "domain_variance"]
    table["num_images"] = table["num_images"].astype(np.int64)
    return table[[*columns, "eta_squared", "image_information", "domain_information"]]


def _block(attention_NG: NDArray[np.float32], domains: NDArray[np.object_], names: Sequence[str]) -> pd.DataFrame:
    parts = [np.asarray(attention_NG[domains == name], dtype=np.float64) for name in names]
    means = np.stack([part.mean(0) for part in parts])
    mean, own = means.mean(0), np.array([entropy(part).mean() for part in parts])
    by_domain = _divergence(means, mean)
    columns = {
        "num_images": [len(part) for part in parts],
        "entropy": own,
        "variance": [part.var(0).mean() for part in parts],
        "domain_variance": ((means - mean) ** 2).mean(1),
        "image_information": by_domain + entropy(means) - own,
        "domain_information": by_domain,
    }
    table = pd.DataFrame({"domain": names, **columns})
    last = {"domain": MEAN, "num_images": len(attention_NG), **table[list(columns)[1:]].mean()}
    return pd.concat([table, pd.DataFrame([last])], ignore_index=True)


def _divergence(means_MG: NDArray[np.float64], mean_G: NDArray[np.float64]) -> NDArray[np.float64]:
    ratios = np.maximum(means_MG, 1e-30) / np.maximum(mean_G, 1e-30)
    return (means_MG * np.log(ratios)).sum(1)


def _check(attention: Floats, domains: NDArray[np.object_], granularities: Sequence[str] | None = None) -> None:
    wanted = f"({len(domains)}, blocks, {'granularities' if granularities is None else len(granularities)})"
    fits = attention.ndim == 3 and len(attention) == len(domains) and len(domains) > 0
    if not fits or (granularities is not None and attention.shape[2] != len(granularities)):
        raise ValueError(f"attention is {attention.shape}, expected {wanted}: one row for each of the domains given")
    if len(set(domains)) and not np.allclose(attention.sum(-1, dtype=np.float64), 1, atol=1e-3):
        raise ValueError("attention does not sum to 1 over the granularities; give the attention of a fusion")
