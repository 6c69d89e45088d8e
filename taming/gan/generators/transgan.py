"""TransGAN's generator (Jiang et al. 2021, arXiv:2102.07074): transformers alone, from 8x8 tokens to pixels.

One family for the paper as first published (learned positions alone, locality-aware initialisation,
super-resolution co-training) and for its code as released (relative position bias, windows from 64x64 on,
noise a token). The papers know no classes: here a class's embedding is added to the noise.

Axes: B pictures, Z noise, N tokens of a grid h w, D width, C channels, H W pixels.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
from einops import rearrange
from pydantic import Field, model_validator
from torch import Tensor, nn

from taming.config import Config
from taming.errors import ConfigError
from taming.gan.generator import Generator, Painted, StemOutput, Trunk
from taming.gan.locality import Locality, LocalityConfig
from taming.layers.token_attention import MultiHeadAttention
from taming.layers.token_block import TokenBlock, TokenMLP
from taming.layers.token_noise import NoisyNorm
from taming.layers.token_norm import PixelNorm, TokenLayerNorm
from taming.layers.upsampling import resize_tokens, shuffle_tokens

Grid = tuple[int, int]
CLASS_DEVIATION = 0.25
"""Of a class's embedding at the start, where the noise has 1: as strong as the noise, it decides pictures by
itself, and those of a class become one."""


class TransGANGeneratorConfig(Config):
    """The defaults are the released settings for 32x32."""

    kind: Literal["transgan"] = "transgan"
    noise_dim: int = Field(256, ge=1)
    widths: tuple[int, ...] = Field((1024, 256, 64), min_length=1)
    """Of each stage; the last one's tokens are pixels, and each before has half the cells a side. From one to
    the next a quarter of the width is left (pixel shuffle), or all of it (bicubic, as at 256x256)."""
    depths: tuple[int, ...] = (5, 4, 2)
    """Blocks of each stage."""
    num_heads: int = Field(4, ge=1)
    mlp_ratio: int = Field(4, ge=1)
    norm: Literal["layer", "pixel"] = "layer"
    relative_bias: bool = True
    """A learned bias for each offset of two tokens; false as first published."""
    window: int | None = Field(16, ge=1)
    """Cells a side of the windows in which stages of `window_from` cells a side or more attend."""
    window_from: int = Field(64, ge=1)
    token_noise: bool = True
    """One random number a token before each attention, of learned strength from 0."""
    rgb: Literal["last", "every"] = "every"
    """Where colours are read off: after the last stage (as first published, and at 256x256), or after every
    one, enlarged and summed (the released code for CIFAR-10)."""
    locality: LocalityConfig | None = None
    super_resolution: bool = False
    """Whether the generator has the layer for super-resolution co-training."""

    @model_validator(mode="after")
    def _fits(self) -> TransGANGeneratorConfig:
        if len(self.depths) != len(self.widths) or min(self.depths) < 1:
            raise ValueError(
                f"depths {self.depths} does not fit widths {self.widths}: give one depth of 1 or more a width"
            )
        for width, following in pairwise(self.widths):
            if following not in (width, width / 4):
                quarter = f", or {width // 4} (pixel shuffle)" if width % 4 == 0 else ""
                raise ValueError(
                    f"widths: {following} after {width} is not possible; use {width} (bicubic){quarter}"
                    + ("" if quarter else f": {width} is not divisible by 4, which a pixel shuffle needs")
                )
        for width in self.widths:
            if width % self.num_heads:
                raise ValueError(
                    f"widths: {width} is not divisible by num_heads {self.num_heads}; "
                    f"use fewer heads or a width that is"
                )
        if self.super_resolution and len(self.widths) < 2:
            raise ValueError("super_resolution feeds the second stage: give two or more widths")
        return self

    @property
    def upsampling(self) -> int:
        """Pixels a side of a picture for one cell of the first stage."""
        return 2 ** (len(self.widths) - 1)

    def unsuited(self, height: int, width: int) -> str | None:
        """Why pictures of this size cannot be painted; None where they can."""
        if height % self.upsampling or width % self.upsampling:
            return (
                f"transgan with {len(self.widths)} widths paints pictures whose sides are divisible by "
                f"{self.upsampling}, not {height}x{width}; give another size or fewer widths"
            )
        return self._unsuited_windows((height, width), len(self.widths))

    def _unsuited_windows(self, size: Grid, num_stages: int) -> str | None:
        for index in range(num_stages):
            h, w = size[0] >> index, size[1] >> index
            if (window := self.window_of((h, w))) is None:
                continue
            if h % window or w % window:
                return (
                    f"transgan's window {window} does not divide the {h}x{w} cells of a stage; use another "
                    f"window, or window_from above {max(h, w)}"
                )
            if index == 0 and self.locality is not None:
                return (
                    f"transgan's locality masks the last stage, which attends within windows at {h}x{w}; "
                    f"use window_from above {max(h, w)}, or locality: null"
                )
        return None

    def window_of(self, grid: Grid) -> int | None:
        """The window of a stage of that grid; None where all its tokens attend to all."""
        if self.window is None or max(grid) < self.window_from or max(grid) <= self.window:
            return None
        return self.window


class TransGANTrunk(Trunk):
    """The last log2(H / h) + 1 stages: tokens of start -> pixels, and the layer to channels."""

    def __init__(self, config: TransGANGeneratorConfig, start: Grid, size: Grid, channels: int) -> None:
        num_stages = _stages_between(config, start, size)
        widths, depths = config.widths[-num_stages:], config.depths[-num_stages:]
        super().__init__(widths[0], start, size)
        if (reason := config._unsuited_windows(size, num_stages)) is not None:
            raise ConfigError(reason)
        grids = [(start[0] << index, start[1] << index) for index in range(num_stages)]
        self.stages = nn.ModuleList(
            Stage(config, width, depth, grid)
            for width, depth, grid in zip(widths, depths, grids, strict=True)
        )
        painting = widths if config.rgb == "every" else widths[-1:]
        self.to_rgb = nn.ModuleList(nn.Conv2d(width, channels, 1) for width in painting)
        self.locality = None if config.locality is None else Locality(config.locality, size)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()  # torch's own start, as in the released code

    def forward(self, features: Tensor, style: Tensor | None = None) -> Painted:
        """(B, in_channels, *start) -> pictures of `size`; it has no use for a style."""
        return self.run(rearrange(features, "b d h w -> b (h w) d"))

    def run(self, tokens: Tensor, first: int = 0) -> Painted:
        """The stages from number `first` on; `tokens` (B, N, D) are its input before the position."""
        maps: list[Tensor] = []
        for index, stage in enumerate(self.stages):
            if index < first:
                continue
            assert isinstance(stage, Stage)
            if index > first:
                tokens = stage.enlarge(tokens)
            last = index == len(self.stages) - 1
            mask = self.locality.mask() if last and self.locality is not None else None
            tokens = stage(tokens, mask)
            if last or len(self.to_rgb) > 1:
                maps.append(rearrange(tokens, "b (h w) d -> b d h w", h=stage.grid[0]))
        return Painted(self.paint(*maps), tuple(each.detach() for each in maps))

    def paint(self, *features: Tensor) -> Tensor:
        """Maps of the last stages, (B, D, h, w) each -> pictures (B, C, H, W)."""
        images = features[0].new_zeros(())
        for layer, each in zip(self.to_rgb[-len(features) :], features, strict=True):
            painted = layer(each)
            images = images + nn.functional.interpolate(painted, size=self.size)  # nearest
        return images

    @property
    def last_layer(self) -> nn.Parameter:
        layer = self.to_rgb[-1]
        assert isinstance(layer, nn.Conv2d)
        assert isinstance(layer.weight, nn.Parameter)
        return layer.weight

    def before_step(self, progress: float) -> None:
        """Set how far tokens of the last block see (locality-aware initialisation)."""
        if self.locality is not None:
            self.locality.before_step(progress)


class Stage(nn.Module):
    """Transformer blocks on one grid, after its learned position."""

    def __init__(self, config: TransGANGeneratorConfig, width: int, depth: int, grid: Grid) -> None:
        super().__init__()
        self.grid, self.width = grid, width
        num_tokens = grid[0] * grid[1]
        self.position = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, num_tokens, width), std=0.02))
        window = config.window_of(grid)

        def norm() -> nn.Module:
            return TokenLayerNorm(width) if config.norm == "layer" else PixelNorm()

        self.blocks = nn.ModuleList(
            TokenBlock(
                MultiHeadAttention(
                    width,
                    config.num_heads,
                    qkv_bias=False,
                    relative_grid=grid if config.relative_bias else None,
                    window=window,
                ),
                TokenMLP(width, width * config.mlp_ratio),
                NoisyNorm(norm(), num_tokens) if config.token_noise else norm(),
                norm(),
            )
            for _ in range(depth)
        )

    def enlarge(self, tokens: Tensor) -> Tensor:
        """Tokens of the stage before, at half the cells a side -> (B, N, D) of this one."""
        before = (self.grid[0] // 2, self.grid[1] // 2)
        if tokens.shape[-1] == self.width:
            return resize_tokens(tokens, before, self.grid, mode="bicubic")[0]
        return shuffle_tokens(tokens, before)[0]

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, N, D) -> (B, N, D); `mask` (N, N) is for the last block."""
        tokens = tokens + self.position
        for index, block in enumerate(self.blocks):
            last = index == len(self.blocks) - 1
            tokens = block(tokens, grid=self.grid, mask=mask if last else None)
        return tokens


class TransGANStem(nn.Module):
    """Noise (B, Z), a class's embedding added to it, through one dense layer to the first stage's tokens."""

    def __init__(self, noise_dim: int, width: int, grid: Grid, num_classes: int | None) -> None:
        super().__init__()
        self.grid = grid
        self.embed: nn.Embedding | None = None
        if num_classes is not None:
            self.embed = nn.Embedding(num_classes, noise_dim)
            nn.init.normal_(self.embed.weight, std=CLASS_DEVIATION)
        self.linear = nn.Linear(noise_dim, grid[0] * grid[1] * width)

    def forward(self, z: Tensor, y: Tensor | None = None) -> StemOutput:
        if self.embed is not None:
            assert y is not None
            z = z + self.embed(y)
        h, w = self.grid
        return StemOutput(rearrange(self.linear(z), "b (h w d) -> b d h w", h=h, w=w), None)


class TransGANGenerator(Generator):
    """Noise and classes -> pictures, and low resolution -> pictures while both are learned together."""

    trunk: TransGANTrunk

    def __init__(
        self, config: TransGANGeneratorConfig, size: Grid, channels: int, num_classes: int | None
    ) -> None:
        start = (size[0] // config.upsampling, size[1] // config.upsampling)
        stem = TransGANStem(config.noise_dim, config.widths[0], start, num_classes)
        super().__init__(stem, TransGANTrunk(config, start, size, channels), config.noise_dim, num_classes)
        self.from_low = nn.Linear(channels, config.widths[1]) if config.super_resolution else None

    @property
    def super_resolution_size(self) -> Grid | None:
        """(h, w) of the pictures that `super_resolve` takes: the second stage's; None where it has none."""
        if self.from_low is None:
            return None
        return 2 * self.trunk.start[0], 2 * self.trunk.start[1]

    def super_resolve(self, low: Tensor) -> Tensor:
        """Real pictures at low resolution (B, C, h, w) -> (B, C, H, W), by the stages from the second on.

        The co-training asks for the real pictures at full resolution (mean squared error, weight 50). How the
        low ones enter is not published: here a dense layer makes each pixel a token of the second stage.
        Raises ConfigError where the config has no `super_resolution`.
        """
        if self.from_low is None:
            raise ConfigError(
                "this generator has no layer for super-resolution; set generator.super_resolution: true"
            )
        tokens = self.from_low(rearrange(low, "b c h w -> b (h w) c"))
        return self.trunk.run(tokens, first=1).images


def generator(
    config: TransGANGeneratorConfig, size: Grid, channels: int, num_classes: int | None
) -> TransGANGenerator:
    """A fresh generator of pictures (B, channels, *size)."""
    return TransGANGenerator(config, size, channels, num_classes)


def trunk(config: TransGANGeneratorConfig, start: Grid, size: Grid, channels: int) -> TransGANTrunk:
    """The stages from `start` to `size`. Raises ConfigError where the config has not so many."""
    return TransGANTrunk(config, start, size, channels)


def _stages_between(config: TransGANGeneratorConfig, start: Grid, size: Grid) -> int:
    """How many stages lead from a grid to a size, the first and the last included. Raises ConfigError."""
    wanted = [index for index in range(16) if (start[0] << index, start[1] << index) == size]
    if not wanted:
        raise ConfigError(
            f"transgan doubles both sides from stage to stage: {start[0]}x{start[1]} cells do not become "
            f"{size[0]}x{size[1]} pixels; use a downsample factor of 2, 4, 8 or 16"
        )
    if wanted[0] >= len(config.widths):
        raise ConfigError(
            f"transgan has {len(config.widths)} widths, and {start[0]}x{start[1]} cells to "
            f"{size[0]}x{size[1]} pixels takes {wanted[0] + 1}; give more widths and depths"
        )
    return wanted[0] + 1
