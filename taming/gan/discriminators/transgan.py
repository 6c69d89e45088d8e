"""TransGAN's discriminator (Jiang et al. 2021, arXiv:2102.07074): patches as tokens, at one or more scales.

As first published: one convolution to 8x8 patches, learned positions, seven blocks with a class token. As
released: finer patches first, blocks with relative position bias, pooling, and coarser patches joined to the
tokens before the next blocks; a class token meets them in the last block only.

The papers know no classes: here the class token's logit is a projection head's.

Axes: B pictures, N tokens of a grid h w, D width, C channels, H W pixels.
"""

from __future__ import annotations

from itertools import accumulate
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field, model_validator
from torch import Tensor, nn

from taming.config import Config
from taming.errors import ConfigError
from taming.gan.heads import ClassToken, ProjectionHead, TokenHead
from taming.layers.token_attention import MultiHeadAttention
from taming.layers.token_block import TokenBlock, TokenMLP
from taming.layers.token_norm import PixelNorm, TokenLayerNorm

Grid = tuple[int, int]


class TransGANDiscriminatorConfig(Config):
    """The defaults are the released settings for 32x32."""

    kind: Literal["transgan"] = "transgan"
    takes_classes: ClassVar[bool] = True
    patch_size: int = Field(2, ge=1)
    """Pixels a side of the finest patches; each scale doubles it."""
    patch_widths: tuple[int, ...] = Field((288, 96), min_length=1)
    """Channels that each scale's patches bring; a scale's tokens are as wide as all up to it together."""
    depths: tuple[int, ...] = (3, 3)
    """Blocks of each scale; 0 where patches are joined and go on."""
    head: Literal["class_token", "tokens"] = "class_token"
    """tokens: a logit for each token of the coarsest scale, as stage one may want; it judges no classes."""
    head_depth: int = Field(1, ge=0)
    """Blocks before the head, without relative bias, in which the class token meets the others."""
    num_heads: int = Field(4, ge=1)
    mlp_ratio: int = Field(4, ge=1)
    norm: Literal["layer", "pixel"] = "layer"
    relative_bias: bool = True
    """A learned bias for each offset of two tokens in the scales' blocks; false as first published."""
    window: int | None = Field(16, ge=1)
    """Cells a side of the windows in which all blocks but the last of a scale attend, where it has
    `window_from` cells a side or more; null: none has windows."""
    window_from: int = Field(64, ge=1)

    @model_validator(mode="after")
    def _fits(self) -> TransGANDiscriminatorConfig:
        if len(self.depths) != len(self.patch_widths) or min(self.depths) < 0:
            raise ValueError(
                f"depths {self.depths} does not fit patch_widths {self.patch_widths}: give one depth of 0 or "
                "more a scale"
            )
        if min(self.patch_widths) < 1:
            raise ValueError(f"patch_widths {self.patch_widths} must be 1 or more each")
        for width, depth in zip(self.widths, self.depths, strict=True):
            if width % self.num_heads and (depth or width == self.widths[-1]):
                raise ValueError(
                    f"patch_widths {self.patch_widths}: tokens of width {width} are not divisible by "
                    f"num_heads {self.num_heads}; use fewer heads or another width"
                )
        if self.head == "class_token" and not self.head_depth:
            raise ValueError("head_depth 0: the class token meets no other; use 1 or more, or head: tokens")
        return self

    @property
    def widths(self) -> tuple[int, ...]:
        """Of the tokens of each scale."""
        return tuple(accumulate(self.patch_widths))

    def grids(self, height: int, width: int) -> list[Grid]:
        """(h, w) of each scale's tokens for pictures of a size."""
        patches = [self.patch_size << index for index in range(len(self.patch_widths))]
        return [(height // patch, width // patch) for patch in patches]

    def unsuited(self, height: int, width: int) -> str | None:
        """Why pictures of this size cannot be judged; None where they can."""
        coarsest = self.patch_size << (len(self.patch_widths) - 1)
        if height % coarsest or width % coarsest:
            return (
                f"transgan's discriminator cuts pictures into patches of {coarsest} pixels, which "
                f"{height}x{width} is not divisible by; use another size, patch_size or fewer patch_widths"
            )
        for h, w in self.grids(height, width):
            window = self.window_of((h, w))
            if window is not None and (h % window or w % window):
                return (
                    f"transgan's window {window} does not divide the {h}x{w} tokens of a scale; use another "
                    f"window, or window_from above {max(h, w)}"
                )
        return None

    def window_of(self, grid: Grid) -> int | None:
        """The window of a scale of that grid; None where all its tokens attend to all."""
        if self.window is None or max(grid) < self.window_from or max(grid) <= self.window:
            return None
        return self.window


class TransGANDiscriminator(nn.Module):
    """Pictures (B, C, *size)[, classes (B,)] -> logits (B, 1), or (B, 1, h, w) of the coarsest patches."""

    def __init__(
        self, config: TransGANDiscriminatorConfig, in_channels: int, size: Grid, num_classes: int | None
    ) -> None:
        super().__init__()
        if config.head == "tokens" and num_classes is not None:
            raise ConfigError("transgan's head: tokens judges no classes; use head: class_token")
        grids = config.grids(*size)
        self.scales = nn.ModuleList(
            Scale(config, index, in_channels, grid) for index, grid in enumerate(grids)
        )
        self.grid, width = grids[-1], config.widths[-1]
        self.token = ClassToken(width) if config.head == "class_token" else None
        # A class token has no place, and so no distance to others.
        self.blocks = nn.ModuleList(_block(config, width) for _ in range(config.head_depth))
        self.norm = _norm(config, width)
        self.head: nn.Module
        if self.token is None:
            self.head = TokenHead(width)
        else:
            self.head = ProjectionHead(width, num_classes)

    def forward(self, images: Tensor, y: Tensor | None = None) -> Tensor:
        tokens: Tensor | None = None
        for scale in self.scales:
            tokens = scale(images, tokens)
        assert tokens is not None
        if self.token is not None:
            tokens = self.token(tokens)
        for block in self.blocks:
            tokens = block(tokens, grid=self.grid if self.token is None else None)
        tokens = self.norm(tokens)
        if self.token is None:
            logits: Tensor = self.head(tokens, self.grid)
        else:
            logits = self.head(tokens[:, 0], y)
        return logits


class Scale(nn.Module):
    """Patches of one size joined to the pooled tokens of the scale before, their position, and blocks."""

    def __init__(self, config: TransGANDiscriminatorConfig, index: int, in_channels: int, grid: Grid) -> None:
        super().__init__()
        self.grid = grid
        patch, width = config.patch_size << index, config.widths[index]
        self.patches = nn.Conv2d(in_channels, config.patch_widths[index], patch, patch)
        num_tokens = grid[0] * grid[1]
        self.position = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, num_tokens, width), std=0.02))
        window, depth = config.window_of(grid), config.depths[index]
        # The last block sees the whole grid again.
        self.blocks = nn.ModuleList(
            _block(config, width, grid, window if place < depth - 1 else None) for place in range(depth)
        )

    def forward(self, images: Tensor, finer: Tensor | None) -> Tensor:
        """(B, C, H, W), and tokens of twice the cells a side or None -> (B, N, D)."""
        maps = self.patches(images)
        if finer is not None:
            pooled = F.avg_pool2d(rearrange(finer, "b (h w) d -> b d h w", h=2 * self.grid[0]), 2)
            maps = torch.cat((pooled, maps), dim=1)
        tokens = rearrange(maps, "b d h w -> b (h w) d") + self.position
        for block in self.blocks:
            tokens = block(tokens, grid=self.grid)
        return tokens


def _block(
    config: TransGANDiscriminatorConfig, width: int, grid: Grid | None = None, window: int | None = None
) -> TokenBlock:
    """One block; where it is given a grid, with the relative bias that the config may want."""
    attention = MultiHeadAttention(
        width,
        config.num_heads,
        qkv_bias=False,
        relative_grid=grid if config.relative_bias else None,
        window=window,
    )
    mlp = TokenMLP(width, width * config.mlp_ratio)
    return TokenBlock(attention, mlp, _norm(config, width), _norm(config, width))


def _norm(config: TransGANDiscriminatorConfig, width: int) -> nn.Module:
    return TokenLayerNorm(width) if config.norm == "layer" else PixelNorm()
