"""SAGAN's generator (Zhang et al. 2019, arXiv:1805.08318): residual blocks, and attention once.

Axes: B pictures, Z noise, C channels, H W cells, K classes.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field
from torch import Tensor, nn

from taming.config import Config
from taming.errors import ConfigError, UserError
from taming.gan.attention_placement import SelfAttentionConfig
from taming.gan.generator import Generator, Painted, StemOutput, Trunk
from taming.layers.conditional_norm import ConditionalNorm, MapNorm
from taming.layers.linears import make_linear
from taming.layers.spectral_conv import spectral_conv

PUBLISHED_MULTIPLIERS = {
    1: (4, 4),
    2: (4, 4, 4),
    3: (4, 4, 4, 4),  # 32 px
    4: (16, 8, 4, 2, 1),
    5: (16, 16, 8, 4, 2, 1),  # 128 px
    6: (16, 16, 8, 8, 4, 2, 1),
}
"""Number of doublings -> widths in multiples of `channels`, of the first map and after each doubling. Those
for 8 and 16 px are ours."""
SMALLEST_START = 4


class SAGANGeneratorConfig(Config):
    """The published one is all defaults; 32 to 256 px differ in `multipliers` alone."""

    kind: Literal["sagan"] = "sagan"
    channels: int = Field(default=64, ge=1)
    """Unit of width."""
    multipliers: tuple[int, ...] | None = None
    """Widths of the first map and after each doubling, in multiples of `channels`; null: as published."""
    noise_dim: int = Field(default=128, ge=1)
    norm: MapNorm = "batch"
    """group neither mixes pictures nor differs between training and use."""
    attention: SelfAttentionConfig = SelfAttentionConfig()

    def unsuited(self, height: int, width: int) -> str | None:
        """Why pictures of this size cannot be painted; None where they can."""
        if self.multipliers is not None:
            if len(self.multipliers) < 2 or min(self.multipliers) < 1:
                return f"multipliers {list(self.multipliers)}: give two or more, each at least 1"
            factor = 2 ** (len(self.multipliers) - 1)
            if height % factor or width % factor:
                return (
                    f"pictures of {height}x{width} are not divisible by {factor}, which "
                    f"{len(self.multipliers)} multipliers double to; give fewer, or pictures of a "
                    f"multiple of {factor}"
                )
        doublings = self.doublings(height, width)
        if doublings == 0 or (self.multipliers is None and doublings not in PUBLISHED_MULTIPLIERS):
            return (
                f"SAGAN doubles a map of 4 or more cells a side; there are published widths for 1 to "
                f"{max(PUBLISHED_MULTIPLIERS)} doublings, and pictures of {height}x{width} would take "
                f"{doublings}; use sides divisible by 8, or give multipliers"
            )
        side = min(height, width)
        return self.attention.unsuited([side >> n for n in range(doublings + 1)])

    def doublings(self, height: int, width: int) -> int:
        """How often the first map is doubled."""
        if self.multipliers is not None:
            return len(self.multipliers) - 1
        found = 0
        while not (height % 2 or width % 2) and min(height, width) >= 2 * SMALLEST_START:
            height, width, found = height // 2, width // 2, found + 1
        return found

    def widths(self, height: int, width: int) -> list[int]:
        """Channels of the first map and after each doubling."""
        multipliers = self.multipliers or PUBLISHED_MULTIPLIERS[self.doublings(height, width)]
        return [self.channels * multiplier for multiplier in multipliers]


def generator(
    config: SAGANGeneratorConfig, size: tuple[int, int], channels: int, num_classes: int | None
) -> Generator:
    """Of pictures (B, channels, *size); `size` suits the config."""
    widths = config.widths(*size)
    factor = 2 ** (len(widths) - 1)
    start = (size[0] // factor, size[1] // factor)
    stem = SAGANStem(config.noise_dim, widths[0], start, num_classes)
    trunk = SAGANTrunk(config, widths, start, size, channels, num_classes)
    return Generator(stem, trunk, config.noise_dim, num_classes)


def trunk(
    config: SAGANGeneratorConfig, start: tuple[int, int], size: tuple[int, int], channels: int
) -> SAGANTrunk:
    """The generator's last blocks, for maps that enter at `start`: as many as double it to `size`.

    It takes maps of the width that the whole generator has there. Raises ConfigError where no number of
    doublings leads from one to the other.
    """
    factor = size[0] // start[0]
    if (start[0] * factor, start[1] * factor) != size or factor & (factor - 1):
        raise ConfigError(
            f"SAGAN's blocks double a map: {start[0]}x{start[1]} does not become {size[0]}x{size[1]}; use a "
            "downsample factor that is a power of two"
        )
    count = factor.bit_length()
    if (reason := config.attention.unsuited([min(start) << n for n in range(count)])) is not None:
        raise ConfigError(reason)
    widths = config.widths(*size)
    widths = [widths[0]] * (count - len(widths)) + widths[-count:]
    return SAGANTrunk(config, widths, start, size, channels)


class SAGANStem(nn.Module):
    """Noise (B, Z) -> the first map, by one dense layer; the class becomes a one-hot style (B, K)."""

    def __init__(self, noise_dim: int, width: int, start: tuple[int, int], num_classes: int | None) -> None:
        super().__init__()
        self.start, self.num_classes = start, num_classes
        self.linear = make_linear("spectral", noise_dim, start[0] * start[1] * width)

    def forward(self, z: Tensor, y: Tensor | None = None) -> StemOutput:
        features = rearrange(self.linear(z), "b (h w c) -> b c h w", h=self.start[0], w=self.start[1])
        style = None
        if self.num_classes is not None:
            assert y is not None
            style = F.one_hot(y, self.num_classes).float()
        return StemOutput(features, style)


class SAGANTrunk(Trunk):
    """Maps (B, C, h, w) -> pictures in (-1, 1); any grid passes, so that larger pictures can be painted.

    `style` (B, K) weighs the classes of the conditional norms. Without classes it is ignored.
    """

    def __init__(
        self,
        config: SAGANGeneratorConfig,
        widths: list[int],
        start: tuple[int, int],
        size: tuple[int, int],
        channels: int = 3,
        num_classes: int | None = None,
    ) -> None:
        super().__init__(widths[0], start, size)
        self.factor = size[0] // start[0]
        maps = [min(start) << n for n in range(len(widths))]
        places = config.attention.places(maps, min(size))
        # Under the number of the map that they look at: 0 is the one that enters.
        self.attention = nn.ModuleDict({str(n): config.attention.block(widths[n]) for n in places})
        self.blocks = nn.ModuleList(
            ResidualUp(width, wider, num_classes, norm=config.norm) for width, wider in pairwise(widths)
        )
        self.norm_out = ConditionalNorm(widths[-1], norm=config.norm)
        self.conv_out = spectral_conv(widths[-1], channels, 3)
        self.to(memory_format=torch.channels_last)  # a quarter of the time on a CPU

    def forward(self, features: Tensor, style: Tensor | None = None) -> Painted:
        h = self._attended(0, features.contiguous(memory_format=torch.channels_last))
        for number, block in enumerate(self.blocks, start=1):
            h = self._attended(number, block(h, style))
        h = F.relu(self.norm_out(h))
        return Painted(self.paint(h), (h.detach(),))

    def paint(self, *features: Tensor) -> Tensor:
        return torch.tanh(self.conv_out(features[0]))

    @property
    def last_layer(self) -> nn.Parameter:
        return self.conv_out.get_parameter("parametrizations.weight.original")

    def check_size(self, height: int, width: int) -> None:
        if height % self.factor or width % self.factor:
            raise UserError(
                f"this SAGANTrunk doubles its map to {self.factor} times its size: pictures of "
                f"{height}x{width} are no multiple of {self.factor}; crop or pad them"
            )

    def _attended(self, number: int, h: Tensor) -> Tensor:
        name = str(number)
        if name not in self.attention:
            return h
        attended: Tensor = self.attention[name](h)
        return attended


class ResidualUp(nn.Module):
    """(B, C, H, W) -> (B, C', 2H, 2W): norm, ReLU, nearest x2, conv3, norm, ReLU, conv3; shortcut x2, conv1.

    Both norms follow the class. All convolutions are of spectral norm one.
    """

    def __init__(
        self, in_channels: int, out_channels: int, num_classes: int | None = None, *, norm: MapNorm = "batch"
    ) -> None:
        super().__init__()
        self.norm1 = ConditionalNorm(in_channels, num_classes, norm=norm)
        self.conv1 = spectral_conv(in_channels, out_channels, 3)
        self.norm2 = ConditionalNorm(out_channels, num_classes, norm=norm)
        self.conv2 = spectral_conv(out_channels, out_channels, 3)
        self.shortcut = spectral_conv(in_channels, out_channels, 1)

    def forward(self, x: Tensor, style: Tensor | None = None) -> Tensor:
        h = F.relu(self.norm1(x, style))
        h = self.conv1(_doubled(h))
        h = F.relu(self.norm2(h, style))
        # A 1x1 convolution commutes with repeating cells: a quarter of the work.
        result: Tensor = self.conv2(h) + _doubled(self.shortcut(x))
        return result


def _doubled(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="nearest")
