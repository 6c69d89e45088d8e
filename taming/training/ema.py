"""Exponential moving average of a model's weights and buffers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


class Ema(AveragedModel):
    """Averaged copy of a model, in `.module`, always in eval mode.

    avg <- d avg + (1 - d) current with d = min(decay, (1 + n) / (10 + n)) after n updates, so that a short
    run is not held back by its initial weights. Floating-point buffers are averaged too, others copied.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        def average(
            averaged: tuple[Tensor, ...] | list[Tensor],
            current: tuple[Tensor, ...] | list[Tensor],
            count: Tensor | int,
        ) -> None:
            n = int(count)
            weight = 1 - min(decay, (1 + n) / (10 + n))
            if averaged[0].is_floating_point():
                torch._foreach_lerp_(list(averaged), list(current), weight)
            else:
                for old, new in zip(averaged, current, strict=True):
                    old.copy_(new)

        super().__init__(model, multi_avg_fn=average, use_buffers=True)
        self.requires_grad_(False)
        self.eval()

    def update(self, model: nn.Module) -> None:
        """Take one step towards the weights of `model` (unwrapped)."""
        self.update_parameters(model)

    def train(self, mode: bool = True) -> Ema:
        """Stay in eval mode: the average is only ever evaluated."""
        return super().train(False)
