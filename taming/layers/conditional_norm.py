"""Normalisation of maps whose scale and shift follow a class.

Axes: B pictures, C channels, H W cells, K classes.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from taming.layers.batch_norm import SharedBatchNorm2d

MapNorm = Literal["batch", "group"]
GROUPS = (32, 16, 8, 4, 2, 1)


class ConditionalNorm(nn.Module):
    """(B, C, H, W) -> the same shape: gamma_y * (x - mean) / deviation + beta_y.

    Conditional batch normalisation (Dumoulin et al. 2017, arXiv:1610.07629; de Vries et al. 2017,
    arXiv:1707.00683): gamma and beta are tables of a row a class, begun at one and zero. `norm` "group"
    takes the statistics of a picture's groups of channels instead, which neither mix pictures nor differ
    between training and use. With num_classes None one gamma and one beta serve all.
    """

    def __init__(self, channels: int, num_classes: int | None = None, *, norm: MapNorm = "batch") -> None:
        super().__init__()
        self.num_classes = num_classes
        groups = next(n for n in GROUPS if channels % n == 0)
        self.norm: nn.Module = (
            SharedBatchNorm2d(channels, affine=False)
            if norm == "batch"
            else nn.GroupNorm(groups, channels, affine=False)
        )
        rows = 1 if num_classes is None else num_classes
        self.gamma = nn.Parameter(torch.ones(rows, channels))
        self.beta = nn.Parameter(torch.zeros(rows, channels))

    def forward(self, x: Tensor, classes: Tensor | None = None) -> Tensor:
        """`classes` (B, K) are weights of the classes: one-hot for a class, a mixture for what lies between.

        They must be given where num_classes is, and are ignored where it is not.
        """
        gamma: Tensor = self.gamma  # (1, C)
        beta: Tensor = self.beta
        if self.num_classes is not None:
            assert classes is not None, "a conditional norm needs the classes"
            with torch.autocast(x.device.type, enabled=False):  # a row of the table as it is
                weights = classes.to(gamma.dtype)
                gamma, beta = weights @ gamma, weights @ beta  # (B, C)
        normalised = self.norm(x)
        gamma, beta = gamma.to(normalised.dtype), beta.to(normalised.dtype)
        return torch.addcmul(beta[:, :, None, None], normalised, gamma[:, :, None, None])
