"""How much of a codebook is in use."""

from __future__ import annotations

import torch
from torch import Tensor


def count_codes(indices: Tensor, codebook_size: int) -> Tensor:
    """(K,) int64, how often each code occurs in `indices` of any shape."""
    return torch.bincount(indices.flatten(), minlength=codebook_size)


def usage(counts: Tensor) -> Tensor:
    """Share () in [0, 1] of the codes that occur."""
    return (counts > 0).float().mean()


def perplexity(counts: Tensor) -> Tensor:
    """exp of the entropy of the codes' frequencies, () in [1, K]: as many equally likely codes."""
    frequency = counts.double() / counts.sum().clamp(min=1)
    return torch.special.entr(frequency).sum().exp().float()
