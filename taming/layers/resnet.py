"""Residual block and resampling of the published convolutional encoder and decoder."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from taming.layers.conv import norm_silu_conv, pad_conv, upsample_conv
from taming.layers.norm import group_norm, group_norm_silu


class ResidualBlock(nn.Module):
    """Norm, SiLU, 3x3, norm, SiLU, dropout, 3x3, plus the input (by a 1x1 where channels change).

    `recompute` keeps only the inputs of the two norms for backward.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        dropout: float = 0.0,
        norm_num_groups: int = 32,
        recompute: bool = True,
    ) -> None:
        super().__init__()
        self.dropout, self.recompute = dropout, recompute
        self.norm1 = group_norm(in_channels, norm_num_groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels, norm_num_groups)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        h = norm_silu_conv(x, self.norm1, self.conv1, recompute=self.recompute)
        if self.dropout and self.training:
            h = self.conv2(F.dropout(group_norm_silu(h, self.norm2, recompute=self.recompute), self.dropout))
        else:
            h = norm_silu_conv(h, self.norm2, self.conv2, recompute=self.recompute)
        # In place: no layer keeps its own output, and a fresh large tensor costs page faults.
        return h.add_(x if self.nin_shortcut is None else self.nin_shortcut(x))


class Downsample(nn.Module):
    """Half the size by a 3x3 convolution of stride 2 on a picture padded below and right."""

    def __init__(self, channels: int, *, recompute: bool = True) -> None:
        super().__init__()
        self.recompute = recompute
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return pad_conv(x, self.conv, recompute=self.recompute)


class Upsample(nn.Module):
    """Twice the size: nearest, then a 3x3 convolution."""

    def __init__(self, channels: int, *, recompute: bool = True) -> None:
        super().__init__()
        self.recompute = recompute
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return upsample_conv(x, self.conv, recompute=self.recompute)
