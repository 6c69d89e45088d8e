"""STransGAN's generator: transformer blocks from 4x4 tokens on, in shifted windows where maps are large.

Xu et al. 2021 (arXiv:2110.13107). No code of theirs is public. Theirs are the order of stages, the depths
at 32 px, width 512, 4 heads, an MLP of twice the width, and the three places of the class in a block; ours
are, where nothing is published, the widths beyond 32 px, the windows (8, shifted by 4 in every other block,
from 32x32 on), learned positions, and doubling by bilinear interpolation before a dense layer.

Axes: B pictures, Z noise, N tokens of a map (h w), D width, S style, C channels, H W pixels.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal, Self

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field, model_validator
from torch import Tensor, nn

from taming.config import Config
from taming.errors import ConfigError, UserError
from taming.gan.generator import Generator, Painted, StemOutput, Trunk
from taming.gan.stages import check_stages
from taming.layers.modulation import SelfModulatedLayerNorm, TokenAdaIN
from taming.layers.token_attention import MultiHeadAttention
from taming.layers.token_block import TokenBlock, TokenMLP
from taming.layers.token_norm import NoNorm, TokenLayerNorm
from taming.layers.upsampling import resize_tokens

SMALLEST = 4
"""Cells a side of the first stage."""
POSITION_GAIN = 0.1
"""Positions start at zero and learn at a tenth of the rate. Adam moves each by the whole rate in every step,
however small its gradient: those of large maps walk at random, into a grain that all pictures share."""

ClassPlace = Literal["branches", "trunk", "after_attention"]
StyleNorm = Literal["adain", "layer"]


class STransGANGeneratorConfig(Config):
    """Stages of 4x4, 8x8, 16x16, ... tokens: a picture of 4 * 2^k pixels a side uses the first k + 1."""

    kind: Literal["stransgan"] = "stransgan"
    noise_dim: int = Field(default=512, ge=1)
    widths: tuple[int, ...] = Field(default=(512, 512, 512, 512, 256, 128, 64), min_length=1)
    """Of each stage, from 4x4 on."""
    depths: tuple[int, ...] = Field(default=(1, 2, 2, 3, 2, 2, 2), min_length=1)
    """Blocks of each stage."""
    num_heads: int = Field(default=4, ge=1)
    mlp_ratio: float = Field(default=2.0, gt=0)
    window: int = Field(default=8, ge=2, multiple_of=2)
    """Cells a side of the windows in which large maps attend."""
    windowed_from: int = Field(default=32, ge=1)
    """Cells a side from which on a stage attends in windows; smaller ones attend everywhere."""
    class_place: ClassPlace = "trunk"
    """Where style and class enter a block (their Fig. 6): instead of LayerNorm in both branches; on the trunk
    after attention, so that no shortcut passes it by; or on attention's output."""
    class_norm: StyleNorm = "adain"
    """What they modulate: normalisation of each channel over the tokens, or of each token."""
    class_dim: int = Field(default=128, ge=1)
    """Width of a class's embedding."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_stages(self.widths, self.depths, self.num_heads)
        if self.windowed_from < self.window:
            raise ValueError(
                f"maps from {self.windowed_from} on have no windows of {self.window}; raise windowed_from"
            )
        return self

    def unsuited(self, height: int, width: int) -> str | None:
        """Why pictures of this size cannot be painted; None where they can."""
        stage = stage_of((height, width))
        if min(height, width) < SMALLEST:
            return f"STransGAN paints pictures from {SMALLEST}x{SMALLEST} on, not {height}x{width}"
        if stage >= len(self.widths):
            return (
                f"this STransGAN generator has {len(self.widths)} stages, up to "
                f"{SMALLEST * 2 ** (len(self.widths) - 1)} pixels a side; {height}x{width} takes {stage + 1} "
                "widths and depths"
            )
        return None


def stage_of(grid: tuple[int, int]) -> int:
    """The stage of maps of this size: 0 below 8 cells a side, 1 below 16, 2 below 32, ..."""
    return max(0, (min(grid) // SMALLEST).bit_length() - 1)


def generator(
    config: STransGANGeneratorConfig, size: tuple[int, int], channels: int, num_classes: int | None
) -> Generator:
    """Noise -> pictures (B, channels, *size). Raises ConfigError unless that is 4 * 2^k squared."""
    style_dim = None if num_classes is None else config.noise_dim + config.class_dim
    start = (SMALLEST, SMALLEST)
    built = STransGANTrunk(config, start, size, channels, style_dim)
    stem = STransGANStem(config.noise_dim, config.widths[0], num_classes, config.class_dim)
    return Generator(stem, built, config.noise_dim, num_classes)


def trunk(
    config: STransGANGeneratorConfig, start: tuple[int, int], size: tuple[int, int], channels: int
) -> Trunk:
    """Maps (B, in_channels, *start) -> pictures (B, channels, *size), entering at the stage of their size."""
    return STransGANTrunk(config, start, size, channels)


class STransGANStem(nn.Module):
    """Noise (B, Z) -> 4x4 tokens; the style of conditional blocks is [noise; embedding of the class]."""

    def __init__(self, noise_dim: int, width: int, num_classes: int | None, class_dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(noise_dim, width), nn.GELU(), nn.Linear(width, width * SMALLEST * SMALLEST)
        )
        # Blocks at a deviation of 0.02 keep what they are given; noise that came in that small would be lost
        # among the positions.
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight)
                nn.init.zeros_(layer.bias)
        self.embed = None if num_classes is None else nn.Embedding(num_classes, class_dim)

    def forward(self, z: Tensor, y: Tensor | None = None) -> StemOutput:
        """(B, Z), classes (B,) int64 -> maps (B, D, 4, 4), style (B, Z + class_dim) or None."""
        features = rearrange(self.mlp(z), "b (d h w) -> b d h w", h=SMALLEST, w=SMALLEST)
        if self.embed is None:
            return StemOutput(features, None)
        assert y is not None, "Generator gives classes to a conditional stem"
        return StemOutput(features, torch.cat((z, self.embed(y)), dim=1))


class STransGANTrunk(Trunk):
    """Maps (B, in_channels, h, w)[, style] -> pictures (B, C, h * f, w * f), f = size / start.

    Blocks are modulated where `style_dim` is given, and plain pre-norm ones where it is None. Positions are
    interpolated for maps of another size than `start`: windows make stages as large as one likes affordable,
    and those that attend everywhere cost the square of their cells.
    """

    def __init__(
        self,
        config: STransGANGeneratorConfig,
        start: tuple[int, int],
        size: tuple[int, int],
        channels: int,
        style_dim: int | None = None,
    ) -> None:
        factor = max(1, size[0] // start[0])
        if (start[0] * factor, start[1] * factor) != size or factor & (factor - 1):
            raise ConfigError(
                f"STransGAN doubles maps: from {start[0]}x{start[1]} it cannot paint {size[0]}x{size[1]}, "
                "which is not a power of two times as large"
            )
        first = stage_of(start)
        widths = config.widths[first : first + factor.bit_length()]
        depths = config.depths[first : first + factor.bit_length()]
        super().__init__(widths[0], start, size)
        self.style_dim = style_dim
        self.stages = nn.ModuleList(
            Stage(config, (start[0] * 2**i, start[1] * 2**i), width, depth, style_dim)
            for i, (width, depth) in enumerate(zip(widths, depths, strict=True))
        )
        # Windows of the first stage that has them must divide its map, and then divide all that follow.
        windowed = [2**i for i in range(len(widths)) if min(start) * 2**i >= config.windowed_from]
        window = math.lcm(windowed[0], config.window) // windowed[0] if windowed else 1
        self.step = window * factor
        if size[0] % self.step or size[1] % self.step:
            raise ConfigError(
                f"windows of {config.window} cells do not divide the maps on the way to {size[0]}x{size[1]}; "
                f"choose sides that {self.step} divides, or another window"
            )
        self.widen = nn.ModuleList(_dense(narrow, wide) for narrow, wide in pairwise(widths))
        self.norm = TokenLayerNorm(widths[-1])
        self.to_rgb = _dense(widths[-1], channels, deviation=0.5)

    def forward(self, features: Tensor, style: Tensor | None = None) -> Painted:
        assert (style is None) == (self.style_dim is None), "a style for modulated blocks, and for no others"
        height, width = features.shape[2:]
        grid = (height, width)
        x = rearrange(features, "b d h w -> b (h w) d")
        for index, stage in enumerate(self.stages):
            if index:
                x, grid = resize_tokens(x, grid, (2 * grid[0], 2 * grid[1]))
                x = self.widen[index - 1](x)
            x = stage(x, style, grid)
        last = rearrange(self.norm(x, style), "b (h w) d -> b d h w", h=grid[0], w=grid[1])
        return Painted(self.paint(last), (last.detach(),))

    def paint(self, *features: Tensor) -> Tensor:
        """(B, D, H, W) -> (B, C, H, W)."""
        (last,) = features
        return F.conv2d(last, self.to_rgb.weight[:, :, None, None], self.to_rgb.bias)

    @property
    def last_layer(self) -> nn.Parameter:
        assert isinstance(self.to_rgb.weight, nn.Parameter)
        return self.to_rgb.weight

    def check_size(self, height: int, width: int) -> None:
        """Raises UserError for sides that are no multiples of what its doublings and windows take."""
        if min(height, width) < 1 or height % self.step or width % self.step:
            raise UserError(
                f"this STransGAN paints pictures with sides that {self.step} divides, not {height}x{width}"
            )


class Stage(nn.Module):
    """The blocks of one size of map, with a learned position for each of its cells."""

    def __init__(
        self,
        config: STransGANGeneratorConfig,
        grid: tuple[int, int],
        width: int,
        depth: int,
        style_dim: int | None,
    ) -> None:
        super().__init__()
        self.grid = grid
        self.position = nn.Parameter(torch.zeros(1, grid[0] * grid[1], width))
        windowed = min(grid) >= config.windowed_from
        self.blocks = nn.ModuleList(
            make_block(
                config,
                width,
                style_dim,
                window=config.window if windowed else None,
                shift=config.window // 2 if windowed and index % 2 else 0,
            )
            for index in range(depth)
        )

    def forward(self, x: Tensor, style: Tensor | None, grid: tuple[int, int]) -> Tensor:
        """(B, N, D) of a grid (h, w), style (B, S) or None -> (B, N, D)."""
        position = POSITION_GAIN * self.position
        if grid != self.grid:
            position, _ = resize_tokens(position, self.grid, grid)
        x = x + position.to(x.dtype)
        for block in self.blocks:
            x = block(x, style, grid=grid)
        return x


def make_block(
    config: STransGANGeneratorConfig,
    width: int,
    style_dim: int | None,
    *,
    window: int | None,
    shift: int,
) -> TokenBlock:
    """One block; with MSA and MLP the branches, LN without style and A the norm that style modulates:

    no style:         x <- x + MSA(LN x);                  x <- x + MLP(LN x)
    branches:         x <- x + MSA(A x);                   x <- x + MLP(A x)
    trunk:            x <- x + MSA(LN x);  x <- A x;       x <- x + MLP(x)
    after_attention:  x <- x + A MSA(LN x);                x <- x + MLP(LN x)
    """
    attention = MultiHeadAttention(
        width,
        config.num_heads,
        relative_grid=None if window is None else (window, window),
        window=window,
        shift=shift,
    )
    mlp = TokenMLP(width, int(width * config.mlp_ratio))
    if style_dim is None:
        return TokenBlock(attention, mlp, TokenLayerNorm(width), TokenLayerNorm(width))
    match config.class_place:
        case "branches":
            norms = _style_norm(config, width, style_dim), _style_norm(config, width, style_dim)
            return TokenBlock(attention, mlp, *norms)
        case "trunk":
            styled = _style_norm(config, width, style_dim)
            return TokenBlock(attention, mlp, TokenLayerNorm(width), NoNorm(), trunk_norm=styled)
        case "after_attention":
            styled = _style_norm(config, width, style_dim)
            return TokenBlock(
                attention, mlp, TokenLayerNorm(width), TokenLayerNorm(width), attention_norm=styled
            )


def _style_norm(config: STransGANGeneratorConfig, width: int, style_dim: int) -> nn.Module:
    if config.class_norm == "adain":
        return TokenAdaIN(width, style_dim)
    return SelfModulatedLayerNorm(width, style_dim)


def _dense(in_features: int, out_features: int, deviation: float = 1.0) -> nn.Linear:
    """A dense layer whose outputs have this deviation at the start, for inputs of deviation one."""
    linear = nn.Linear(in_features, out_features)
    nn.init.normal_(linear.weight, std=deviation * in_features**-0.5)
    nn.init.zeros_(linear.bias)
    return linear
