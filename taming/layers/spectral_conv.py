"""Layers of spectral norm one with Xavier's weights, as SNGAN and SAGAN have them."""

from __future__ import annotations

from torch import nn

from taming.layers.spectral_norm import spectral_norm


def spectral_conv(in_channels: int, out_channels: int, size: int, *, bias: bool = True) -> nn.Conv2d:
    """(B, in_channels, H, W) -> (B, out_channels, H, W): a square kernel of odd `size`, padded with zeros.

    The weight is Xavier's (Glorot and Bengio 2010) before its norm is taken: it is the raw weight's length
    that says how far a step of the optimiser turns it.
    """
    conv = nn.Conv2d(in_channels, out_channels, size, padding=size // 2, bias=bias)
    nn.init.xavier_uniform_(conv.weight)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return spectral_norm(conv)
