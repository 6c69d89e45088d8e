"""Self-attention over the cells of a picture, one head, as in the published encoder and decoder."""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from taming.layers.norm import group_norm


class SpatialAttention(nn.Module):
    """x + proj_out(softmax(q k^T / sqrt(C)) v), q, k, v 1x1 convolutions of the normalised x (B, C, H, W)."""

    def __init__(self, channels: int, norm_num_groups: int = 32) -> None:
        super().__init__()
        self.norm = group_norm(channels, norm_num_groups)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        height = x.shape[-2]
        normalised = self.norm(x).to(x.dtype)
        q, k, v = (
            rearrange(layer(normalised), "b c h w -> b 1 (h w) c") for layer in (self.q, self.k, self.v)
        )
        attended = F.scaled_dot_product_attention(q, k, v)
        attended = rearrange(attended, "b 1 (h w) c -> b c h w", h=height)
        return x + self.proj_out(attended)
