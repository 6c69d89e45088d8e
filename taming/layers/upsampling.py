"""More cells for a grid of tokens.

Axes: B pictures, h w cells, D width.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from taming.layers.token_attention import Grid


def shuffle_tokens(x: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
    """(B, h w, D) -> (B, 2h 2w, D / 4) and the grid (2h, 2w): each token becomes four (Shi et al. 2016,
    arXiv:1609.05158); D is a multiple of 4."""
    height, width = grid
    shuffled = rearrange(x, "b (h w) (d p q) -> b (h p w q) d", h=height, w=width, p=2, q=2)
    return shuffled, (2 * height, 2 * width)


def resize_tokens(
    x: Tensor, grid: Grid, size: Grid, mode: Literal["bilinear", "bicubic"] = "bilinear"
) -> tuple[Tensor, Grid]:
    """(B, h w, D) -> (B, h' w', D) and the grid `size` (h', w'), interpolated."""
    cells = rearrange(x, "b (h w) d -> b d h w", h=grid[0], w=grid[1])
    larger = F.interpolate(cells, size=size, mode=mode, align_corners=False)
    return rearrange(larger, "b d h w -> b (h w) d"), size
