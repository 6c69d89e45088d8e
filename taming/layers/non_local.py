"""Self-attention over the cells of a map, as SAGAN's two networks have it (Zhang et al. 2019).

Axes: B pictures, C channels, H W cells, N = H W queries, M keys.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from taming.layers.spectral_conv import spectral_conv


class NonLocalBlock(nn.Module):
    """y = x + gamma * o(A g): every cell looks at all cells (arXiv:1805.08318, Eqs. 1 to 4).

    A = softmax over keys of theta(x)^T phi(x), without the root of the width. theta and phi give
    channels / key_ratio, g gives channels / value_ratio, o maps back; all are 1x1 convolutions of spectral
    norm one without bias. With `pool`, keys and values are the maxima of 2 x 2 cells. gamma is a scalar,
    begun at zero: the block is the identity until it has learned to look.

    The defaults are the released code's. The paper's text has values of channels / 8 and no pooling:
    value_ratio=8, pool=False.
    """

    def __init__(self, channels: int, *, key_ratio: int = 8, value_ratio: int = 2, pool: bool = True) -> None:
        super().__init__()
        key_width, value_width = max(1, channels // key_ratio), max(1, channels // value_ratio)
        self.pool = pool
        self.theta = spectral_conv(channels, key_width, 1, bias=False)
        self.phi = spectral_conv(channels, key_width, 1, bias=False)
        self.g = spectral_conv(channels, value_width, 1, bias=False)
        self.o = spectral_conv(value_width, channels, 1, bias=False)
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        query, key = self._queries_and_keys(x)
        value = _cells(self._pooled(self.g(x)))
        attended = F.scaled_dot_product_attention(query, key, value, scale=1.0)
        attended = rearrange(attended, "b 1 (h w) c -> b c h w", h=x.shape[2])
        result: Tensor = x + self.gamma * self.o(attended)
        return result

    def probabilities(self, x: Tensor) -> Tensor:
        """A (B, 1, N, M) of maps (B, C, H, W), for looking at; M is `key_grid(H, W)` in raster order."""
        query, key = self._queries_and_keys(x)
        return (query @ key.mT).softmax(-1)

    def key_grid(self, height: int, width: int) -> tuple[int, int]:
        """The grid of keys of a map of height x width cells."""
        return (-(-height // 2), -(-width // 2)) if self.pool else (height, width)

    def _queries_and_keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return _cells(self.theta(x)), _cells(self._pooled(self.phi(x)))

    def _pooled(self, x: Tensor) -> Tensor:
        # Windows over the edge of an odd map are of fewer cells; none is left out.
        return F.max_pool2d(x, 2, ceil_mode=True) if self.pool else x


def _cells(x: Tensor) -> Tensor:
    return rearrange(x, "b c h w -> b 1 (h w) c")
