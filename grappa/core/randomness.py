"""Random numbers by counters: every draw is a function of (seed, stage, instance, epoch, image_id).

Workers, processes, batch sizes and restarts therefore change nothing: a draw belongs to an image, not to a position in
a stream. The generator is splitmix64 (Steele, Lea & Flood 2014), evaluated at hashed counters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def key(*parts: int | str) -> int:
    """Return the 64-bit key of a tuple such as ``(seed, "adaptors", "k00256", epoch)``; types matter: 1 is not "1"."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return _hash64(text)


def id_numbers(image_ids: Sequence[str]) -> NDArray[np.uint64]:
    """Return one 64-bit number an image id, (N,) uint64, equal on every machine."""
    return np.fromiter((_hash64(image_id) for image_id in image_ids), dtype=np.uint64, count=len(image_ids))


def uniforms(key: int, ids: NDArray[np.uint64], num_draws: int) -> NDArray[np.float64]:
    """Return (B, num_draws) float64 in [0, 1): row b depends on ``key`` and ``ids[b]`` only."""
    return (_bits(key, ids, num_draws) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def shuffled(key: int, ids: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return (N,) int64, the rows in an order that depends on ``key`` and the ids, not on the rows' own order."""
    return np.lexsort((ids, _bits(key, ids, 1)[:, 0])).astype(np.int64)


def _bits(key: int, ids: NDArray[np.uint64], num_draws: int) -> NDArray[np.uint64]:
    start = _mix(np.asarray(ids, dtype=np.uint64) ^ _mix(np.array([key], dtype=np.uint64)))
    steps = np.arange(1, num_draws + 1, dtype=np.uint64) * _GAMMA
    return _mix(start[:, None] + steps[None, :])


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    values = (values ^ (values >> np.uint64(30))) * _MIX_1
    values = (values ^ (values >> np.uint64(27))) * _MIX_2
    mixed: NDArray[np.uint64] = values ^ (values >> np.uint64(31))
    return mixed


def _hash64(text: str) -> int:
    digest = hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little")
