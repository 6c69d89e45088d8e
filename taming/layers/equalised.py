"""Layers whose weights are drawn from N(0, 1) and scaled at run time by the root of their fan-in.

So that a step of Adam means the same in every layer (Karras et al. 2018, arXiv:1710.10196, 4.1): one of rate
lr moves the effective weight by lr / sqrt(fan_in).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class EqualisedConv2d(nn.Module):
    """A convolution (B, C, H, W) -> (B, C', H', W')."""

    def __init__(
        self, in_channels: int, out_channels: int, size: int, *, padding: int = 0, bias: bool = True
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, size, size))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self.gain = 1 / math.sqrt(in_channels * size**2)
        self.padding = padding

    @property
    def effective_weight(self) -> Tensor:
        """What the input meets."""
        return self.weight * self.gain

    def forward(self, x: Tensor, stride: int = 1) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        return F.conv2d(x, self.effective_weight, self.bias, stride, self.padding)


class EqualisedLinear(nn.Module):
    """A dense layer (..., C) -> (..., C').

    `lr_multiplier` slows or speeds both weight and bias (Karras et al. 2019, arXiv:1812.04948, the mapping
    network).
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, lr_multiplier: float = 1.0
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / lr_multiplier)
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self.lr_multiplier = lr_multiplier
        self.gain = lr_multiplier / math.sqrt(in_features)

    @property
    def effective_weight(self) -> Tensor:
        """What the input meets."""
        return self.weight * self.gain

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias * self.lr_multiplier
        return F.linear(x, self.effective_weight, bias)
