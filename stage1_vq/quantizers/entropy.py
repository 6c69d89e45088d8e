"""Entropy of the choice of a code: low for one cell, high over a batch.

The batch is that of all processes, exactly: each differentiates its own share of the mean. With
training.accumulation above 1 it is that of a micro-batch: the entropy of the whole step's mean is not the
mean of their entropies, and would need all of them to be encoded twice.

Axes: N latents, K codes, L bits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from taming.collective import mean_over_processes


def categorical_entropies(logits: Tensor, *, training: bool) -> tuple[Tensor, Tensor]:
    """(mean entropy of a row, entropy of the rows' mean) of logits (N, K), in nats.

    In training the mean is that of all processes, which must then call this together.
    """
    log_probabilities = logits.log_softmax(1)
    probabilities = log_probabilities.exp()
    each = -(probabilities * log_probabilities).sum(1).mean()
    return each, _entropy(_over_processes(probabilities.mean(0), training))


def bit_entropies(logits: Tensor, group_bits: int, *, training: bool) -> tuple[Tensor, Tensor]:
    """The same for codes of L independent bits, logits (N, L) of each being 1.

    A row's entropy is the sum over its bits. Over the batch bits do depend on each other: their joint
    distribution is made for consecutive groups of `group_bits`, and the groups' entropies are summed, an
    upper bound (Zhao et al. 2024, arXiv:2406.07548) that is exact for one group. A group is split in
    halves a, b: the joint mean is A^T B / N for tables A (N, 2^a), B (N, 2^b), so that the (N, 2^L)
    probabilities are never made.
    """
    ones = logits.sigmoid()
    each = (F.softplus(logits) - logits * ones).sum(1).mean()
    batch = logits.new_zeros(())
    for group in ones.split(group_bits, dim=1):
        half = group.shape[1] // 2
        joint = _joint(group[:, :half]).T @ _joint(group[:, half:]) / len(group)
        batch = batch + _entropy(_over_processes(joint, training))
    return each, batch


def _joint(ones: Tensor) -> Tensor:
    """Probabilities (N, a) of independent bits -> (N, 2^a) of their patterns, the first bit the highest."""
    table = ones.new_ones(len(ones), 1)
    for bit in ones.unbind(1):
        table = torch.stack((table * (1 - bit[:, None]), table * bit[:, None]), dim=2).flatten(1)
    return table


def _entropy(probabilities: Tensor) -> Tensor:
    return -(probabilities * probabilities.clamp(min=1e-12).log()).sum()


def _over_processes(mean: Tensor, training: bool) -> Tensor:
    """Every process's `mean` averaged; each keeps the gradient of its own, whose average DDP takes."""
    return mean + (mean_over_processes(mean.detach()) - mean.detach()) if training else mean
