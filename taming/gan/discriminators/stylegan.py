"""Discriminator of StyleGAN2's kind (Karras et al. 2020, arXiv:1912.04958), for pictures of any size.

Axes: B pictures, C channels, H W pixels, G groups of pictures.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field
from torch import Tensor, nn

from taming.config import Config
from taming.gan.discriminators.patchgan import too_small
from taming.layers.equalised import EqualisedConv2d


class StyleGANConfig(Config):
    """Residual blocks that halve the picture, each twice as wide up to `max_channels`."""

    kind: Literal["stylegan"] = "stylegan"
    channels: int = Field(default=32, ge=1)
    """Width at the picture's own size."""
    max_channels: int = Field(default=256, ge=1)
    num_layers: int = Field(default=4, ge=1)
    """Halvings before the logits: one logit for 2^num_layers pixels a side."""
    group_size: int = Field(default=4, ge=1)
    """Pictures that the deviation over the batch is taken of; 1 leaves it out."""

    takes_classes: ClassVar[bool] = False

    @property
    def smallest_size(self) -> int:
        """Pixels a side from which there is a logit."""
        return int(2**self.num_layers)

    def unsuited(self, height: int, width: int) -> str | None:
        """Why pictures of this size cannot be judged; None where they can."""
        return too_small(self.kind, self.smallest_size, height, width)


class StyleGANDiscriminator(nn.Module):
    """Pictures (B, in_channels, H, W) -> logits (B, 1, h, w), positive for real; h = H // 2^num_layers.

    Equalised learning rate, blurred downsampling, residual blocks and the batch's deviation are the
    published ones. The two dense layers at the end, which would fix the size and give one verdict a
    picture, are convolutions here: any size passes with the same weights, and each region gets a verdict of
    its own, which is what a reconstruction can be corrected by.
    """

    def __init__(self, config: StyleGANConfig, in_channels: int = 3) -> None:
        super().__init__()
        self.group_size = config.group_size
        widths = [
            min(config.channels * 2**index, config.max_channels) for index in range(config.num_layers + 1)
        ]
        self.from_rgb = EqualisedConv2d(in_channels, widths[0], 1)
        self.blocks = nn.Sequential(*(ResidualDown(narrow, wide) for narrow, wide in pairwise(widths)))
        self.conv = EqualisedConv2d(widths[-1] + (config.group_size > 1), widths[-1], 3, padding=1)
        self.dense = EqualisedConv2d(widths[-1], widths[-1], 3, padding=1)
        self.logits = EqualisedConv2d(widths[-1], 1, 1)

    def forward(self, images: Tensor, y: Tensor | None = None) -> Tensor:
        h = self.blocks(_leaky(self.from_rgb(images)))
        if self.group_size > 1:
            h = append_batch_deviation(h, self.group_size)
        logits: Tensor = self.logits(_leaky(self.dense(_leaky(self.conv(h)))))
        return logits


class ResidualDown(nn.Module):
    """(B, C, H, W) -> (B, C', H // 2, W // 2): two convolutions and a 1x1 skip, both halves blurred first."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = EqualisedConv2d(in_channels, in_channels, 3, padding=1)
        self.down = EqualisedConv2d(in_channels, out_channels, 3)
        self.skip = EqualisedConv2d(in_channels, out_channels, 1, bias=False)
        kernel = torch.tensor([1.0, 3.0, 3.0, 1.0])
        self.kernel: Tensor
        self.register_buffer("kernel", kernel.outer(kernel) / kernel.sum() ** 2)

    def forward(self, x: Tensor) -> Tensor:
        main = _leaky(self.down(self._blur(_leaky(self.conv(x)), padding=2), stride=2))
        # A 1x1 convolution commutes with leaving pixels out: blur only those that stay.
        skip = self.skip(self._blur(x, padding=1, stride=2))
        # Both have deviation one: so does their sum over the root of two.
        result: Tensor = (main + skip) * math.sqrt(0.5)
        return result

    def _blur(self, x: Tensor, *, padding: int, stride: int = 1) -> Tensor:
        channels = x.shape[1]
        kernel = self.kernel.to(x.dtype).expand(channels, 1, 4, 4)
        return F.conv2d(x, kernel, None, stride, padding, groups=channels)


def append_batch_deviation(x: Tensor, group_size: int) -> Tensor:
    """(B, C, H, W) -> (B, C + 1, H, W): the mean deviation within groups of pictures as one more channel.

    Groups are neighbours, of the largest size up to `group_size` that divides B: processes and micro-batches
    whose share is a multiple of `group_size` make the groups that the whole batch would.
    """
    size = next(n for n in range(min(group_size, len(x)), 0, -1) if len(x) % n == 0)
    groups = rearrange(x.float(), "(g n) c h w -> g n c h w", n=size)
    deviation = (groups.var(1, correction=0) + 1e-8).sqrt().mean((1, 2, 3))  # (G,)
    channel = deviation.repeat_interleave(size)[:, None, None, None].expand(-1, 1, *x.shape[2:])
    return torch.cat((x, channel.to(x.dtype)), 1)


def _leaky(x: Tensor) -> Tensor:
    # The gain keeps the deviation at one.
    return F.leaky_relu(x, 0.2) * math.sqrt(2)
