"""Which samples of a training step are written in a random order, and in which (Yu et al. 2024, RAR).

Both are pure functions of (seed, step, the sample's key): they depend neither on the number of processes nor
on micro-batches, and a resumed run repeats them.

Axes: B samples, N = h * w cells.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from stage2_ar.chance import sample_generator
from stage2_ar.config import RandomOrderConfig


def random_share(config: RandomOrderConfig, step: int, total_steps: int) -> float:
    """The share of samples that are written in a random order in `step` of `total_steps`, in [0, 1]."""
    done = step / total_steps
    end = 1.0 if config.end is None else config.end
    if done < config.start:
        return 1.0
    if done >= end:
        return config.final_share
    left = (end - done) / (end - config.start)
    return config.final_share + (1 - config.final_share) * left


def sample_orders(own: Tensor, share: float, seed: int, step: int, keys: Sequence[str]) -> Tensor | None:
    """Orders (B, N) int64 of the samples `keys`: random ones for about `share` of them, else `own` (N,).

    None where all are written in the model's own order.
    """
    rows: list[Tensor | None] = []
    for key in keys:
        random = sample_generator(seed, step, key, "order")
        if random.random() < share:
            rows.append(torch.from_numpy(np.argsort(random.random(len(own)), kind="stable")))
        else:
            rows.append(None)
    if all(row is None for row in rows):
        return None
    return torch.stack([own if row is None else row.to(own.device) for row in rows])
