"""Convolutions whose weight has spectral norm one (Miyato et al. 2018, arXiv:1802.05957)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm


class SpectralConv2d(nn.Conv2d):
    """A convolution with weight / sigma(weight), the weight seen as (C', C * k * k).

    Each forward in train mode takes one more step of the power iteration, whose vectors are saved with the
    weights. sigma is computed in fp32 whatever the autocast, and its gradient is exact, twice.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        spectral_norm(self)

    @property
    def directions(self) -> tuple[Tensor, Tensor]:
        """The power iteration's two vectors, which every forward in train mode moves."""
        norm = self.get_submodule("parametrizations.weight.0")
        return norm.get_buffer("_u"), norm.get_buffer("_v")

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            weight = self.weight
        return self._conv_forward(x, weight, self.bias)
