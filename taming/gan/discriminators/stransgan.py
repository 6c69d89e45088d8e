"""STransGAN's discriminator: a few convolutions, then Swin blocks whose shortcuts are projected.

Xu et al. 2021 (arXiv:2110.13107); no code of theirs is public. Theirs are the tokeniser of convolutions, the
stages of two blocks at 64, 32, 16 and 8 for pictures of 256 px, the projections of the shortcuts, LeakyReLU
throughout and the equalised learning rate; ours are, where nothing is published, the widths, halving by a
strided convolution, and the head.

Axes: B pictures, C channels, H W pixels, N tokens of a map (h w), D width.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field, model_validator
from torch import Tensor, nn

from taming.config import Config
from taming.gan.discriminators.stylegan import append_batch_deviation
from taming.gan.heads import ProjectionHead
from taming.gan.stages import check_stages
from taming.layers.equalised import EqualisedConv2d, EqualisedLinear
from taming.layers.token_attention import MultiHeadAttention
from taming.layers.token_block import TokenBlock, TokenMLP
from taming.layers.token_norm import TokenLayerNorm


class STransGANDiscriminatorConfig(Config):
    """Swin stages behind a tokeniser of convolutions; each stage after the first halves the map."""

    kind: Literal["stransgan"] = "stransgan"
    takes_classes: ClassVar[bool] = True

    stem_halvings: int = Field(default=2, ge=0)
    """How often the tokeniser halves the picture: 2 for the published 4 pixels a token."""
    widths: tuple[int, ...] = Field(default=(128, 256, 512, 512), min_length=1)
    """Of each stage."""
    depths: tuple[int, ...] = Field(default=(2, 2, 2, 2), min_length=1)
    """Blocks of each stage."""
    num_heads: int = Field(default=4, ge=1)
    mlp_ratio: float = Field(default=2.0, gt=0)
    window: int = Field(default=8, ge=2, multiple_of=2)
    """Cells a side of the windows, which are shifted by half in every other block."""
    skip: Literal["projection", "identity"] = "projection"
    """Whether each shortcut passes a learned projection, or is the usual residual one."""
    head: Literal["picture", "tokens"] = "picture"
    """One verdict a picture, or one for each token of the last stage."""
    head_dim: int = Field(default=512, ge=1)
    group_size: int = Field(default=4, ge=1)
    """Pictures that the deviation over the batch is taken of; 1 leaves it out."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_stages(self.widths, self.depths, self.num_heads)
        return self

    def unsuited(self, height: int, width: int) -> str | None:
        """Why pictures of this size cannot be judged; None where they can."""
        for index in range(len(self.widths)):
            halvings = self.stem_halvings + index
            grid = (height >> halvings, width >> halvings)
            if min(grid) < 1 or (grid[0] << halvings, grid[1] << halvings) != (height, width):
                return (
                    "this STransGAN discriminator halves pictures "
                    f"{self.stem_halvings + len(self.widths) - 1} times, which {height}x{width} does not "
                    "allow; give fewer widths and depths, or a smaller stem_halvings"
                )
            if max(grid) > self.window and any(side % self.window for side in grid):
                return (
                    f"windows of {self.window} cells do not divide the {grid[0]}x{grid[1]} tokens that this "
                    f"STransGAN discriminator makes of {height}x{width}; choose another window or size"
                )
        return None


class STransGANDiscriminator(nn.Module):
    """Pictures (B, in_channels, H, W)[, classes (B,)] -> logits (B, 1), or (B, 1, h, w) of the last tokens.

    The head is the batch's deviation as one more channel, a dense layer of the whole map or of each token,
    LeakyReLU, and a logit, which agrees with a class's embedding where there are classes.
    """

    def __init__(
        self,
        config: STransGANDiscriminatorConfig,
        in_channels: int,
        size: tuple[int, int],
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        self.group_size, self.head_kind, self.size = config.group_size, config.head, size
        widths = config.widths
        self.tokeniser = Tokeniser(in_channels, widths[0], config.stem_halvings)
        self.stages = nn.ModuleList(
            Stage(config, width, depth) for width, depth in zip(widths, config.depths, strict=True)
        )
        self.halve = nn.ModuleList(EqualisedConv2d(a, b, 3, padding=1) for a, b in pairwise(widths))
        halvings = config.stem_halvings + len(widths) - 1
        cells = (size[0] >> halvings) * (size[1] >> halvings) if config.head == "picture" else 1
        self.dense = EqualisedLinear((widths[-1] + (config.group_size > 1)) * cells, config.head_dim)
        self.logits = ProjectionHead(config.head_dim, num_classes, "equalised")

    def forward(self, images: Tensor, y: Tensor | None = None) -> Tensor:
        h = self.tokeniser(images)
        for index, stage in enumerate(self.stages):
            if index:
                h = self.halve[index - 1](h, stride=2)
            h = stage(h)
        if self.group_size > 1:
            h = append_batch_deviation(h, self.group_size)
        if self.head_kind == "picture":
            return self._verdict(h.flatten(1), y)
        batch, _, height, width = h.shape
        cells = rearrange(h, "b d h w -> (b h w) d")
        classes = None if y is None else y.repeat_interleave(height * width)
        return rearrange(self._verdict(cells, classes), "(b h w) 1 -> b 1 h w", b=batch, h=height)

    def _verdict(self, features: Tensor, y: Tensor | None) -> Tensor:
        logits: Tensor = self.logits(_leaky(self.dense(features)), y)
        return logits


class Tokeniser(nn.Module):
    """(B, C, H, W) -> (B, width, H / 2^halvings, W / 2^halvings): convolutions, whose patches overlap."""

    def __init__(self, in_channels: int, width: int, halvings: int) -> None:
        super().__init__()
        widths = [max(1, width >> (halvings - index)) for index in range(halvings + 1)]
        self.from_rgb = EqualisedConv2d(in_channels, widths[0], 3, padding=1)
        self.halve = nn.ModuleList(EqualisedConv2d(a, b, 4, padding=1) for a, b in pairwise(widths))

    def forward(self, images: Tensor) -> Tensor:
        h = _leaky(self.from_rgb(images))
        for conv in self.halve:
            h = _leaky(conv(h, stride=2))
        return h


class Stage(nn.Module):
    """(B, D, h, w) -> (B, D, h, w): blocks in windows, those of every other one shifted by half."""

    def __init__(self, config: STransGANDiscriminatorConfig, width: int, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            make_block(config, width, shift=config.window // 2 if index % 2 else 0) for index in range(depth)
        )

    def forward(self, maps: Tensor) -> Tensor:
        height, width = maps.shape[2:]
        x = rearrange(maps, "b d h w -> b (h w) d")
        for block in self.blocks:
            x = block(x, grid=(height, width))
        return rearrange(x, "b (h w) d -> b d h w", h=height, w=width)


class SkipProjection(EqualisedLinear):
    """A shortcut's projection P, (..., D) -> (..., D), which starts as the identity over the root of two.

    Drawn at random, as other equalised weights are, a product of many P would squeeze most directions of
    the picture to nothing before training began. The identity would pass them all but let the shortcut
    outgrow the branches with depth, which P is there to prevent. Over the root of two, as in StyleGAN2's
    residual blocks, shortcut and branch of deviation one add up to deviation one, at every depth.
    """

    def __init__(self, width: int) -> None:
        super().__init__(width, width, bias=False)
        with torch.no_grad():
            self.weight.copy_(torch.eye(width) * math.sqrt(0.5) / self.gain)


def make_block(config: STransGANDiscriminatorConfig, width: int, *, shift: int) -> TokenBlock:
    """x <- P1 x + LeakyReLU(MSA(LN x)); x <- P2 x + LeakyReLU(MLP(LN x)), all equalised."""
    attention = MultiHeadAttention(
        width,
        config.num_heads,
        linear="equalised",
        relative_grid=(config.window, config.window),
        window=config.window,
        shift=shift,
    )
    mlp = TokenMLP(width, int(width * config.mlp_ratio), activation="leaky_relu", linear="equalised")
    projected = config.skip == "projection"
    return TokenBlock(
        attention,
        mlp,
        TokenLayerNorm(width),
        TokenLayerNorm(width),
        skip1=SkipProjection(width) if projected else None,
        skip2=SkipProjection(width) if projected else None,
        branch_activation=LeakyReLU,
    )


class LeakyReLU(nn.LeakyReLU):
    """With slope 0.2, as discriminators have it."""

    def __init__(self) -> None:
        super().__init__(0.2)


def _leaky(x: Tensor) -> Tensor:
    # The gain keeps the deviation at one.
    return F.leaky_relu(x, 0.2) * math.sqrt(2)
