"""The random numbers of a GAN's training and sampling, each a function of what it is for and of its place.

So that a picture depends neither on the batch that it is painted in, nor on the processes and micro-batches
that share a step.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

Purpose = Literal["discriminator", "generator", "interpolation", "sample"]
_STREAMS: dict[Purpose, int] = {"discriminator": 1, "generator": 2, "interpolation": 3, "sample": 4}
"""The counter's highest word. Views (`augment.py`) have streams of their own under the same key."""


def draw_noise(
    num: int,
    dim: int,
    *,
    seed: int,
    step: int = 0,
    first: int = 0,
    stride: int = 1,
    purpose: Purpose = "sample",
) -> Tensor:
    """z of every `stride`-th picture from number `first` on of a step: (num, dim) fp32 from N(0, 1), on the
    CPU.

    Row i is a function of (seed, step, first + i * stride, purpose) alone. `seed` and `step` lie in
    [0, 2^64).
    """
    places = range(first, first + num * stride, stride)
    rows = [_generator(seed, step, place, purpose).standard_normal(dim, np.float32) for place in places]
    return torch.from_numpy(np.stack(rows) if rows else np.empty((0, dim), np.float32))


def draw_shares(
    num: int, *, seed: int, step: int = 0, first: int = 0, purpose: Purpose = "interpolation"
) -> Tensor:
    """(num,) fp32 from U[0, 1), a function of the same as `draw_noise`."""
    draws = [_generator(seed, step, first + i, purpose).random(dtype=np.float32) for i in range(num)]
    return torch.tensor(draws, dtype=torch.float32)


def _generator(seed: int, step: int, place: int, purpose: Purpose) -> np.random.Generator:
    """A stream of 2^128 numbers that no other place, step or purpose shares (Salmon et al. 2011, Philox)."""
    counter = np.array([0, 0, place, _STREAMS[purpose]], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=np.array([seed, step], dtype=np.uint64), counter=counter))
