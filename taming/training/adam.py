"""Adam as all runs have it."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.optim import AdamW

from taming.training.config import OptimizerConfig


def adam(weights: Iterable[nn.Parameter], config: OptimizerConfig) -> AdamW:
    """Adam with decoupled weight decay over those of `weights` that are to be trained."""
    return AdamW(
        [weight for weight in weights if weight.requires_grad],
        lr=config.learning_rate,
        betas=config.betas,
        weight_decay=config.weight_decay,
        fused=True,
    )
