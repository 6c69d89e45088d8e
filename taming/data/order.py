"""The order of an epoch: a pure function of (seed, epoch), the same on every machine."""

from __future__ import annotations

from functools import lru_cache

import numpy as np


@lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, length: int) -> np.ndarray:
    """A permutation of range(length): keys from Philox, sorted."""
    random = np.random.Generator(np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)))
    return np.argsort(random.random(length), kind="stable")
