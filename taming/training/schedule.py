"""The learning rate as a pure function of the global step.

No scheduler object: nothing to save, the same trace on any number of processes, exact after a resume.
"""

from __future__ import annotations

import math

from torch.optim import Optimizer

from taming.training.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Rate for `step` in [0, total_steps): linear warm-up, then constant, cosine or linear decay.

    The last step is computed at `final_ratio` of the peak for cosine and linear.
    """
    peak = config.learning_rate
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return peak
    decay_steps = max(total_steps - 1 - config.warmup_steps, 1)
    progress = min((step - config.warmup_steps) / decay_steps, 1.0)
    if config.schedule == "cosine":
        remaining = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        remaining = 1 - progress
    return peak * (config.final_ratio + (1 - config.final_ratio) * remaining)


def set_learning_rate(optimizer: Optimizer, value: float) -> None:
    """Give every parameter group the rate `value`."""
    for group in optimizer.param_groups:
        group["lr"] = value
