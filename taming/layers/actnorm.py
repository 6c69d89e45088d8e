"""A scale and a shift a channel, set from the first batch (Glow, arXiv:1807.03039)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from taming.collective import mean_over_processes


class ActNorm(nn.Module):
    """scale * (x + loc) for x (B, C, H, W), which unlike batch normalisation does not mix pictures.

    The first batch in train mode, over all processes, sets loc and scale so that it comes out with mean 0
    and deviation 1 in each channel; from then on both are learned. Names are those of published weights.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.scale = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.initialized: Tensor
        self.register_buffer("initialized", torch.zeros((), dtype=torch.uint8))
        self.ready = False
        """Whether loc and scale are known to be set."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and not self.ready:
            self._start_from(x)
        return self.scale * (x + self.loc)

    @torch.no_grad()
    def _start_from(self, x: Tensor) -> None:
        # The flag is read from the device once, not in every step.
        self.ready = True
        if self.initialized:
            return
        # In float64: a difference of squares, whose rounding the scale would carry through the whole run.
        x = x.double()
        mean, square = mean_over_processes(torch.stack((x.mean((0, 2, 3)), x.square().mean((0, 2, 3)))))
        deviation = (square - mean.square()).clamp(min=0).sqrt()
        self.loc.copy_(-mean[None, :, None, None])
        self.scale.copy_(1 / (deviation[None, :, None, None] + 1e-6))
        self.initialized.fill_(1)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.ready = False
        super()._load_from_state_dict(*args, **kwargs)
