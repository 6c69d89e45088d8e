"""Random numbers that are a function of (seed, step, the sample's key): they depend neither on the number of
processes nor on micro-batches, and a resumed run repeats them.

Axes: B samples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def sample_generator(seed: int, step: int, key: str, purpose: str) -> np.random.Generator:
    """The stream of the sample `key` in a step of training, for one purpose."""
    digest = hashlib.blake2b(f"{seed}/{step}/{key}/{purpose}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def sample_uniforms(seed: int, step: int, keys: Sequence[str], purpose: str, count: int) -> Tensor:
    """(B, count) fp32 in [0, 1) of the samples `keys`."""
    rows = [sample_generator(seed, step, key, purpose).random(count, dtype=np.float32) for key in keys]
    return torch.from_numpy(np.stack(rows))
