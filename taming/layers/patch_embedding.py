"""Pictures to tokens.

Axes: B pictures, C channels, H W pixels, P patch size, N tokens (a grid h w of cells), D width.
"""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from taming.layers.linears import LinearKind, make_linear


class PatchEmbedding(nn.Module):
    """Pictures (B, C, H, W) -> tokens (B, N, D) in raster order, N = (H / P) (W / P).

    A token sees the `overlap` pixels on each side of its patch, too: (P + 2 overlap)^2 pixels in steps of P,
    zeros outside of the picture (ViTGAN, Lee et al. 2021, arXiv:2107.04589, "overlapping image patches"). The
    number of tokens is that without overlap.
    """

    def __init__(
        self, in_channels: int, width: int, patch_size: int, *, overlap: int = 0, linear: LinearKind = "plain"
    ) -> None:
        super().__init__()
        self.patch_size, self.overlap = patch_size, overlap
        self.linear = make_linear(linear, in_channels * (patch_size + 2 * overlap) ** 2, width)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """The cells of pictures of this size, which P must divide."""
        assert height % self.patch_size == 0
        assert width % self.patch_size == 0
        return height // self.patch_size, width // self.patch_size

    def forward(self, images: Tensor) -> Tensor:
        patches = F.unfold(
            images, self.patch_size + 2 * self.overlap, padding=self.overlap, stride=self.patch_size
        )
        tokens: Tensor = self.linear(rearrange(patches, "b pixels n -> b n pixels"))
        return tokens
