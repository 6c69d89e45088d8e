"""SAGAN's discriminator (Zhang et al. 2019, arXiv:1805.08318): residual blocks, and attention once.

Axes: B pictures, C channels, H W cells, K classes.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from taming.config import Config
from taming.gan.attention_placement import SelfAttentionConfig
from taming.gan.heads import ProjectionHead
from taming.layers.spectral_conv import spectral_conv
from taming.layers.spectral_norm import SpectralEmbedding

PUBLISHED_BLOCKS = {
    8: ((2, 2), 1),
    16: ((2, 2, 2), 2),
    32: ((2, 2, 2, 2), 2),
    64: ((1, 2, 4, 8, 16), 4),
    128: ((1, 2, 4, 8, 16, 16), 5),
    256: ((1, 2, 4, 8, 8, 16, 16), 6),
}
"""Side of the pictures -> widths of the blocks in multiples of `channels`, and how many halve the map. Those
for 8 and 16 px are ours; 256 mirrors the generator."""


class SAGANDiscriminatorConfig(Config):
    """The published one is all defaults. Its projection head gives one logit a picture; "map" one a cell."""

    kind: Literal["sagan"] = "sagan"
    takes_classes: ClassVar[bool] = True
    channels: int = Field(default=64, ge=1)
    """Unit of width."""
    multipliers: tuple[int, ...] | None = None
    """Widths of the blocks, in multiples of `channels`; null: as published for the size."""
    num_halvings: int | None = Field(default=None, ge=0)
    """How many of the first blocks halve the map; null: as published, or all but the last where
    `multipliers` are given."""
    head: Literal["projection", "map"] = "projection"
    """projection: the sum over all cells, one logit a picture, classes by the inner product with a learned
    direction each; map: the same of each cell, a logit for each, as stage one wants it."""
    attention: SelfAttentionConfig = SelfAttentionConfig()

    def unsuited(self, height: int, width: int) -> str | None:
        """Why pictures of this size cannot be judged; None where they can."""
        side = min(height, width)
        multipliers, halvings = self.blocks(height, width)
        if not multipliers or min(multipliers) < 1 or halvings > len(multipliers):
            return (
                f"multipliers {list(multipliers)} with num_halvings {halvings}: give one or more "
                "multipliers, each at least 1, and no more halvings than those"
            )
        if side < 2**halvings:
            return (
                f"pictures of {height}x{width} cannot be halved {halvings} times; give larger ones, or a "
                "smaller num_halvings"
            )
        return self.attention.unsuited(self.maps(height, width))

    def blocks(self, height: int, width: int) -> tuple[tuple[int, ...], int]:
        """Multipliers of the blocks, and how many of them halve the map."""
        side = min(height, width)
        known = max((size for size in PUBLISHED_BLOCKS if size <= side), default=min(PUBLISHED_BLOCKS))
        multipliers, halvings = PUBLISHED_BLOCKS[known]
        if self.multipliers is not None:
            multipliers, halvings = self.multipliers, len(self.multipliers) - 1
        return multipliers, halvings if self.num_halvings is None else self.num_halvings

    def maps(self, height: int, width: int) -> list[int]:
        """Shorter sides of the maps after each block."""
        multipliers, halvings = self.blocks(height, width)
        return [min(height, width) >> min(n, halvings) for n in range(1, len(multipliers) + 1)]


class SAGANDiscriminator(nn.Module):
    """Pictures (B, in_channels, H, W)[, classes (B,)] -> logits (B, 1) or (B, 1, h, w), positive for real.

    Pictures of other sizes than `size` pass as well. Classes are ignored where `num_classes` is None.
    """

    def __init__(
        self,
        config: SAGANDiscriminatorConfig,
        in_channels: int = 3,
        size: tuple[int, int] = (32, 32),
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        multipliers, halvings = config.blocks(*size)
        places = config.attention.places(config.maps(*size), min(size))
        self.blocks = nn.ModuleList()
        self.attention = nn.ModuleDict()  # under the number of the block that it follows
        width = in_channels
        for number, multiplier in enumerate(multipliers):
            wider = config.channels * multiplier
            self.blocks.append(ResidualDown(width, wider, halve=number < halvings, first=number == 0))
            if number in places:
                self.attention[str(number)] = config.attention.block(wider)
            width = wider
        self.head = (
            ProjectionHead(width, num_classes, "spectral")
            if config.head == "projection"
            else MapHead(width, num_classes)
        )
        self.to(memory_format=torch.channels_last)  # a quarter of the time on a CPU

    def forward(self, images: Tensor, y: Tensor | None = None) -> Tensor:
        h = images.contiguous(memory_format=torch.channels_last)
        for number, block in enumerate(self.blocks):
            h = block(h)
            if str(number) in self.attention:
                h = self.attention[str(number)](h)
        h = F.relu(h)
        logits: Tensor = self.head(h.sum((2, 3)) if isinstance(self.head, ProjectionHead) else h, y)
        return logits


class ResidualDown(nn.Module):
    """(B, C, H, W) -> (B, C', H // 2, W // 2): ReLU, conv3, ReLU, conv3, mean of 2x2; shortcut conv1, mean.

    Without `halve` the size stays, and the shortcut is the identity where the width stays too. The `first`
    block has no ReLU before it, which would take the dark half of a picture away. All convolutions are of
    spectral norm one.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, halve: bool = True, first: bool = False
    ) -> None:
        super().__init__()
        self.halve, self.first = halve, first
        self.conv1 = spectral_conv(in_channels, out_channels, 3)
        self.conv2 = spectral_conv(out_channels, out_channels, 3)
        self.shortcut: nn.Module = (
            spectral_conv(in_channels, out_channels, 1)
            if halve or in_channels != out_channels
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        # Never in place: the shortcut leaves before this ReLU.
        h = x if self.first else F.relu(x)
        h = self.conv2(F.relu(self.conv1(h)))
        # A 1x1 convolution commutes with a mean: one order serves both kinds of block, with less work.
        result: Tensor = self._halved(h) + self.shortcut(self._halved(x))
        return result

    def _halved(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2) if self.halve else x


class MapHead(nn.Module):
    """One logit a cell: conv1(h) + <embed(y), h>, both of spectral norm one."""

    def __init__(self, width: int, num_classes: int | None) -> None:
        super().__init__()
        self.conv = spectral_conv(width, 1, 1)
        self.embed = None if num_classes is None else SpectralEmbedding(num_classes, width)

    def forward(self, features: Tensor, y: Tensor | None = None) -> Tensor:
        """(B, C, h, w), classes (B,) -> (B, 1, h, w); `y` is ignored where there are no classes."""
        logits: Tensor = self.conv(features)
        if self.embed is None:
            return logits
        assert y is not None, "a conditional discriminator judges pictures with their classes"
        direction = self.embed(y)[:, :, None, None]
        return logits + (direction * features).sum(1, keepdim=True)
