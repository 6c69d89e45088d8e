"""Layers whose weights are scaled, input by input, by a style: W' = s(style) * W.

Equalised (see `equalised.py`). With demodulation each row of W' is divided by its length, so that the scale
of the style does not reach the output (Karras et al. 2020, StyleGAN2, arXiv:1912.04958, Eqs. 1 and 3). The
input is scaled in place of the weight, which is the same and needs no weight a sample.

Axes: B samples, C channels in, C' out, S style, P points, H W pixels.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taming.layers.equalised import EqualisedLinear

EPS = 1e-8


class ModulatedLinear(nn.Module):
    """Points (..., P, C) and styles (..., S) -> (..., P, C'); all the points of one place share its style."""

    def __init__(
        self, in_features: int, out_features: int, style_dim: int, *, demodulate: bool = True
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features))
        self.scale = EqualisedLinear(style_dim, in_features)
        self.gain = 1 / math.sqrt(in_features)
        self.demodulate = demodulate

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        """The leading axes of `x` and `style` broadcast."""
        scale = 1 + self.scale(style)  # (..., C)
        weight = self.weight * self.gain
        out = F.linear(x * scale.unsqueeze(-2), weight)
        if self.demodulate:
            out = out * _inverse_length(scale, weight.square()).unsqueeze(-2)
        return out + self.bias


class ModulatedConv2d(nn.Module):
    """Maps (B, C, H, W) and styles (B, S) -> (B, C', H, W); `size` is odd."""

    def __init__(
        self, in_channels: int, out_channels: int, size: int, style_dim: int, *, demodulate: bool = True
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, size, size))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.scale = EqualisedLinear(style_dim, in_channels)
        self.gain = 1 / math.sqrt(in_channels * size**2)
        self.demodulate = demodulate

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        scale = 1 + self.scale(style)  # (B, C)
        weight = self.weight * self.gain
        out = F.conv2d(x * scale[..., None, None], weight, padding=weight.shape[-1] // 2)
        if self.demodulate:
            squares = weight.square().sum((2, 3))  # (C', C)
            out = out * _inverse_length(scale, squares)[..., None, None]
        return out + self.bias[:, None, None]


def _inverse_length(scale: Tensor, squares: Tensor) -> Tensor:
    """1 / |row of W'|, (..., C'), of scales (..., C) and squared weights (C', C)."""
    return (F.linear(scale.square(), squares) + EPS).rsqrt()
