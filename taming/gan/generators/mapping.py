"""Noise and classes to a style.

Axes: B pictures, Z noise, S style.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taming.layers.equalised import EqualisedLinear

LR_MULTIPLIER = 0.01


class MappingNetwork(nn.Module):
    """Noise (B, Z)[, classes (B,) int64] -> styles (B, S) (Karras et al. 2019, StyleGAN, arXiv:1812.04948).

    Noise is brought to length sqrt(Z), so is the class's embedding beside it (as in StyleGAN2-ADA, Karras et
    al. 2020, arXiv:2006.06676); `num_layers` equalised layers with LeakyReLU follow, which learn
    `lr_multiplier` times as fast as the rest. What is no noise, and may be near zero, is not brought to a
    length (`normalised`), which would blow it up.
    """

    def __init__(
        self,
        noise_dim: int,
        style_dim: int,
        num_layers: int,
        num_classes: int | None = None,
        *,
        lr_multiplier: float = LR_MULTIPLIER,
        normalised: bool = True,
    ) -> None:
        super().__init__()
        self.normalised = normalised
        self.embed = None if num_classes is None else nn.Embedding(num_classes, noise_dim)
        width = noise_dim * (2 if self.embed is not None else 1)
        self.layers = nn.ModuleList(
            EqualisedLinear(style_dim if index else width, style_dim, lr_multiplier=lr_multiplier)
            for index in range(num_layers)
        )

    def forward(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """`y` is needed where there are classes, and else ignored."""
        h = _to_length(z) if self.normalised else z
        if self.embed is not None:
            assert y is not None, "a conditional mapping network needs classes"
            h = torch.cat((h, _to_length(self.embed(y))), dim=1)
        for layer in self.layers:
            h = F.leaky_relu(layer(h), 0.2) * math.sqrt(2)
        return h


def _to_length(x: Tensor) -> Tensor:
    """Mean square one over the channels (B, C)."""
    return x * (x.float().square().mean(1, keepdim=True) + 1e-8).rsqrt().to(x.dtype)
